"""RMSNorm and LayerNorm, of x or of a sum, whose rounded result goes straight to codes."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.rounding import greater
from qfx.backends.triton.kernels.row_codes import (
    encode_given,
    encode_rows,
    rounded_to,
    row_extremes,
    row_scale,
    smoothed,
    store_codes,
)


@triton.jit
def _summed(x_ptr, residual_ptr, row, column, live, x_stride, residual_stride, BY_HAND: tl.constexpr):
    """x, or x + residual rounded to x's type, as f32 [R, B]; zero beyond the row."""
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=live, other=0.0).to(tl.float32)
        x = rounded_to(x + residual, x_ptr.dtype.element_ty, BY_HAND)
    return x


@triton.jit
def _kept_sum(x_ptr, residual_ptr, sum_ptr, row, column, m, k, x_stride, residual_stride, BY_HAND: tl.constexpr):
    """The sum of `_summed`, stored at sum_ptr where there is one."""
    live = (row < m) & (column < k)
    x = _summed(x_ptr, residual_ptr, row, column, live, x_stride, residual_stride, BY_HAND)
    if sum_ptr is not None:
        tl.store(sum_ptr + row * k + column, x.to(x_ptr.dtype.element_ty), mask=live)
    return x


@triton.jit
def _kept_norm(y, x_ptr, norm_ptr, row, column, m, k, BY_HAND: tl.constexpr):
    """y rounded to x's type, stored at norm_ptr where there is one."""
    y = rounded_to(y, x_ptr.dtype.element_ty, BY_HAND)
    if norm_ptr is not None:
        tl.store(norm_ptr + row * k + column, y.to(x_ptr.dtype.element_ty), mask=(row < m) & (column < k))
    return y


@triton.jit
def _gains(weight_ptr, bias_ptr, column, inside):
    """weight and bias [1, B] as f32; ones and zeros where there are none, zeros beyond the row."""
    weight = tl.where(inside, 1.0, 0.0)
    bias = tl.zeros_like(weight)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit(do_not_specialize_on_alignment=["m"])
def norm_quantize(x_ptr, residual_ptr, weight_ptr, bias_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr,
                  zero_ptr, norm_ptr, sum_ptr, m, k, width, x_stride, residual_stride, eps, LAYER: tl.constexpr,
                  QMIN: tl.constexpr, QMAX: tl.constexpr, CLIP: tl.constexpr, SHIFT: tl.constexpr,
                  SIGNED: tl.constexpr, FP8: tl.constexpr, BY_HAND: tl.constexpr, TWICE: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr,
                  EARLY: tl.constexpr = False):  # fmt: skip
    """Tiles of ROWS whole rows of x [m, k], one after the other; weight and bias are read once.

    A row lies in PARTS (1 or 3) of BLOCK columns, k <= BLOCK * PARTS. norm_ptr, sum_ptr: where the norm's result and
    the sum are kept in float as well, or None.
    """
    wait_for_earlier(EARLY)
    column = tl.arange(0, BLOCK)[None, :]
    weight, bias = _gains(weight_ptr, bias_ptr, column, column < k)
    if PARTS == 3:
        weight1, bias1 = _gains(weight_ptr, bias_ptr, column + BLOCK, column + BLOCK < k)
        weight2, bias2 = _gains(weight_ptr, bias_ptr, column + 2 * BLOCK, column + 2 * BLOCK < k)
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        x = _kept_sum(x_ptr, residual_ptr, sum_ptr, row, column, m, k, x_stride, residual_stride, BY_HAND)
        total = tl.sum(x, axis=1)
        if PARTS == 3:
            x1 = _kept_sum(x_ptr, residual_ptr, sum_ptr, row, column + BLOCK, m, k, x_stride, residual_stride, BY_HAND)
            x2 = _kept_sum(x_ptr, residual_ptr, sum_ptr, row, column + 2 * BLOCK, m, k, x_stride, residual_stride,
                           BY_HAND)  # fmt: skip
            total += tl.sum(x1, axis=1) + tl.sum(x2, axis=1)
        if LAYER:
            mean = (total / k)[:, None]
            x = tl.where(column < k, x - mean, 0.0)
            if PARTS == 3:
                x1 = tl.where(column + BLOCK < k, x1 - mean, 0.0)
                x2 = tl.where(column + 2 * BLOCK < k, x2 - mean, 0.0)
        square = tl.sum(x * x, axis=1)
        if PARTS == 3:
            square += tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)
        rstd = tl.rsqrt(square / k + eps)[:, None]
        y = _kept_norm(x * rstd * weight + bias, x_ptr, norm_ptr, row, column, m, k, BY_HAND)
        y1, y2 = y, y
        if PARTS == 3:
            y1 = _kept_norm(x1 * rstd * weight1 + bias1, x_ptr, norm_ptr, row, column + BLOCK, m, k, BY_HAND)
            y2 = _kept_norm(x2 * rstd * weight2 + bias2, x_ptr, norm_ptr, row, column + 2 * BLOCK, m, k, BY_HAND)
        encode_rows(y, y1, y2, codes_ptr, scale_ptr, zero_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k,
                    width, QMIN, QMAX, CLIP, SHIFT, SIGNED, FP8, BY_HAND, TWICE, BLOCK, PARTS)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["m"])
