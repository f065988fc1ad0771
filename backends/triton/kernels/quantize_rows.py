"""Floats to 8-bit codes: scales of the whole tensor and of groups of a row. For those of rows see `act_quantize`."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import e4m3_of, extremes, greater, greatest, guarded
from qfx.backends.triton.kernels.row_codes import row_scale


@triton.jit
def row_ranges(x_ptr, smooth_ptr, low_ptr, high_ptr, k, stride, BLOCK: tl.constexpr):
    """One program a row: least and greatest value of x [M, k] / smooth with zero among them, f32 [M]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=column < k, other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        x = tl.div_rn(x, tl.load(smooth_ptr + column, mask=column < k, other=1.0).to(tl.float32))
    low, high = extremes(x, 0)
    tl.store(low_ptr + row, low)
    tl.store(high_ptr + row, high)


@triton.jit(do_not_specialize_on_alignment=["m"])
def tensor_params(low_ptr, high_ptr, scale_ptr, zero_ptr, m, CLIP: tl.constexpr, QMAX: tl.constexpr,
                  SIGNED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One program: the ranges of rows, f32 [m], to the scale f32 [1] and zero point uint8 [1] of all."""
    least = tl.zeros([1, BLOCK], tl.float32)
    most = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)[None, :]
        least = tl.minimum(least, tl.load(low_ptr + row, mask=row < m, other=0.0))
        most = greater(most, tl.load(high_ptr + row, mask=row < m, other=0.0))
    if SIGNED:
        most = greater(-least, most)
    scale, zero = row_scale(tl.min(least, axis=1), greatest(most, 1), QMAX, CLIP, SIGNED)
    tl.store(scale_ptr + tl.arange(0, 1), scale)
    if not SIGNED:
        tl.store(zero_ptr + tl.arange(0, 1), zero.to(tl.uint8))


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
    scale = guarded(tl.div_rn(greatest(x, 1), tl.full([BLOCK], QMAX, tl.float32)))
    codes = e4m3_of(tl.div_rn(x, tl.broadcast_to(scale[:, None], [BLOCK, GROUP])), BY_HAND)
    tl.store(codes_ptr + row * width + column, tl.where(inside, codes, tl.zeros_like(codes)), mask=column < width)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
