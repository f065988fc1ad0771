"""What ends a matrix product: bias, activation function, residual, one cast."""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of f32; nothing overflows."""
    return 1.0 / (1.0 + tl.exp(-tl.maximum(x, -87.0)))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """f32: "" leaves x as it is; "gelu" x Phi(x), "gelu_tanh" its approximation, "silu" x sigmoid(x)."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        # constants on the right: in the interpreter of Triton 3.8 one on the left makes a constant of the product
        x = x * sigmoid((x + 0.044715 * x * x * x) * (2.0 * _SQRT_2_OVER_PI))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    return x


@triton.jit
def finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION: tl.constexpr):
    """Store a tile y f32 at row [BM] and column [BN] of [m, n]: activation(y + bias[n]) + residual [m, n], cast."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    y = activated(y, ACTIVATION)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
