"""Activations to 8-bit codes: per token, per tensor at run time, or by a calibrated scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.values import Value
from qfx.format import Format
from qfx.numerics import TINY

_CENTRE = 128


@dataclass(frozen=True)
class Codes:
    """u8 codes with one scale and zero point (inputs of MatMulIntegerToFloat); `rows` [.., 1] is the scale per row that
    is still to be multiplied, `shift` [.., 1] the zero point per row that is still to be taken off."""

    codes: Value
    scale: Value
    zero: Value
    rows: Value | None = None
    shift: Value | None = None


def quantized_input(
    b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None
) -> Codes:
    """x / smooth as u8 codes."""
    if not fmt.dynamic:
        return _static(b, x, fmt, scale, zero, smooth)
    if smooth is not None:
        x = b.op("Div", x, smooth)
    if fmt.has_zero:
        return _affine(b, x, fmt)
    centre, one = b.const(_CENTRE, torch.uint8), b.scalar(1.0, torch.float32)
    step = _symmetric_step(b, x, fmt)
    if fmt.granularity == "":
        return Codes(b.op("QuantizeLinear", x, step, centre, dtype=torch.uint8), step, centre)
    codes = b.op("QuantizeLinear", b.op("Div", x, step), one, centre, dtype=torch.uint8)
    return Codes(codes, one, centre, rows=step)


def _symmetric_step(b: Builder, x: Value, fmt: Format) -> Value:
    """absmax / qmax per row [.., 1] or of everything []; tiny where all is zero."""
    size = b.op("Abs", x)
    # the last axis counted from the front: ONNX Runtime reduces empty tensors wrongly along negative axes
    token = fmt.granularity == "tok"
    top = b.op("ReduceMax", size, b.ints([x.rank - 1]), keepdims=1) if token else b.op("ReduceMax", size, keepdims=0)
    return b.op("Max", b.op("Div", top, b.scalar(float(fmt.qmax), torch.float32)), b.scalar(TINY, torch.float32))


def _affine(b: Builder, x: Value, fmt: Format) -> Codes:
    """Codes with a zero point per row (or one): the zero point is taken off by the columns' sums after the product."""
    zero, one = b.scalar(0.0, torch.float32), b.scalar(1.0, torch.float32)
    axes = [b.ints([x.rank - 1])] if fmt.granularity == "tok" else []
    keep = 1 if axes else 0
    low = b.op("Min", b.op("ReduceMin", x, *axes, keepdims=keep), zero)
    high = b.op("Max", b.op("ReduceMax", x, *axes, keepdims=keep), zero)
    top = b.scalar(float(fmt.qmax), torch.float32)
    step = b.op("Max", b.op("Sub", b.op("Div", high, top), b.op("Div", low, top)), b.scalar(TINY, torch.float32))
    offset = b.op("Min", b.op("Round", b.op("Div", b.op("Neg", low), step)), top)
    steps = b.op("Add", b.op("Round", b.op("Div", x, step)), offset)
    codes = b.cast(b.op("Max", b.op("Min", steps, top), zero), torch.uint8)
    return Codes(codes, one, b.const(0, torch.uint8), rows=step, shift=offset)


def _static(b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None) -> Codes:
    if scale is None or (fmt.has_zero and zero is None):
        raise NotImplementedError(f"static input format {fmt} without its scale")
    step = b.reshape(b.cast(scale, torch.float32), ())
    point = b.const(_CENTRE, torch.uint8) if zero is None else b.reshape(b.cast(zero, torch.uint8), ())
    if smooth is not None:  # a QuantizeLinear with a scale per channel is about five times slower
        x = b.op("Mul", x, b.op("Reciprocal", smooth))  # folded when the session is made
    codes = b.op("QuantizeLinear", x, step, point, dtype=torch.uint8)
    if fmt.bits < 8:
        centre = 0 if fmt.has_zero else _CENTRE
        codes = b.op("Clip", codes, b.const(centre + fmt.qmin, torch.uint8), b.const(centre + fmt.qmax, torch.uint8))
    return Codes(codes, step, point)


def fake_quantized(
    b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None
) -> Value:
    """x rounded to an integer format and back in f32, for products that are not of integers."""
    if fmt.is_plain:
        x = x if smooth is None else b.op("Div", x, smooth)
        return _rounded_to(b, x, fmt)
    if not fmt.is_integer or fmt.granularity not in ("", "tok") or fmt.scale_type != "f32":
        raise NotImplementedError(f"activations in {fmt}")
    q = quantized_input(b, x, fmt, scale, zero, smooth)
    values = b.op("Sub", b.cast(q.codes, torch.float32), b.cast(q.zero, torch.float32))
    if q.shift is not None:
        values = b.op("Sub", values, q.shift)
    return b.op("Mul", values, q.rows if q.rows is not None else q.scale)


def _rounded_to(b: Builder, x: Value, fmt: Format) -> Value:
    return x if fmt.type == "f32" else b.cast(b.cast(x, fmt.code_dtype), torch.float32)
