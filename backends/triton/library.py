"""Registering the ops of this backend, torch.ops.qfx_triton."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from qfx.backends.triton import launch, repeated, tuning
from qfx.errors import explain
from qfx.ops import library

NAME = "qfx_triton"


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()) -> None:
    """`qfx.ops.library.define` of an op of this backend, which knows no gradients and repeats calls that look alike."""
    library.define(schema, _entered(kernel), fake, namespace=NAME, tags=tags)


def _entered(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` under no_grad; a compiled graph, which runs there already, does not enter it for every op."""

    @functools.wraps(kernel)
    def run(*given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return run(*given, **named)
        if named or launch.is_recorded() or not tuning.settled():
            return kernel(*given, **named)
        return repeated.called(kernel, given, launch.early())

    return run


def bad(what: str, expected: object, found: object) -> ValueError:
    """The error for operands that do not fit."""
    return ValueError(explain(f"{NAME}: {what}", expected=expected, found=found))
