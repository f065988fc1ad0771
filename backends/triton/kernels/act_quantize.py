"""Rows to codes: as they are, or an activation function of them, perhaps gated, rounded before."""

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

SILU = tl.constexpr(0)
GELU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
QUICK_GELU = tl.constexpr(3)
PLAIN = tl.constexpr(4)  # x itself


@triton.jit
def _sigmoid(x, BY_HAND: tl.constexpr):
    """1 / (1 + 2^(-x log2 e)) by the approximations of a GPU, relative error about 2^-21. BY_HAND: without them."""
    if BY_HAND:
        y = 1.0 / (1.0 + tl.exp(tl.minimum(-x, 87.0)))  # beyond lies infinity, of which the interpreter warns
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return y


@triton.jit
def activated(x, ACT: tl.constexpr, BY_HAND: tl.constexpr):
    """The activation function ACT of x, f32."""
    if ACT == SILU:
        y = x * _sigmoid(x, BY_HAND)
    elif ACT == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == QUICK_GELU:
        y = x * _sigmoid(1.702 * x, BY_HAND)
    else:  # 0.5 (1 + tanh u) = sigmoid(2 u)
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), BY_HAND)
    return y


@triton.jit
def _acted(x_ptr, up_ptr, row, column, live, x_stride, up_stride, ACT: tl.constexpr, BY_HAND: tl.constexpr):
    """act(x) * up, each rounded to x's type as two operators have it, as f32 [R, B]; zero beyond the row."""
    to: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    y = x
    if ACT != PLAIN:
        y = rounded_to(activated(x, ACT, BY_HAND), to, BY_HAND)
    if up_ptr is not None:
        up = tl.load(up_ptr + row * up_stride + column, mask=live, other=0.0).to(tl.float32)
        y = rounded_to(y * up, to, BY_HAND)
    return y


@triton.jit
def _kept(x_ptr, up_ptr, act_ptr, row, column, m, k, x_stride, up_stride, ACT: tl.constexpr, BY_HAND: tl.constexpr):
    """The result of `_acted`, stored at act_ptr where there is one."""
    live = (row < m) & (column < k)
    y = _acted(x_ptr, up_ptr, row, column, live, x_stride, up_stride, ACT, BY_HAND)
    if act_ptr is not None:
        tl.store(act_ptr + row * k + column, y.to(x_ptr.dtype.element_ty), mask=live)
    return y


@triton.jit(do_not_specialize_on_alignment=["m"])
def act_quantize(x_ptr, up_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr, zero_ptr, act_ptr, m, k,
                 width, x_stride, up_stride, ACT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
                 CLIP: tl.constexpr, SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr,
                 BY_HAND: tl.constexpr, TWICE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 PARTS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Tiles of ROWS whole rows of x and up [m, k]. act_ptr: where the float result is kept, or None.

    A row lies in PARTS (1 or 3) of BLOCK columns, k <= BLOCK * PARTS.
    """
    wait_for_earlier(EARLY)
    column = tl.arange(0, BLOCK)[None, :]
    for tile in tl.range(tl.program_id(0), tl.cdiv(m, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        y = _kept(x_ptr, up_ptr, act_ptr, row, column, m, k, x_stride, up_stride, ACT, BY_HAND)
        y1, y2 = y, y
        if PARTS == 3:
            y1 = _kept(x_ptr, up_ptr, act_ptr, row, column + BLOCK, m, k, x_stride, up_stride, ACT, BY_HAND)
            y2 = _kept(x_ptr, up_ptr, act_ptr, row, column + 2 * BLOCK, m, k, x_stride, up_stride, ACT, BY_HAND)
        encode_rows(y, y1, y2, codes_ptr, scale_ptr, zero_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k,
                    width, QMIN, QMAX, CLIP, SHIFT, SIGNED, FP8, BY_HAND, TWICE, BLOCK, PARTS)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["m"])
def act_quantize_long(x_ptr, up_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, codes_ptr, scale_ptr, zero_ptr, act_ptr, m, k,
                      width, x_stride, up_stride, ACT: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
                      CLIP: tl.constexpr, SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr,
                      BY_HAND: tl.constexpr, TWICE: tl.constexpr, BLOCK: tl.constexpr,
                      EARLY: tl.constexpr = False):  # fmt: skip
    """The same for rows that no program holds: one a program, walked through in blocks twice."""
    wait_for_earlier(EARLY)
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
            y = _acted(x_ptr, up_ptr, row, start + at, live, x_stride, up_stride, ACT, BY_HAND)
            y = smoothed(y, smooth_ptr, start + at, live, BY_HAND)
            store_codes(y, scale, zero, codes_ptr, row, start + at, m, k, width, QMIN, QMAX, SHIFT, SIGNED, FP8,
                        BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
        tl.store(scale_ptr + row, scale)
        if zero_ptr is not None:
            tl.store(zero_ptr + row, zero.to(tl.uint8))
