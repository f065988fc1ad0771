"""Registering the ops of this backend, torch.ops.qfx_triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, register_fake

NAME = "qfx_triton"


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> Library | None:
    """Register an op: its schema ("name(Tensor x, ...) -> Tensor"), what runs it and what gives the shapes.

    The library is to be kept. None where another copy of the module registered the op before.
    """
    name = schema.partition("(")[0]
    if hasattr(getattr(torch.ops, NAME), name):
        return None
    library = Library(NAME, "FRAGMENT")
    library.define(schema, tags=tuple(tags))
    library.impl(name, _without_gradients(kernel), "CompositeExplicitAutograd")
    register_fake(f"{NAME}::{name}", fake, lib=library)
    return library


def _without_gradients(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` under no_grad; a compiled graph, which runs there already, does not enter it for every op."""

    @functools.wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kernel(*given, **named)
        with torch.no_grad():
            return kernel(*given, **named)

    return run
