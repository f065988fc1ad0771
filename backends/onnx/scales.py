"""Scales lie in a file in the type in which the model stores them, once a group, and readers make of them what kernels
take: f32, one for each block. They do so when they load the file (constant folding), not in each call.

    f16 [N, groups]           Cast                -> f32 [N, blocks]
    f32 [N, 1], one a row     Expand              -> f32 [N, blocks]
    power of two (e8m0)       bf16, which holds them all, Cast
    f8 times f32 (e4m3)       Cast, Mul

A session of this process has no file: it gets f32 as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto
from torch import Tensor

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.values import Value
from qfx.format import Format

_HALVES = {
    "f16": (torch.float16, TensorProto.FLOAT16),
    "bf16": (torch.bfloat16, TensorProto.BFLOAT16),
    "e8m0": (torch.bfloat16, TensorProto.BFLOAT16),
}


def scales(b: Builder, name: str, fmt: Format, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
    """f32 of this shape. make: the scales of `fmt`, as f32 of this shape."""
    if fmt.scale_type not in _HALVES or not b.portable:
        return b.derived(name, torch.float32, shape, make)
    dtype, element = _HALVES[fmt.scale_type]
    key = ("scales", name)
    if key not in b.memo:
        held = b.raw(name, element, shape, lambda: _halved(make(), dtype))
        b.memo[key] = Value(b.cast(held, torch.float32).name, torch.float32, shape)
    found: Value = b.memo[key]
    return found


def factors(b: Builder, name: str, weight: Weight, arranged: Callable[[Tensor], Tensor]) -> Value:
    """`Weight.factor` of a weight as f32, `arranged`. Where it is a product of two (e4m3), these lie in a file."""
    found = arranged(weight.factor())
    if weight.format.scale_type != "e4m3" or not b.portable:
        return scales(b, name, weight.format, tuple(found.shape), lambda: found)
    assert weight.zero is not None, f"{weight.format} without the scale of all"
    codes = arranged(weight.scale.view(torch.uint8)).contiguous()
    held = b.cast(b.raw(name, TensorProto.FLOAT8E4M3FN, tuple(found.shape), lambda: codes), torch.float32)
    whole = b.const(weight.zero.reshape(()), torch.float32)
    return Value(b.op("Mul", held, whole).name, torch.float32, tuple(found.shape))


def widened(b: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    """Values [N, 1] as [N, blocks]."""
    if value.shape == shape:
        return value
    key = ("widened", value.name, shape)
    if key not in b.memo:
        b.memo[key] = Value(b.op("Expand", value, b.ints(shape)).name, value.dtype, shape)
    found: Value = b.memo[key]
    return found


def _halved(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of values that 16 bits hold exactly."""
    found = values.to(dtype).contiguous()
    assert torch.equal(found.to(values.dtype), values), f"scales of another type than {dtype}"
    return found.reshape(-1).view(torch.uint8)
