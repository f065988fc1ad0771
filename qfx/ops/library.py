"""Registering operators with torch, once a process: those of torch.ops.qfx, and those of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import register_autograd, register_fake

# Reference kernels ask the device for values, or bring tables to it: a CUDA graph can record neither. Inductor runs
# such operators between the graphs.
UNSAFE = (torch.Tag.cudagraph_unsafe,)

Gradient = tuple[Callable[..., Any], Callable[..., Any]]  # (setup_context, backward), as `register_autograd` takes them


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *, namespace: str = "qfx",
    tags: Sequence[torch.Tag] = (), gradient: Gradient | None = None,
) -> None:  # fmt: skip
    """Register an op: its schema ("name(Tensor x, ...) -> Tensor"), what runs it and what gives the shapes.

    Torch holds it from then on. What is there already stays: a module that is loaded again, or a second copy of it,
    registers nothing.
    """
    name, bracket, rest = schema.partition("(")
    if hasattr(getattr(torch.ops, namespace), name):
        return
    op = f"{namespace}::{name}"
    torch.library.define(op, bracket + rest, tags=tuple(tags))
    torch.library.impl(op, "default", kernel)
    register_fake(op, fake)
    if gradient is not None:
        setup, backward = gradient
        register_autograd(op, backward, setup_context=setup)
