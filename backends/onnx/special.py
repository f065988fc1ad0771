"""Functions that take more than one node to be right: near zero, at infinities, over quadrants."""

from __future__ import annotations

import math
from typing import Any

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit, operands
from qfx.backends.onnx.values import Value


def round_decimals(b: Builder, x: Value, decimals: int) -> Value:
    """Round half to even at a decimal place."""
    factor = b.scalar(10.0**decimals, x.dtype)
    return b.op("Div", b.op("Round", b.op("Mul", x, factor)), factor)


def log_of(base: float) -> Emit:
    """Logarithm to a base."""

    def emit(b: Builder, x: Value) -> Value:
        return b.op("Mul", b.op("Log", b.cast(x, b.out_dtype)), b.scalar(1 / math.log(base), b.out_dtype))

    return emit


def isnan(b: Builder, x: Value) -> Value:
    """Is it NaN? Never for integers."""
    if not x.dtype.is_floating_point:
        return b.op("Not", b.op("Equal", x, x, dtype=torch.bool))
    return b.op("IsNaN", x, dtype=torch.bool)


def isinf(b: Builder, x: Value) -> Value:
    """Is it infinite?"""
    if not x.dtype.is_floating_point:
        return b.op("Not", b.op("Equal", x, x, dtype=torch.bool))
    return b.op("IsInf", x, dtype=torch.bool)


def isfinite(b: Builder, x: Value) -> Value:
    """Neither NaN nor infinite."""
    return b.op("Not", b.op("Or", isnan(b, x), isinf(b, x)))


def nan_to_num(b: Builder, x: Value, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Value:
    """NaN and infinities to numbers."""
    if not x.dtype.is_floating_point:
        return x
    limits = torch.finfo(b.out.dtype)
    value = b.op("Where", isnan(b, x), b.scalar(nan or 0.0, x.dtype), x)
    value = b.op(
        "Where",
        b.op("Equal", x, b.scalar(math.inf, x.dtype), dtype=torch.bool),
        b.scalar(limits.max if posinf is None else posinf, x.dtype),
        value,
    )
    return b.op(
        "Where",
        b.op("Equal", x, b.scalar(-math.inf, x.dtype), dtype=torch.bool),
        b.scalar(limits.min if neginf is None else neginf, x.dtype),
        value,
    )


def atan2(b: Builder, y: Any, x: Any) -> Value:
    """The angle of (x, y)."""
    top, low = operands(b, y, x, dtype=b.out_dtype)
    zero = b.scalar(0, top.dtype)
    angle = b.op("Atan", b.op("Div", top, low))
    left = b.op("Less", low, zero, dtype=torch.bool)
    below = b.op("Less", top, zero, dtype=torch.bool)
    turn = b.op("Where", below, b.scalar(-math.pi, top.dtype), b.scalar(math.pi, top.dtype))
    turned = b.op("Where", left, b.op("Add", angle, turn), angle)
    return b.op("Where", isnan(b, angle), zero, turned)


def expm1(b: Builder, x: Value) -> Value:
    """exp(x) - 1 as 2 * exp(x / 2) * sinh(x / 2), exact near zero. Below -40, where sinh becomes infinite, it is -1."""
    value = b.op("Max", b.cast(x, b.out_dtype), b.scalar(-40, b.out_dtype))
    half = b.op("Mul", value, b.scalar(0.5, b.out_dtype))
    return b.op("Mul", b.op("Mul", b.op("Exp", half), b.op("Sinh", half)), b.scalar(2, b.out_dtype))


def log1p(b: Builder, x: Value) -> Value:
    """log(1 + x) as x * log(u) / (u - 1) with u = 1 + x, exact near zero."""
    value = b.cast(x, b.out_dtype)
    one = b.scalar(1, value.dtype)
    u = b.op("Add", value, one)
    rest = b.op("Sub", u, one)
    small = b.op("Equal", rest, b.scalar(0, value.dtype), dtype=torch.bool)
    guarded = b.op("Where", small, one, rest)
    finite = b.op("Mul", value, b.op("Div", b.op("Log", u), guarded))
    infinite = b.op("Equal", value, b.scalar(math.inf, value.dtype), dtype=torch.bool)
    return b.op("Where", infinite, value, b.op("Where", small, value, finite, dtype=value.dtype))


def exp2(b: Builder, x: Value) -> Value:
    """2 ** x."""
    return b.op("Exp", b.op("Mul", b.cast(x, b.out_dtype), b.scalar(math.log(2), b.out_dtype)))


def erfc(b: Builder, x: Value) -> Value:
    """1 - erf(x)."""
    return b.op("Sub", b.scalar(1, b.out_dtype), b.op("Erf", b.cast(x, b.out_dtype)))


EMIT: dict[str, Emit] = {
    "aten.round.decimals": round_decimals,
    "aten.log2.default": log_of(2),
    "aten.log10.default": log_of(10),
    "aten.log1p.default": log1p,
    "aten.expm1.default": expm1,
    "aten.erfc.default": erfc,
    "aten.special_expm1.default": expm1,
    "aten.exp2.default": exp2,
    "aten.isnan.default": isnan,
    "aten.isinf.default": isinf,
    "aten.isfinite.default": isfinite,
    "aten.nan_to_num.default": nan_to_num,
    "aten.atan2.default": atan2,
}
