"""Floats times packed weights, a few rows of x: a kernel that multiplies as it reads, without tensor cores.

Shared arguments of this and `weight_only`. w [N, row bytes] uint8 and, of three bits, upper [N, half of it] in the
layout of `qfx.backends.triton.layout`, units of 128 columns. scale [N, groups], GROUP columns each, a multiple of 16;
GROUP 0: one for each row. zero uint8 like scale, or None; symmetric codes have a constant OFFSET instead. whole f32
[2]: a factor of all scales, and a power of two that brings scales into the range of f16. table f32 [16]: the values of
"lut" codes.
"""
# ruff: noqa: RUF005, SIM300 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import bias, biased, load_scale, parts_of, values
from qfx.backends.triton.kernels.early import wait_for_earlier


@triton.jit
def _floats(x_ptr, start, k, PARTS: tl.constexpr):
    """The columns of x that meet the codes of chunks of 16 bytes: a tile [CHUNKS, 16] f32 for each code of a byte."""
    tiles = ()
    for i in tl.static_range(PARTS):
        columns = start[:, None] + (i * (128 // PARTS) + tl.arange(0, 16))[None, :]
        tiles = tiles + (tl.load(x_ptr + columns, mask=columns < k, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _wide(tiles, COUNT: tl.constexpr):
    """Tiles as f32."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tiles[i].to(tl.float32),)
    return found


@triton.jit
def _per_group(pointer, at, there, COUNT: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """Scales (or zero points) [CHUNKS] f32 of COUNT codes of a byte, which lie STEP columns apart."""
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (load_scale(pointer + at + (i * STEP // GROUP if GROUP > 0 else 0), there, SCALE),)
    return tiles


@triton.jit
def _totals(x, PARTS: tl.constexpr, COUNT: tl.constexpr, WEIGHTED: tl.constexpr, OFFSET: tl.constexpr,
            BITS: tl.constexpr):  # fmt: skip
    """Sums [CHUNKS] of tiles x, one for each of COUNT scales; WEIGHTED: times what stands before each code."""
    found = ()
    for c in tl.static_range(COUNT):
        total = tl.zeros([x[0].shape[0]], tl.float32)
        for i in tl.static_range(PARTS // COUNT):
            total += tl.sum(x[c + i], axis=1) * (bias(c + i, BITS) + OFFSET if WEIGHTED else 1)
        found = found + (total,)
    return found


@triton.jit
def _row(accs, xs, before, totals, data, upper, odd, factor, zero, table_ptr, M: tl.constexpr, PARTS: tl.constexpr,
         COUNT: tl.constexpr, SCALED: tl.constexpr, ZERO: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
         KIND: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """The sums accs of a row of weights with another tile of its bytes, whose codes have COUNT scales: 1 or PARTS."""
    if KIND == "int" and not EXACT:
        w = biased(data, upper, odd, BITS, ASM)
    else:
        TO: tl.constexpr = tl.float32 if EXACT else tl.float16
        w = _wide(values(data, upper, odd, table_ptr, OFFSET, BITS, KIND, NATIVE, ASM, TO), PARTS)
    result = ()
    for m in tl.static_range(M):
        acc = accs[m]
        for c in tl.static_range(COUNT):
            products = xs[m][c] * w[c]
            for i in tl.static_range(1, PARTS // COUNT):
                products += xs[m][i] * w[i]
            found = tl.sum(products, axis=1)
            if KIND == "int" and not EXACT:
                found -= before[m][c]
            if ZERO:
                found -= totals[m][c] * zero[c]
            acc += found * factor[c] if SCALED else found
        result = result + (acc,)
    if M == 3:
        result = result + (accs[3],)
    return result


@triton.jit
def _stacked(tiles, COUNT: tl.constexpr):
    """COUNT tensors [CHUNKS] as one [CHUNKS, COUNT]."""
    if COUNT == 1:
        found = tiles[0][:, None]
    else:
        low = _stacked(tiles[: COUNT // 2], COUNT // 2)
        high = _stacked(tiles[COUNT // 2 :], COUNT // 2)
        found = tl.join(low, high).permute(0, 2, 1).reshape(low.shape[0], COUNT)
    return found


@triton.jit
def vectors(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, first, n, k, stop,
            x_stride, w_stride, upper_stride, scale_stride, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
            SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
            ASM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """Columns first to first + BN of `gemv`, of `stop` chunks of 16 bytes of a row of w."""
    PARTS: tl.constexpr = parts_of(BITS)
    COUNT: tl.constexpr = 1 if GROUP == 0 or GROUP % 128 == 0 else PARTS  # scales for the codes of a byte
    byte = tl.arange(0, 16)[None, :]
    SLOTS: tl.constexpr = 4 if M == 3 else M  # sums of a row
    accs = ()
    for _ in tl.static_range(BN * SLOTS):
        accs = accs + (tl.zeros([CHUNKS], tl.float32),)
    for block in range(0, stop, CHUNKS):
        chunks = block + tl.arange(0, CHUNKS)
        within = chunks < stop
        odd = (chunks // 2 % 2).to(tl.uint8)[:, None]
        start = chunks * 16 // (128 // PARTS) * 128 + chunks * 16 % (128 // PARTS)
        tiles = ()
        uppers = ()
        factors = ()
        zeros = ()
        for r in tl.static_range(BN):
            row = (first + r).to(tl.int64)
            there = within & (chunks * 0 + first + r < n)
            w = tl.load(w_ptr + row * w_stride + (chunks * 16)[:, None] + byte, mask=there[:, None], other=0)
            tiles = tiles + (w,)
            if BITS == 3:
                above = (chunks // 4 * 32 + chunks % 2 * 16)[:, None] + byte
                w = tl.load(upper_ptr + row * upper_stride + above, mask=there[:, None], other=0)
            uppers = uppers + (w,)
            at = row * scale_stride + (start // GROUP if GROUP > 0 else chunks * 0)
            if GROUP > 0:
                factors = factors + (_per_group(scale_ptr, at, there, COUNT, 128 // PARTS, GROUP, SCALE),)
            else:
                factors = factors + ((),)
            if zero_ptr is not None:
                zeros = zeros + (_per_group(zero_ptr, at, there, COUNT, 128 // PARTS, GROUP, ""),)
            else:
                zeros = zeros + ((),)
        xs = ()
        before = ()
        totals = ()
        for m in tl.static_range(M):
            x = _floats(x_ptr + tl.cast(x_stride, tl.int64) * m, start, k, PARTS)
            xs = xs + (x,)
            before = before + (_totals(x, PARTS, COUNT, True, OFFSET, BITS),)
            totals = totals + (_totals(x, PARTS, COUNT, False, OFFSET, BITS),)
        updated = ()
        for r in tl.static_range(BN):
            found = accs[r * SLOTS : r * SLOTS + SLOTS]
            if first + r < n:  # a block of its own, or rows would be computed side by side in too many registers
                found = _row(found, xs, before, totals, tiles[r], uppers[r], odd, factors[r], zeros[r], table_ptr, M,
                             PARTS, COUNT, GROUP > 0, zero_ptr is not None, OFFSET, BITS, KIND, NATIVE, EXACT,
                             ASM)  # fmt: skip
            updated = updated + found
        accs = updated
    total = tl.sum(_stacked(accs, BN * SLOTS), axis=0)  # [BN, M], M of 3 as 4
    slot = tl.arange(0, BN * SLOTS)
    rows = (first + slot // SLOTS).to(tl.int64)
    tokens = slot % SLOTS
    here = (rows < n) & (tokens < M)
    total *= tl.load(whole_ptr)
    if GROUP == 0:
        total *= load_scale(scale_ptr + rows * scale_stride, here, SCALE)
    total = tl.where(stop > 0, total, 0.0)  # of nothing, whatever the scales are
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + tokens.to(tl.int64) * n + rows, total.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def gemv(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, n, k, x_stride,
         w_stride, upper_stride, scale_stride, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
         SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
         ASM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """x [M, k], M from 1 to 4, to out [M, n] = x @ w^T + bias; one program for BN columns of out.

    A thread has 16 bytes of each of the BN rows, which share their scales; products and sums are f32. EXACT: codes
    become f32 one by one. Otherwise integers are read as mantissas of powers of two, whose sum over x is taken away: an
    error below 2^-15 of the sum of |x| times a step.
    """
    wait_for_earlier(EARLY)
    vectors(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr,
            tl.program_id(0) * BN, n, k, w_stride // 16, x_stride, w_stride, upper_stride, scale_stride, M, BITS, KIND,
            SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM, BN, CHUNKS)  # fmt: skip
