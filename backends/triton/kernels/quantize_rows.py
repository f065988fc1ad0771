"""Rows of floats to 8-bit codes with one scale each, found from the row."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import codes_of, guarded


@triton.jit
def quantize_rows(x_ptr, smooth_ptr, codes_ptr, scale_ptr, k, stride, QMAX: tl.constexpr, QMIN: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """One program a row: x [M, k] -> codes [M, k] of codes_ptr's type, scale f32 [M] = max |x / smooth| / QMAX."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    if smooth_ptr is not None:
        x = tl.div_rn(x, tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32))
    scale = guarded(tl.max(tl.abs(x), axis=0) / QMAX)
    to = codes_ptr.dtype.element_ty
    if to == tl.int8:
        codes = codes_of(x, scale, QMIN, QMAX).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(tl.div_rn(x, scale), QMIN), QMAX).to(to)
    tl.store(codes_ptr + row * k + column, codes, mask=inside)
    tl.store(scale_ptr + row, scale)
