"""Tensors from nothing: ranges, fills, identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.values import Dim, Value, is_static


def filled(b: Builder, number: Any, dtype: torch.dtype, sizes: Sequence[Dim]) -> Value:
    """`number` in every place of a shape."""
    value = b.scalar(number, dtype)
    if not sizes:
        return value
    if is_static(sizes) and all(s == 1 for s in sizes) and isinstance(number, int | float):
        return b.const(torch.full([1] * len(sizes), number), dtype)
    return b.op("Expand", value, b.shape(sizes))


def full(b: Builder, _: Any, number: Any, **__: Any) -> Value:
    """full, full_like, new_full: the fill stands second."""
    return filled(b, number, b.out_dtype, b.out_dims)


def constant(number: int) -> Emit:
    """zeros, ones, empty and their _like and new_ forms."""

    def emit(b: Builder, *_: Any, **__: Any) -> Value:
        return filled(b, number, b.out_dtype, b.out_dims)

    return emit


def scalar_tensor(b: Builder, number: Any, **_: Any) -> Value:
    """A number as a 0-dimensional tensor."""
    return b.scalar(number, b.out_dtype)


def arange(b: Builder, end: Any, **_: Any) -> Value:
    """0, 1, ... below `end`."""
    return arange_start(b, 0, end)


def arange_start(b: Builder, start: Any, end: Any, step: Any = 1, **_: Any) -> Value:
    """start, start + step, ... The count is the size that torch found, so that rounding cannot change it."""
    dtype = b.out_dtype
    (count,) = b.out_dims
    if dtype.is_floating_point or not isinstance(start, int) or not isinstance(step, int):
        steps = b.op("Range", b.scalar(0, torch.int64), b.scalar(count, torch.int64), b.scalar(1, torch.int64))
        grown = b.op("Mul", b.cast(steps, dtype), b.scalar(step, dtype))
        return b.op("Add", grown, b.scalar(start, dtype))
    values = [b.scalar(v, torch.int64) for v in (start, start + step * count, step)]
    return b.op("Range", *values)


def linspace(b: Builder, start: Any, end: Any, steps: Any, **_: Any) -> Value:
    """`steps` values from start to end, which may be of sizes that vary (the points of Deformable DETR)."""
    dtype = b.out_dtype
    if isinstance(start, Value) or isinstance(end, Value) or not dtype.is_floating_point:
        raise NotImplementedError("a linspace of unknown ends")
    if all(isinstance(number, int | float) for number in (start, end, steps)):
        return b.const(torch.linspace(start, end, steps), dtype)
    first = b.scalar(start, dtype)
    gaps = b.op("Max", b.op("Sub", b.scalar(steps, dtype), b.scalar(1, dtype)), b.scalar(1, dtype))
    step = b.op("Div", b.op("Sub", b.scalar(end, dtype), first), gaps)
    numbers = b.op("Range", b.scalar(0, torch.int64), b.scalar(steps, torch.int64), b.scalar(1, torch.int64))
    return b.op("Add", b.op("Mul", b.cast(numbers, dtype), step), first)


def eye(b: Builder, *_: Any, **__: Any) -> Value:
    """The identity matrix."""
    rows, columns = b.out_dims
    shape = b.shape([rows, columns])
    ones = b.op("Expand", b.scalar(1, torch.float32), shape)
    return b.op("EyeLike", ones, dtype=torch.float32)


_FILLS = {"zeros": 0, "ones": 1, "empty": 0}

EMIT: dict[str, Emit] = {
    **{f"aten.{name}.default": constant(n) for name, n in _FILLS.items()},
    **{f"aten.{name}_like.default": constant(n) for name, n in _FILLS.items()},
    **{f"aten.new_{name}.default": constant(n) for name, n in _FILLS.items()},
    "aten.empty.memory_format": constant(0), "aten.empty_strided.default": constant(0),
    "aten.new_empty_strided.default": constant(0), "aten.full.default": full, "aten.full_like.default": full,
    "aten.new_full.default": lambda b, x, size, number, **kw: full(b, size, number),
    "aten.fill.Scalar": full, "aten.fill.Tensor": full, "aten.scalar_tensor.default": scalar_tensor,
    "aten.arange.default": arange, "aten.arange.start": arange_start, "aten.arange.start_step": arange_start,
    "aten.linspace.default": linspace, "aten.eye.default": eye, "aten.eye.m": eye,
}  # fmt: skip
