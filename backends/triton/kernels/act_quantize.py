"""Rows to codes: as they are, or an activation function of them, perhaps gated, rounded before."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.row_codes import (
    encode_given,
    encode_rows,
    rounded_to,
    row_extremes,
    row_scale,
    smoothed,
    store_codes,
)

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
QUICK_GELU = tl.constexpr(3)
PLAIN = tl.constexpr(4)  # x itself


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 87.0)))  # beyond lies infinity, of which the interpreter warns


@triton.jit
def activated(x, ACT: tl.constexpr):
    """The activation function ACT of x, f32."""
    if ACT == SILU:
        y = x * _sigmoid(x)
    elif ACT == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == QUICK_GELU:
        y = x * _sigmoid(1.702 * x)
    else:  # 0.5 (1 + tanh u) = sigmoid(2 u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def _acted(x_ptr, up_ptr, row, column, live, x_stride, up_stride, ACT: tl.constexpr, BY_HAND: tl.constexpr):
    """act(x) * up, each rounded to x's type as two operators have it, as f32 [R, B]; zero beyond the row."""
    to: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    y = x
    if ACT != PLAIN:
        y = rounded_to(activated(x, ACT), to, BY_HAND)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
        y = rounded_to(y * up, to, BY_HAND)
    return y


@triton.jit
def act_quantize(x_ptr, up_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr, zero_ptr, act_ptr, m, k,
                 width, x_stride, up_stride, ACT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
                 CLIP: tl.constexpr, SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr,
                 BY_HAND: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Tiles of ROWS whole rows of x and up [m, k], k <= BLOCK. act_ptr: where the float result is kept, or None."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < k
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        live = (row < m) & inside
        y = _acted(x_ptr, up_ptr, row, column, live, x_stride, up_stride, ACT, BY_HAND)
        if act_ptr is not None:
            tl.store(act_ptr + row * k + column, y.to(x_ptr.dtype.element_ty), mask=live)
        encode_rows(y, codes_ptr, scale_ptr, zero_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k, width,
                    QMIN, QMAX, CLIP, SHIFT, SIGNED, FP8, BY_HAND, TWICE)  # fmt: skip


@triton.jit
def act_quantize_long(x_ptr, up_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr, zero_ptr, act_ptr, m, k,
                      width, x_stride, up_stride, ACT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
                      CLIP: tl.constexpr, SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr,
                      BY_HAND: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The same for rows that no program holds: one a program, walked through in blocks twice."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    low = tl.zeros([1], tl.float32)
    high = tl.zeros([1], tl.float32)
    for start in tl.range(0, width, BLOCK):
        live = start + at < k
        y = _acted(x_ptr, up_ptr, row, start + at, live, x_stride, up_stride, ACT, BY_HAND)
        if act_ptr is not None:
            tl.store(act_ptr + row * k + start + at, y.to(x_ptr.dtype.element_ty), mask=live)
        if x_scale_ptr is not None:
            encode_given(y, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, start + at, live,
                         start + at < width, live, width, QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND)  # fmt: skip
        else:
            least, greatest = row_extremes(smoothed(y, smooth_ptr, start + at, live, BY_HAND), SIGNED)
            low, high = tl.minimum(low, least), tl.maximum(high, greatest)
    if x_scale_ptr is None:
        scale, zero = row_scale(low, high, QMAX, CLIP, SIGNED)
        scale, zero = scale[:, None], zero[:, None]
        for start in tl.range(0, width, BLOCK):
            live = start + at < k
            y = _acted(x_ptr, up_ptr, row, start + at, live, x_stride, up_stride, ACT, BY_HAND)
            y = smoothed(y, smooth_ptr, start + at, live, BY_HAND)
            store_codes(y, scale, zero, codes_ptr, row, start + at, live, start + at < width, width,
                        QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
        tl.store(scale_ptr + row, scale)
        if zero_ptr is not None:
            tl.store(zero_ptr + row, zero.to(tl.uint8))
