"""Rows of floats to 8-bit codes: scales of a row, of the whole tensor, of groups of a row, or known before."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import affine_codes_of, codes_of, e4m3_of, guarded, round_even


@triton.jit
def load_row(x_ptr, smooth_ptr, row, k, stride, BLOCK: tl.constexpr):
    """Row of x [M, k] as f32 [BLOCK], divided by smooth [k]; zero from k on."""
    column = tl.arange(0, BLOCK)
    inside = column < k
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        x = tl.div_rn(x, tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32))
    return x


@triton.jit
def params_of(low, high, CLIP: tl.constexpr, QMAX: tl.constexpr, AFFINE: tl.constexpr):
    """Scale and zero point (f32, a whole number) of values in [low, high] (f32 scalars), CLIP of which are kept."""
    low = tl.minimum(low * CLIP, 0.0)
    high = tl.maximum(high * CLIP, 0.0)
    greatest = tl.full([], QMAX, tl.float32)
    if AFFINE:
        scale = guarded(tl.div_rn(high, greatest) - tl.div_rn(low, greatest))
        zero = tl.minimum(tl.maximum(round_even(tl.div_rn(-low, scale)), 0.0), QMAX)
    else:
        scale = guarded(tl.div_rn(tl.maximum(-low, high), greatest))
        zero = tl.full([], 0.0, tl.float32)
    return scale, zero


@triton.jit
def quantize_rows(x_ptr, smooth_ptr, codes_ptr, scale_ptr, zero_ptr, k, stride, width, CLIP: tl.constexpr,
                  QMAX: tl.constexpr, QMIN: tl.constexpr, SHIFT: tl.constexpr, AFFINE: tl.constexpr,
                  FLOAT: tl.constexpr, STATIC: tl.constexpr, BY_HAND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program a row: x [M, k] -> codes [M, width], int8 less SHIFT, or the bits of e4m3 (FLOAT); zero behind k.

    STATIC: scale f32 [1] and zero uint8 [1] are read, and with smooth f32 [k] the scale of a column is scale * smooth.
    Else they are found from the row and written, scale f32 [M], zero uint8 [M].
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    if STATIC:
        x = load_row(x_ptr, None, row, k, stride, BLOCK)
        scale = tl.load(scale_ptr)
        zero = tl.load(zero_ptr).to(tl.float32) if AFFINE else 0.0
        if smooth_ptr is not None:
            scale = scale * tl.load(smooth_ptr + column, mask=column < k, other=1.0).to(tl.float32)
    else:
        x = load_row(x_ptr, smooth_ptr, row, k, stride, BLOCK)
        scale, zero = params_of(tl.min(x, axis=0), tl.max(x, axis=0), CLIP, QMAX, AFFINE)
        tl.store(scale_ptr + row, scale)
        if AFFINE:
            tl.store(zero_ptr + row, zero.to(tl.uint8))
    if FLOAT:
        codes = e4m3_of(tl.div_rn(x, scale), BY_HAND)
    elif AFFINE:
        codes = (affine_codes_of(x, scale, zero, QMAX) - SHIFT).to(tl.int8)
    else:
        codes = codes_of(x, scale, QMIN, QMAX).to(tl.int8)
    codes = tl.where(column < k, codes, tl.zeros_like(codes))
    tl.store(codes_ptr + row * width + column, codes, mask=column < width)


@triton.jit
def row_ranges(x_ptr, smooth_ptr, low_ptr, high_ptr, k, stride, BLOCK: tl.constexpr):
    """One program a row: least and greatest value of x [M, k] / smooth with zero among them, f32 [M]."""
    row = tl.program_id(0).to(tl.int64)
    x = load_row(x_ptr, smooth_ptr, row, k, stride, BLOCK)
    tl.store(low_ptr + row, tl.minimum(tl.min(x, axis=0), 0.0))
    tl.store(high_ptr + row, tl.maximum(tl.max(x, axis=0), 0.0))


@triton.jit
def tensor_params(low_ptr, high_ptr, scale_ptr, zero_ptr, m, CLIP: tl.constexpr, QMAX: tl.constexpr,
                  AFFINE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: the ranges of rows, f32 [m], to the scale f32 [1] and zero point uint8 [1] of all."""
    least = tl.zeros([BLOCK], tl.float32)
    greatest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        least = tl.minimum(least, tl.load(low_ptr + row, mask=row < m, other=0.0))
        greatest = tl.maximum(greatest, tl.load(high_ptr + row, mask=row < m, other=0.0))
    scale, zero = params_of(tl.min(least, axis=0), tl.max(greatest, axis=0), CLIP, QMAX, AFFINE)
    tl.store(scale_ptr, scale)
    if AFFINE:
        tl.store(zero_ptr, zero.to(tl.uint8))


@triton.jit
def quantize_groups(x_ptr, smooth_ptr, codes_ptr, scale_ptr, k, stride, width, groups, QMAX: tl.constexpr,
                    BY_HAND: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program a row and BLOCK groups: x [M, k] -> bits of e4m3 [M, width], scale f32 [M, groups]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = column < k
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        x = tl.div_rn(x, tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32))
    greatest = tl.max(tl.abs(x), axis=1)
    scale = guarded(tl.div_rn(greatest, tl.full([BLOCK], QMAX, tl.float32)))
    codes = e4m3_of(tl.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK, GROUP])), BY_HAND)
    tl.store(codes_ptr + row * width + column, tl.where(inside, codes, tl.zeros_like(codes)), mask=column < width)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
