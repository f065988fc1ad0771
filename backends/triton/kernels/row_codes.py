"""Tiles of rows [R, B] in f32 to codes with a scale for each row, as `qfx.numerics` has them. No kernel of its own."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import e4m3_of, extremes, greater, greatest, guarded, round_even

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: the low bits of n + _MAGIC are those of the integer n, rounded to even
_MAGIC_BITS = tl.constexpr(0x4B400000)


@triton.jit
def rounded_to(x, to: tl.constexpr, BY_HAND: tl.constexpr):
    """f32 rounded to the float type `to`, half to even, and back. BY_HAND: on the bits, where a cast to bf16 cuts."""
    if to != tl.float32:
        if BY_HAND and to == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        else:
            x = x.to(to).to(tl.float32)
    return x


@triton.jit
def row_extremes(x, SIGNED: tl.constexpr):
    """Least and greatest value of each row [R] and zero; where SIGNED the greatest magnitude in place of both.

    The greatest of a row that holds NaN is NaN, so that its scale is, and with it every product of the row.
    """
    if SIGNED:
        high = greatest(x, 1)
        low = high
    else:
        low, high = extremes(x, 1)
    return low, high


@triton.jit
def row_scale(low, high, QMAX: tl.constexpr, CLIP: tl.constexpr, SIGNED: tl.constexpr):
    """Scale [R], and zero point [R] as f32 (zeros where SIGNED), of rows with these extremes. CLIP: their share."""
    low, high = low * CLIP, high * CLIP
    reach = tl.zeros_like(high) + QMAX
    if SIGNED:
        scale = guarded(tl.div_rn(high, reach))
        zero = tl.zeros_like(high)
    else:
        scale = guarded(tl.div_rn(high, reach) - tl.div_rn(low, reach))
        zero = round_even(tl.minimum(tl.div_rn(-low, scale), reach))
    return scale, zero


@triton.jit
def inverse_of(divisor):
    """1 / divisor rounded to nearest, of normal f32, by a GPU's approximation and two corrections."""
    asm: tl.constexpr = "rcp.approx.ftz.f32 $0, $1;"
    y = tl.inline_asm_elementwise(asm, "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1)
    one = tl.full(divisor.shape, 1.0, tl.float32)
    y = tl.fma(tl.fma(-y, divisor, one), y, y)
    return tl.fma(tl.fma(-y, divisor, one), y, y)


@triton.jit
def quotient(x, divisor, BY_HAND: tl.constexpr, TWICE: tl.constexpr):
    """x [R, B] / divisor (which broadcasts), as division rounded to nearest has it, for 3 or 5 operations a value.

    P. W. Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990: with the
    reciprocal y rounded to nearest and q within one unit in the last place, q + (x - q * divisor) * y, each step fused,
    is the rounded quotient. x * y may be off by one and a half; TWICE corrects it twice, and nothing is left. Once
    leaves only quotients next to the middle of two floats. That is no matter for x that are f16 or bf16: where such a
    middle is next to half an integer (of at most 9 bits), x would have more bits than these types. BY_HAND: division
    itself, where multiplication and addition are not fused.
    """
    wide = tl.broadcast_to(divisor, x.shape)
    if BY_HAND:
        q = tl.div_rn(x, wide)
    else:
        inverse = tl.broadcast_to(inverse_of(divisor), x.shape)
        q = x * inverse
        q = tl.fma(tl.fma(-q, wide, x), inverse, q)
        if TWICE:
            q = tl.fma(tl.fma(-q, wide, x), inverse, q)
    return q


@triton.jit
def store_codes(x, scale, zero, codes_ptr, row, column, m, k, width, QMIN: tl.constexpr, QMAX: tl.constexpr,
                SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr, BY_HAND: tl.constexpr,
                TWICE: tl.constexpr, WITHIN: tl.constexpr):  # fmt: skip
    """Store codes of x [R, B]: int8 less SHIFT, or the bits of e4m3 where FP8 is not 0 (1 by instruction, 2 by hand).

    scale and zero broadcast against x. m, k: rows and columns that exist, x is zero elsewhere; width: columns that are
    stored, as zero where they do not exist.
    BY_HAND, TWICE: see `quotient`. WITHIN: the scale is that of x's greatest value, so that nothing saturates.
    """
    steps = quotient(x, scale, BY_HAND, TWICE)
    if FP8 == 1:
        codes = steps.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # the instruction saturates
    elif FP8:
        codes = e4m3_of(steps, True)
    else:
        if not WITHIN:
            steps = tl.minimum(tl.maximum(steps, QMIN if SIGNED else -QMAX), QMAX)
        codes = (steps + _MAGIC).to(tl.int32, bitcast=True)
        if not SIGNED:
            codes = codes - _MAGIC_BITS + (tl.broadcast_to(zero, x.shape).to(tl.int32))
            codes = tl.minimum(tl.maximum(codes, QMIN), QMAX) - SHIFT
        codes = (codes & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)
    if not SIGNED:  # else zeros give zeros
        codes = tl.where(column < k, codes, tl.zeros_like(codes))
    tl.store(codes_ptr + row * width + column, codes, mask=(row < m) & (column < width))


@triton.jit
def given(scale_ptr, zero_ptr):
    """A static scale and zero point as f32 scalars."""
    zero = 0.0
    if zero_ptr is not None:
        zero = tl.load(zero_ptr).to(tl.float32)
    return tl.load(scale_ptr).to(tl.float32), zero


@triton.jit
def smoothed(x, smooth_ptr, column, inside, BY_HAND: tl.constexpr):
    """x [R, B] / smooth [B], as it is without one."""
    if smooth_ptr is not None:
        smooth = tl.load(smooth_ptr + column, mask=inside, other=1.0).to(tl.float32)
        x = quotient(x, smooth, BY_HAND, True)
    return x


@triton.jit
def encode_given(x, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k, width,
                 QMIN: tl.constexpr, QMAX: tl.constexpr, SHIFT: tl.constexpr, SIGNED: tl.constexpr, FP8: tl.constexpr,
                 BY_HAND: tl.constexpr):  # fmt: skip
    """Store codes of x [R, B] with a static scale, which smooth multiplies."""
    scale, zero = given(x_scale_ptr, x_zero_ptr)
    divisor = tl.full([1, 1], 1.0, tl.float32) * scale
    if smooth_ptr is not None:
        divisor = divisor * tl.load(smooth_ptr + column, mask=column < k, other=1.0).to(tl.float32)
    store_codes(x, divisor, zero, codes_ptr, row, column, m, k, width, QMIN, QMAX, SHIFT, SIGNED, FP8,
                BY_HAND, True, False)  # fmt: skip


@triton.jit
def encode_rows(x, x1, x2, codes_ptr, scale_ptr, zero_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k,
                width, QMIN: tl.constexpr, QMAX: tl.constexpr, CLIP: tl.constexpr, SHIFT: tl.constexpr,
                SIGNED: tl.constexpr, FP8: tl.constexpr, BY_HAND: tl.constexpr, TWICE: tl.constexpr,
                BLOCK: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Store codes of whole rows, zeros from column k on, and what was found: their scales and zero points.

    x, and where PARTS is 3 also x1 and x2, [R, BLOCK]: what lies side by side in a row. row int64 [R, 1]; column
    [1, BLOCK]: those of x; m, k: how many there are; width: of a row of codes.
    """
    if x_scale_ptr is not None:
        encode_given(x, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column, m, k, width,
                     QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND)  # fmt: skip
        if PARTS == 3:
            encode_given(x1, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column + BLOCK, m, k, width,
                         QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND)  # fmt: skip
            encode_given(x2, codes_ptr, smooth_ptr, x_scale_ptr, x_zero_ptr, row, column + 2 * BLOCK, m, k, width,
                         QMIN, QMAX, SHIFT, SIGNED, FP8, BY_HAND)  # fmt: skip
    else:
        x = smoothed(x, smooth_ptr, column, column < k, BY_HAND)
        low, high = row_extremes(x, SIGNED)
        if PARTS == 3:
            x1 = smoothed(x1, smooth_ptr, column + BLOCK, column + BLOCK < k, BY_HAND)
            x2 = smoothed(x2, smooth_ptr, column + 2 * BLOCK, column + 2 * BLOCK < k, BY_HAND)
            low1, high1 = row_extremes(x1, SIGNED)
            low2, high2 = row_extremes(x2, SIGNED)
            low = tl.minimum(low, tl.minimum(low1, low2))
            high = greater(high, greater(high1, high2))
        scale, zero = row_scale(low, high, QMAX, CLIP, SIGNED)
        scale, zero = scale[:, None], zero[:, None]
        store_codes(x, scale, zero, codes_ptr, row, column, m, k, width, QMIN, QMAX, SHIFT, SIGNED, FP8,
                    BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
        if PARTS == 3:
            store_codes(x1, scale, zero, codes_ptr, row, column + BLOCK, m, k, width, QMIN, QMAX, SHIFT, SIGNED, FP8,
                        BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
            store_codes(x2, scale, zero, codes_ptr, row, column + 2 * BLOCK, m, k, width, QMIN, QMAX, SHIFT, SIGNED,
                        FP8, BY_HAND, TWICE, CLIP == 1.0)  # fmt: skip
        tl.store(scale_ptr + row, scale, mask=row < m)
        if zero_ptr is not None:
            tl.store(zero_ptr + row, zero.to(tl.uint8), mask=row < m)
