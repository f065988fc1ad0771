"""Typed names of an ONNX graph: what a value is called, what it holds there, and sizes as integers or expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx
import sympy
import torch

Dim: TypeAlias = Any  # an int, or a sympy expression

ONNX_TYPE: dict[torch.dtype, int] = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int64: onnx.TensorProto.INT64,
    torch.int32: onnx.TensorProto.INT32,
    torch.int16: onnx.TensorProto.INT16,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.bool: onnx.TensorProto.BOOL,
}
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Value:
    """A value of the ONNX graph. `dtype` is that in which ONNX computes; FX values have a `shape`."""

    name: str
    dtype: torch.dtype
    shape: tuple[Dim, ...] | None = None

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The shape, which every value that stands for an FX node has."""
        assert self.shape is not None, f"the shape of {self.name} was not kept"
        return self.shape

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ONNX graph holds a torch dtype: f16 and bf16 are computed in f32."""
    return torch.float32 if dtype in _HALVES else dtype


def dim_of(size: Any) -> Dim:
    """A number, or the sympy expression of a SymInt or SymFloat (a number where it is constant)."""
    expr = size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat) else size
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Float):
        return float(expr)
    return expr if isinstance(expr, sympy.Expr | float) else int(expr)


def is_number(fake: Any) -> bool:
    """A size or another number, symbolic or not (bools are none)."""
    return isinstance(fake, torch.SymInt | torch.SymFloat | int | float) and not isinstance(fake, bool)


def dims_of(shape: Sequence[Any]) -> tuple[Dim, ...]:
    """`dim_of` for each size of a shape."""
    return tuple(dim_of(size) for size in shape)


def is_static(shape: Sequence[Dim]) -> bool:
    """Is every size an integer?"""
    return all(isinstance(d, int) for d in shape)
