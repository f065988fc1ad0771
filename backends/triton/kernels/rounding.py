"""Steps that several kernels share."""

import triton
import triton.language as tl

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds f32 to integers, half to even
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def round_even(x):
    """f32 below 2^22 rounded to integers, half to even, as f32."""
    return (x + _MAGIC) - _MAGIC


@triton.jit
def guarded(scale):
    """1 where a scale is zero or subnormal."""
    return tl.where(scale < _TINY, 1.0, scale)


@triton.jit
def codes_of(x, scale, QMIN: tl.constexpr, QMAX: tl.constexpr):
    """Integers of x / scale as f32, saturated; true division, as the reference has it."""
    steps = tl.div_rn(x, scale)
    return round_even(tl.minimum(tl.maximum(steps, QMIN), QMAX))
