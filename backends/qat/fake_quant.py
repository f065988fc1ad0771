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
from qfx.numerics import dequantize, effective_scale, join, quantize, run_time_qparams, split, spread


def fake_quantize(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None, *, factor: float = 1.0) -> Tensor:
    """x, any floating dtype, as it comes back from `fmt`; in x.dtype, differentiable in x, scale and zero.

    scale: f32 factor of the codes (`numerics.effective_scale`, whatever type they are stored in), of
    `fmt.scale_shape`. zero: whole f32 numbers of the same shape for affine formats, else None. factor: k above.
    """
    found: Tensor = _FakeQuantize.apply(x, scale, zero, _unscaled(fmt), factor)  # type: ignore[no-untyped-call]
    return found


def fake_quantize_run_time(x: Tensor, fmt: Format) -> Tensor:
    """x as a format whose scale is found at run time (`i8/tok`, `u8/dyn`, ...) gives it back; scales get none."""
    with torch.no_grad():
        scale, zero = run_time_qparams(x, fmt)
        scale = effective_scale(scale, zero, fmt)
    return fake_quantize(x, fmt, scale, zero if fmt.has_zero else None)


def fake_cast(x: Tensor, fmt: Format) -> Tensor:
    """x as a plain format (f16, bf16, f32) gives it back, with the gradient of the identity."""
    assert fmt.is_plain, fmt
    return x.to(fmt.code_dtype).to(x.dtype)


def gradient_factor(elements: int, fmt: Format) -> float:
    """LSQ's gradient scale 1 / sqrt(n qmax) for a scale that `elements` values share."""
    return 1.0 / math.sqrt(max(1, elements) * fmt.qmax)


def _unscaled(fmt: Format) -> Format:
    """The format with its scales as plain f32 numbers."""
    return Format(fmt.type, fmt.granularity, dynamic=fmt.dynamic)


class _FakeQuantize(torch.autograd.Function):
    """See the module. The result is kept for the backward: the product that reads it keeps it as well."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, factor: float) -> Tensor:
        return dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero, x.dtype)

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
