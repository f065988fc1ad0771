"""Fake quantization: values as they come back from a format, and gradients that go straight through the rounding.

    y = dequantize(quantize(x))                     bit for bit what `qfx.numerics` gives

With v = y, s the scale, z the zero point and `inside` where x / s + z lies in the range of the codes:

    dL/dx = g where inside, else 0                              straight-through estimator, clipped (Bengio et al. 2013)
    dL/ds = k * sum g (v - x) / s  inside,  g v / s  outside    LSQ (Esser et al. 2020), equation 3
    dL/dz = k * sum -g s           outside                      LSQ+ (Bhalgat et al. 2020), for zero points in codes

summed over the elements that share a scale; k is LSQ's gradient scale 1 / sqrt(n qmax). Everything is made of plain
torch operations, so that AOTAutograd and Inductor fuse the forward as well as the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import cast, dequantize, effective_scale, join, quantize, run_time_qparams, split, spread


def fake_quantize(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
    """x, any floating dtype, as it comes back from `fmt`; in x.dtype, differentiable in x, scale and zero.

    scale: f32 factor of the codes (`numerics.effective_scale`, whatever type they are stored in), of
    `fmt.scale_shape`. zero: whole f32 numbers of the same shape for affine formats, else None. factor: k above.
    """
    found: Tensor = _FakeQuantize.apply(x, scale, zero, unscaled(fmt), factor)  # type: ignore[no-untyped-call]
    return found


def fake_quantize_run_time(x: Tensor, fmt: Format) -> Tensor:
    """x as a format whose scale is found at run time (`i8/tok`, `u8/dyn`, ...) gives it back; scales get none.

    Where such a scale spans all values, the gradient is that of the identity, and nothing is kept for the backward.
    """
    if _spans_all(fmt):
        found: Tensor = _RoundedAtRunTime.apply(x, fmt)  # type: ignore[no-untyped-call]
        return found
    with torch.no_grad():
        scale, zero = _run_time_scale(x, fmt)
    return fake_quantize(x, fmt, scale, zero)


def fake_cast(x: Tensor, fmt: Format) -> Tensor:
    """x as a plain format (f16, bf16, f32) gives it back, with the gradient of the identity."""
    assert fmt.is_plain, fmt
    return x.to(fmt.code_dtype).to(x.dtype)


def gradient_factor(elements: int, fmt: Format) -> float:
    """LSQ's gradient scale 1 / sqrt(n qmax) for a scale that `elements` values share."""
    return 1.0 / math.sqrt(max(1, elements) * fmt.qmax)


def unscaled(fmt: Format) -> Format:
    """The format with its scales as plain f32 numbers."""
    return Format(fmt.type, fmt.granularity, dynamic=fmt.dynamic)


def _spans_all(fmt: Format) -> bool:
    """A scale found at run time leaves no value beyond the codes but for the rounding of the scale itself."""
    return fmt.clip == 100 and fmt.scale_type in ("f32", "f16", "bf16")


def _run_time_scale(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """The f32 factor of the codes of x, and zero points in f32."""
    scale, zero = run_time_qparams(x, fmt)
    return effective_scale(scale, zero, fmt), zero.to(torch.float32) if fmt.has_zero and zero is not None else None


def _values(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """dequantize(quantize(x)), in x.dtype. Codes of integers stay f32 numbers, so that NaN stays NaN."""
    if not fmt.is_integer:
        return dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero, x.dtype)
    s = spread(scale, fmt)
    codes = torch.round(split(x.to(torch.float32), fmt) / s)
    if zero is None:
        codes = codes.clamp(fmt.qmin, fmt.qmax)
    else:
        z = spread(zero, fmt)
        codes = (codes + z).clamp(fmt.qmin, fmt.qmax) - z
    return cast(join(codes * s, fmt, x.shape), x.dtype)


class _RoundedAtRunTime(torch.autograd.Function):
    """Values of a format whose scales are those of x, with the gradient of the identity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, fmt: Format) -> Tensor:
        return _values(x, unscaled(fmt), *_run_time_scale(x, fmt))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _FakeQuantize(torch.autograd.Function):
    """See the module. The result is kept for the backward: the product that reads it keeps it as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, factor: float) -> Tensor:
        return _values(x, fmt, scale, zero)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero, ctx.fmt, ctx.factor = inputs
        ctx.save_for_backward(x, scale, zero, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero, y = ctx.saved_tensors
        fmt, factor = ctx.fmt, ctx.factor
        g, wide, s = split(grad.to(torch.float32), fmt), split(x.to(torch.float32), fmt), spread(scale, fmt)
        steps = wide / s
        if zero is not None:
            steps = steps + spread(zero, fmt)
        inside = (steps >= fmt.qmin) & (steps <= fmt.qmax)
        kept = torch.where(inside, g, 0.0)
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = join(kept, fmt, x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            each = g * split(y.to(torch.float32), fmt) - kept * wide
            grads[1] = factor * each.sum_to_size(s.shape).reshape(scale.shape) / scale
        if ctx.needs_input_grad[2]:
            grads[2] = factor * ((kept - g) * s).sum_to_size(s.shape).reshape(scale.shape)
        return tuple(grads)
