"""Activations to 8-bit codes: per token, per tensor at run time, or by a calibrated scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.values import Dim, Value
from qfx.format import Format
from qfx.numerics import TINY

_CENTRE = 128


@dataclass(frozen=True)
class Codes:
    """u8 codes with one scale and zero point (inputs of MatMulIntegerToFloat).

    Per token the codes are [M, K], `rows` [M, 1] is the scale that is still to be multiplied, `shift` [M, 1] the zero
    point that is still to be taken off.
    """

    codes: Value
    scale: Value
    zero: Value
    rows: Value | None = None
    shift: Value | None = None


def quantized_input(
    b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None
) -> Codes:
    """x / smooth as u8 codes, found once where several products take the same input."""
    key = ("codes", x.name, str(fmt), *(None if v is None else v.name for v in (scale, zero, smooth)))
    if key not in b.memo:
        b.memo[key] = _quantized(b, x, fmt, scale, zero, smooth)
    codes: Codes = b.memo[key]
    return codes


def _quantized(
    b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None
) -> Codes:
    if not fmt.dynamic:
        return _static(b, x, fmt, scale, zero, smooth)
    if smooth is not None:
        x = b.op("Div", x, smooth)
    token = fmt.granularity == "tok"
    rows = b.reshape(x, (math.prod(x.dims[:-1]), x.dims[-1])) if token else x
    step, offset = _affine(b, rows, fmt) if fmt.has_zero else _symmetric(b, rows, fmt)
    point = b.const(_CENTRE, torch.uint8) if offset is None else b.cast(offset, torch.uint8)
    if not token:
        codes = b.op("QuantizeLinear", rows, step, point, dtype=torch.uint8)
        return Codes(_clipped(b, codes, fmt), step, point)
    count = rows.dims[0]
    points = b.reshape(point, (count,)) if offset is not None else repeated(b, point, count)
    if b.standard:
        codes = _by_arithmetic(b, rows, step, offset)
    else:
        codes = b.op("QuantizeLinear", rows, b.reshape(step, (count,)), points, dtype=torch.uint8, axis=0)
    one, base = b.scalar(1.0, torch.float32), b.const(0 if fmt.has_zero else _CENTRE, torch.uint8)
    return Codes(_clipped(b, codes, fmt), one, base, rows=step, shift=offset)


def _by_arithmetic(b: Builder, rows: Value, step: Value, offset: Value | None) -> Value:
    """QuantizeLinear spelled out: OpenVINO knows none with a scale for each row that is found at run time."""
    whole = b.op("Round", b.op("Div", rows, step))
    shifted = b.op("Add", whole, b.scalar(float(_CENTRE), torch.float32) if offset is None else offset)
    return b.cast(b.op("Clip", shifted, b.scalar(0.0, torch.float32), b.scalar(255.0, torch.float32)), torch.uint8)


def repeated(b: Builder, point: Value, count: Dim) -> Value:
    """One zero point for each row."""
    key = ("points", point.name, count)
    if key not in b.memo:
        b.memo[key] = b.op("Expand", point, b.shape([count]))
    value: Value = b.memo[key]
    return value


def _extreme(b: Builder, op_type: str, x: Value, fmt: Format) -> Value:
    """Greatest or least of each row [M, 1] or of everything [], times the share that the format keeps.

    The axis is counted from the front: ONNX Runtime reduces empty tensors wrongly along negative ones.
    """
    if fmt.granularity != "tok":
        found = Value(b.op(op_type, x, keepdims=0).name, x.dtype, ())
    else:
        found = Value(b.op(op_type, x, b.ints([1]), keepdims=1).name, x.dtype, (x.dims[0], 1))
    return found if fmt.clip == 100 else b.op("Mul", found, b.scalar(fmt.clip / 100, torch.float32))


def _symmetric(b: Builder, x: Value, fmt: Format) -> tuple[Value, None]:
    """absmax / qmax; tiny where all is zero."""
    top = b.op("Max", _extreme(b, "ReduceMax", x, fmt), b.op("Neg", _extreme(b, "ReduceMin", x, fmt)))
    step = b.op("Div", top, b.scalar(float(fmt.qmax), torch.float32))
    return b.op("Max", step, b.scalar(TINY, torch.float32)), None


def _affine(b: Builder, x: Value, fmt: Format) -> tuple[Value, Value]:
    """Scale and zero point of a range that includes zero."""
    zero, top = b.scalar(0.0, torch.float32), b.scalar(float(fmt.qmax), torch.float32)
    low = b.op("Min", _extreme(b, "ReduceMin", x, fmt), zero)
    high = b.op("Max", _extreme(b, "ReduceMax", x, fmt), zero)
    step = b.op("Max", b.op("Sub", b.op("Div", high, top), b.op("Div", low, top)), b.scalar(TINY, torch.float32))
    return step, b.op("Min", b.op("Round", b.op("Div", b.op("Neg", low), step)), top)


def _clipped(b: Builder, codes: Value, fmt: Format) -> Value:
    """Codes of fewer than 8 bits in their range: QuantizeLinear itself saturates at 8."""
    if fmt.clip == 100 and (fmt.bits == 8 or (fmt.dynamic and not fmt.has_zero)):  # the greatest value decides a scale
        return codes
    centre = 0 if fmt.has_zero else _CENTRE
    return b.op("Clip", codes, b.const(centre + fmt.qmin, torch.uint8), b.const(centre + fmt.qmax, torch.uint8))


def _static(b: Builder, x: Value, fmt: Format, scale: Value | None, zero: Value | None, smooth: Value | None) -> Codes:
    if scale is None or (fmt.has_zero and zero is None):
        raise NotImplementedError(f"static input format {fmt} without its scale")
    step = b.reshape(b.cast(scale, torch.float32), ())
    point = b.const(_CENTRE, torch.uint8) if zero is None else b.reshape(b.cast(zero, torch.uint8), ())
    if smooth is not None:  # a QuantizeLinear with a scale per channel is about five times slower
        x = b.op("Mul", x, b.op("Reciprocal", smooth))  # folded when the session is made
    codes = b.op("QuantizeLinear", x, step, point, dtype=torch.uint8)
    return Codes(_clipped(b, codes, fmt), step, point)


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
    values = b.op("Mul", values, q.rows if q.rows is not None else q.scale)
    return b.reshape(values, x.dims)


def _rounded_to(b: Builder, x: Value, fmt: Format) -> Value:
    return x if fmt.type == "f32" else b.cast(b.cast(x, fmt.code_dtype), torch.float32)
