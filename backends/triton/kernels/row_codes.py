"""Tiles of rows [R, B] in f32 to codes with a scale for each row, as `qfx.numerics` has them. No kernel of its own."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import guarded, round_even


@triton.jit
def rounded_to(x, to: tl.constexpr, BY_HAND: tl.constexpr):
    """f32 rounded to the float type `to`, half to even, and back. BY_HAND: on the bits, where a cast to bf16 cuts."""
    if to == tl.float32:
        return x
    if BY_HAND and to == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True)
    return x.to(to).to(tl.float32)


@triton.jit
def row_extremes(x, SIGNED: tl.constexpr):
    """Least and greatest value of each row [R] and zero; where SIGNED the greatest magnitude in place of both."""
    if SIGNED:
        high = tl.max(tl.abs(x), axis=1)
        return high, high
    return tl.minimum(tl.min(x, axis=1), 0.0), tl.maximum(tl.max(x, axis=1), 0.0)


@triton.jit
def row_scale(low, high, QMAX: tl.constexpr, CLIP: tl.constexpr, SIGNED: tl.constexpr):
    """Scale [R], and zero point [R] as f32 (zeros where SIGNED), of rows with these extremes. CLIP: their share."""
    low, high = low * CLIP, high * CLIP
    reach = tl.zeros_like(high) + QMAX
    if SIGNED:
        return guarded(tl.div_rn(high, reach)), tl.zeros_like(high)
    scale = guarded(tl.div_rn(high, reach) - tl.div_rn(low, reach))
    zero = round_even(tl.minimum(tl.div_rn(-low, scale), reach))
    return scale, zero


@triton.jit
def e4m3_bits(x):
    """f32 of at most 448 as the bits of float8_e4m3fn (uint8), half to even: for devices without such a cast."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # exponents are biased by 127 and 7
    small = round_even(magnitude.to(tl.float32, bitcast=True) * 512.0).to(tl.uint32)  # steps of 2^-9 below 2^-6
    return (tl.where(magnitude < 0x3C800000, small, normal) | sign).to(tl.uint8)


@triton.jit
def row_codes(x, scale, zero, QMIN: tl.constexpr, QMAX: tl.constexpr, to: tl.constexpr, FLOAT8: tl.constexpr,
              SIGNED: tl.constexpr):  # fmt: skip
    """Codes of x [R, B] / scale, of the element type `to`; scale and zero broadcast against x.

    FLOAT8: codes are of float8_e4m3fn; where `to` is uint8 they are its bits.
    """
    steps = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    if FLOAT8:
        steps = tl.minimum(tl.maximum(steps, QMIN), QMAX)
        if to == tl.uint8:
            return e4m3_bits(steps)
        return steps.to(to)
    if SIGNED:
        return round_even(tl.minimum(tl.maximum(steps, QMIN), QMAX)).to(to)
    # The zero point is added after rounding, as the reference has it; bounds beyond those of the codes round exactly.
    steps = round_even(tl.minimum(tl.maximum(steps, -QMAX), QMAX)) + zero
    return tl.minimum(tl.maximum(steps, QMIN), QMAX).to(to)


@triton.jit
def given(scale_ptr, zero_ptr):
    """A static scale and zero point as f32 scalars."""
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    return tl.load(scale_ptr).to(tl.float32), zero


@triton.jit
def smoothed(x, smooth_ptr, column, inside):
    """x [R, B] / smooth [B], as it is without one."""
    if smooth_ptr is None:
        return x
    smooth = tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32)
    return tl.div_rn(x, tl.broadcast_to(smooth, x.shape))


@triton.jit
def encode_given(x, row, column, live, inside, k, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr,
                 QMIN: tl.constexpr, QMAX: tl.constexpr, FLOAT8: tl.constexpr, SIGNED: tl.constexpr):  # fmt: skip
    """Store codes of x [R, B] with a static scale, which smooth multiplies."""
    scale, zero = given(x_scale_ptr, x_zero_ptr)
    divisor = tl.zeros_like(x) + scale
    if smooth_ptr is not None:
        divisor = divisor * tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32)
    codes = row_codes(x, divisor, zero, QMIN, QMAX, codes_ptr.dtype.element_ty, FLOAT8, SIGNED)
    tl.store(codes_ptr + row * k + column, codes, mask=live)


@triton.jit
def encode_rows(x, row, column, live, inside, m, k, codes_ptr, scale_ptr, zero_ptr, smooth_ptr, x_scale_ptr,
                x_zero_ptr, QMIN: tl.constexpr, QMAX: tl.constexpr, CLIP: tl.constexpr, FLOAT8: tl.constexpr,
                SIGNED: tl.constexpr):  # fmt: skip
    """Store codes of whole rows x [R, B], zeros beyond column k, and what was found: their scales and zero points.

    row int64 [R, 1], column [1, B], live = which of them exist, inside = which columns do.
    """
    if x_scale_ptr is not None:
        encode_given(x, row, column, live, inside, k, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr,
                     QMIN, QMAX, FLOAT8, SIGNED)  # fmt: skip
    else:
        x = smoothed(x, smooth_ptr, column, inside)
        low, high = row_extremes(x, SIGNED)
        scale, zero = row_scale(low, high, QMAX, CLIP, SIGNED)
        scale, zero = scale[:, None], zero[:, None]
        codes = row_codes(x, scale, zero, QMIN, QMAX, codes_ptr.dtype.element_ty, FLOAT8, SIGNED)
        tl.store(codes_ptr + row * k + column, codes, mask=live)
        tl.store(scale_ptr + row, scale, mask=row < m)
        if zero_ptr is not None:
            tl.store(zero_ptr + row, zero.to(tl.uint8), mask=row < m)