def norm_quantize_long(x_ptr, residual_ptr, weight_ptr, bias_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr,
                       scale_ptr, zero_ptr, norm_ptr, sum_ptr, m, k, width, x_stride, residual_stride, eps,
                       LAYER: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, CLIP: tl.constexpr,
                       SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr, BY_HAND: tl.constexpr,
                       TWICE: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """The same for rows that no program holds: one a program, walked through in blocks once for each statistic."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    to: tl.constexpr = x_ptr.dtype.element_ty
    at = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    for start in tl.range(0, width, BLOCK):
        live = start + at < k
        x = _summed(x_ptr, residual_ptr, row, start + at, live, x_stride, residual_stride, BY_HAND)
        if sum_ptr is not None:
            tl.store(sum_ptr + row * k + start + at, x.to(to), mask=live)
        total += x if LAYER else x * x
    mean = 0.0
    if LAYER:
        mean = (tl.sum(total, axis=1) / k)[:, None]
        total = tl.zeros([1, BLOCK], tl.float32)
        for start in tl.range(0, width, BLOCK):
            live = start + at < k
            x = _summed(x_ptr, residual_ptr, row, start + at, live, x_stride, residual_stride, BY_HAND)
            x = tl.where(live, x - mean, 0.0)
            total += x * x
    rstd = tl.rsqrt(tl.sum(total, axis=1) / k + eps)[:, None]
    low = tl.zeros([1], tl.float32)
    high = tl.zeros([1], tl.float32)
    for start in tl.range(0, width, BLOCK):
        live = start + at < k
        weight, bias = _gains(weight_ptr, bias_ptr, start + at, live)
        x = _summed(x_ptr, residual_ptr, row, start + at, live, x_stride, residual_stride, BY_HAND)
        y = rounded_to((x - mean) * rstd * weight + bias, to, BY_HAND)
        if norm_ptr is not None:
            tl.store(norm_ptr + row * k + start + at, y.to(to), mask=live)
        if x_scale_ptr is not None:
            encode_given(y, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, start + at, m, k, width,
                         QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND)  # fmt: skip
        else:
            least, most = row_extremes(smoothed(y, smooth_ptr, start + at, live, BY_HAND), SIGNED)
            low, high = tl.minimum(low, least), greater(high, most)
    if x_scale_ptr is None:
        scale, zero = row_scale(low, high, QMAX, CLIP, SIGNED)
        scale, zero = scale[:, None], zero[:, None]
        for start in tl.range(0, width, BLOCK):
            live = start + at < k
            weight, bias = _gains(weight_ptr, bias_ptr, start + at, live)
            x = _summed(x_ptr, residual_ptr, row, start + at, live, x_stride, residual_stride, BY_HAND)
            y = rounded_to((x - mean) * rstd * weight + bias, to, BY_HAND)
            y = smoothed(y, smooth_ptr, start + at, live, BY_HAND)
            store_codes(y, scale, zero, codes_ptr, row, start + at, m, k, width, QMIN, QMAX, SHIFT, SIGNED, FP8,
                        BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
        tl.store(scale_ptr + row, scale)
        if zero_ptr is not None:
            tl.store(zero_ptr + row, zero.to(tl.uint8))
