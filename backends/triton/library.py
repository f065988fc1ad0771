"""Registering the ops of this backend, torch.ops.qfx_triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qfx.errors import explain
from qfx.ops import library

NAME = "qfx_triton"


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> None:
    """`qfx.ops.library.define` of an op of this backend, which knows no gradients."""
    library.define(schema, _without_gradients(kernel), fake, namespace=NAME, tags=tags)


def _without_gradients(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` under no_grad; a compiled graph, which runs there already, does not enter it for every op."""

    @functools.wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return kernel(*given, **named)
        with torch.no_grad():
            return kernel(*given, **named)

    return run


def bad(what: str, expected: object, found: object) -> ValueError:
    """The error for operands that do not fit."""
    return ValueError(explain(f"{NAME}: {what}", expected=expected, found=found))
