"""Floats times packed weights, a few rows of x: kernels that multiply as they read, without tensor cores.

Shared arguments of this and `weight_only`. w [N, row bytes] uint8 and, of three bits, upper [N, half of it] in the
layout of `qfx.backends.triton.layout`, units of 128 columns. scale [N, groups], GROUP columns each, a multiple of 16;
GROUP 0: one for each row. zero uint8 like scale, or None; symmetric codes have a constant OFFSET instead. whole f32
[2]: a factor of all scales, and a power of two that brings scales into the range of f16. table f32 [16]: the values of
"lut" codes.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import bias, biased, exact, load_scale, two_values, value


@triton.jit
def _sums(x, w, upper, odd, table_ptr, i: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
          NATIVE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Sums [BN, CHUNKS] over the bytes of x [CHUNKS, 16] times value i of w [BN, CHUNKS, 16], less OFFSET."""
    if KIND == "int" and not EXACT:
        found = tl.sum(biased(w, upper, odd, i, BITS) * x[None, :, :], axis=2)
        return found - (tl.sum(x, axis=1) * (bias(i, BITS) + OFFSET))[None, :]
    if EXACT:
        values = exact(w, upper, odd, table_ptr, i, BITS, KIND) - OFFSET
    elif ASM != "":
        values = two_values(w, ASM, tl.float16)[i].to(tl.float32)
    else:
        values = value(w, upper, odd, table_ptr, i, OFFSET, BITS, KIND, NATIVE, tl.float16).to(tl.float32)
    return tl.sum(values * x[None, :, :], axis=2)


@triton.jit
def _row(acc, x_ptr, unit, rows, there, w, upper, odd, scale_ptr, zero_ptr, table_ptr, k, scale_stride, PARTS: tl.constexpr,
         BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
         NATIVE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """acc [BN, CHUNKS] plus scaled sums of a row of x over a tile of weights whose first columns are unit [CHUNKS]."""
    SHARED: tl.constexpr = GROUP == 0 or GROUP % 128 == 0  # all codes of a byte have one scale
    part = tl.zeros_like(acc)
    total = tl.zeros([1, acc.shape[1]], tl.float32)
    for i in tl.static_range(PARTS):
        columns = (unit + i * (128 // PARTS))[:, None] + tl.arange(0, 16)[None, :]
        x = tl.load(x_ptr + columns, mask=columns < k, other=0.0).to(tl.float32)
        part += _sums(x, w, upper, odd, table_ptr, i, OFFSET, BITS, KIND, NATIVE, EXACT, ASM)
        if zero_ptr is not None:
            total += tl.sum(x, axis=1)[None, :]
        if not SHARED or i == PARTS - 1:
            at = rows[:, None] * scale_stride
            if GROUP > 0:
                at += ((unit + i * (128 // PARTS)) // GROUP)[None, :]
            if zero_ptr is not None:
                part -= tl.load(zero_ptr + at, mask=there, other=0).to(tl.float32) * total
            if GROUP > 0:
                part *= load_scale(scale_ptr + at, there, SCALE)
            acc += part
            part = tl.zeros_like(acc)
            total = tl.zeros([1, acc.shape[1]], tl.float32)
    return acc


@triton.jit
def gemv(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, n, k, x_stride,
         w_stride, upper_stride, scale_stride, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
         SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
         ASM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """x [M, k], M from 1 to 4, to out [M, n] = x @ w^T + bias; one program for BN columns of out.

    A thread has 16 bytes of a row, which share their scales; products and sums are f32. EXACT: codes become f32 one by
    one. Otherwise integers are read as mantissas of powers of two, whose sum over x is taken away: an error below
    2^-15 of the sum of |x| times a step.
    """
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    rows = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    here = rows < n
    acc0 = tl.zeros([BN, CHUNKS], tl.float32)
    acc1 = tl.zeros([BN, CHUNKS], tl.float32)
    acc2 = tl.zeros([BN, CHUNKS], tl.float32)
    acc3 = tl.zeros([BN, CHUNKS], tl.float32)
    for first in range(0, w_stride // 16, CHUNKS):
        chunks = first + tl.arange(0, CHUNKS)
        there = here[:, None] & (chunks < w_stride // 16)[None, :]
        byte = tl.arange(0, 16)[None, None, :]
        at = rows[:, None, None] * w_stride + (chunks * 16)[None, :, None] + byte
        w = tl.load(w_ptr + at, mask=there[:, :, None], other=0)
        upper = w
        if BITS == 3:
            above = (chunks // 4 * 32 + chunks % 2 * 16)[None, :, None] + byte
            upper = tl.load(upper_ptr + rows[:, None, None] * upper_stride + above, mask=there[:, :, None], other=0)
        odd = (chunks // 2 % 2)[None, :, None]
        unit = chunks * 16 // (128 // PARTS) * 128 + chunks * 16 % (128 // PARTS)
        acc0 = _row(acc0, x_ptr, unit, rows, there, w, upper, odd, scale_ptr, zero_ptr, table_ptr, k, scale_stride,
                    PARTS, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM)  # fmt: skip
        if M > 1:
            acc1 = _row(acc1, x_ptr + x_stride, unit, rows, there, w, upper, odd, scale_ptr, zero_ptr, table_ptr, k,
                        scale_stride, PARTS, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM)  # fmt: skip
        if M > 2:
            acc2 = _row(acc2, x_ptr + 2 * x_stride, unit, rows, there, w, upper, odd, scale_ptr, zero_ptr, table_ptr, k,
                        scale_stride, PARTS, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM)  # fmt: skip
        if M > 3:
            acc3 = _row(acc3, x_ptr + 3 * x_stride, unit, rows, there, w, upper, odd, scale_ptr, zero_ptr, table_ptr, k,
                        scale_stride, PARTS, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM)  # fmt: skip
    factor = tl.load(whole_ptr)
    if GROUP == 0:
        factor = factor * load_scale(scale_ptr + rows * scale_stride, here, SCALE)
    added = tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32) if bias_ptr is not None else 0.0
    to = out_ptr.dtype.element_ty
    tl.store(out_ptr + rows, (tl.sum(acc0, axis=1) * factor + added).to(to), mask=here)
    if M > 1:
        tl.store(out_ptr + n + rows, (tl.sum(acc1, axis=1) * factor + added).to(to), mask=here)
    if M > 2:
        tl.store(out_ptr + 2 * n + rows, (tl.sum(acc2, axis=1) * factor + added).to(to), mask=here)
    if M > 3:
        tl.store(out_ptr + 3 * n + rows, (tl.sum(acc3, axis=1) * factor + added).to(to), mask=here)
