"""Steps that several kernels share."""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds f32 to integers, half to even
_TINY = tl.constexpr(1.1754943508222875e-38)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_NORMAL = tl.constexpr(0.015625)  # 2^-6, the least normal number
_E4M3_SHIFT = tl.constexpr(16384.0)  # 2^14: f32 from here on has steps of 2^-9, as e4m3 has below its normal numbers


@triton.jit
def round_even(x):
    """f32 below 2^22 rounded to integers, half to even, as f32."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def is_nan(x):
    """Whether f32 values are NaN."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def greater(x, y):
    """The greater of two f32, NaN where one is: what `tl.maximum` and `tl.max` pass over on a GPU."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greatest(x, AXIS: tl.constexpr):
    """The greatest of f32 values that are not negative, NaN where one of them is: its bits are the greatest, too."""
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), AXIS).to(tl.float32, bitcast=True)


@triton.jit
def extremes(x, AXIS: tl.constexpr):
    """The least and the greatest of f32 values and zero; both NaN where one of them is."""
    return -greatest(greater(-x, 0.0), AXIS), greatest(greater(x, 0.0), AXIS)


@triton.jit
def guarded(scale):
    """1 where a scale is zero or subnormal."""
    return tl.where(scale < _TINY, 1.0, scale)


@triton.jit
def codes_of(x, scale, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Integers of x / scale as f32, saturated; true division, as the reference has it."""
    steps = tl.div_rn(x, scale)
    return round_even(tl.minimum(tl.maximum(steps, QMIN), QMAX))


@triton.jit
def e4m3_of(x, BY_HAND: tl.constexpr):
    """f32 to the bits of e4m3 (uint8): half to even, saturated at 448, NaN kept.

    BY_HAND: by arithmetic on the bits, where there is no instruction, and in the interpreter, whose cast is wrong.
    """
    held = tl.minimum(tl.maximum(x, -_E4M3_MAX), _E4M3_MAX)
    nan = is_nan(x)
    if BY_HAND:
        bits = held.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # 20 of 23 bits of the mantissa go; half of the last kept step, less one where that is even, carries over
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # 127 - 7: the exponents' biases
        small = (tl.abs(held) + _E4M3_SHIFT).to(tl.uint32, bitcast=True) & 0xFF
        found = tl.where(tl.abs(held) < _E4M3_NORMAL, small, normal) | ((bits >> 24) & 0x80)
        codes = tl.where(nan, 0x7F, found).to(tl.uint8)
    else:
        codes = tl.where(nan, x, held).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return codes


@triton.jit
def f16_of_e4m3(bits):
    """Bits of e4m3 (uint8) to their value / 256 as f16, exactly: the exponents' biases are 7 and 15."""
    wide = bits.to(tl.uint16)
    return (((wide & 0x7F) << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)
