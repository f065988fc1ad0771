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

from qfx.backends.triton.kernels.decode import bias, biased, load_scale, values


@triton.jit
def _floats(x_ptr, start, k, PARTS: tl.constexpr):
    """The columns of x that meet the codes of chunks of 16 bytes: a tile [CHUNKS, 16] f32 for each code of a byte."""
    tiles = ()
    for i in tl.static_range(PARTS):
        columns = start[:, None] + (i * (128 // PARTS) + tl.arange(0, 16))[None, :]
        tiles = tiles + (tl.load(x_ptr + columns, mask=columns < k, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _scaled(acc, x, w, at, there, scale_ptr, zero_ptr, PARTS: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
            OFFSET: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr):  # fmt: skip
    """acc [CHUNKS] plus the scaled sums of tiles x times tiles w; at [CHUNKS]: places of the first codes' scales."""
    SHARED: tl.constexpr = GROUP == 0 or GROUP % 128 == 0  # all codes of a byte have one scale
    if SHARED:
        products = x[0] * w[0]
        for i in tl.static_range(1, PARTS):
            products += x[i] * w[i]
        found = tl.sum(products, axis=1)
        if BIASED:
            for i in tl.static_range(PARTS):
                found -= tl.sum(x[i], axis=1) * (bias(i, BITS) + OFFSET)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + at, mask=there, other=0).to(tl.float32)
            for i in tl.static_range(PARTS):
                found -= tl.sum(x[i], axis=1) * zero
        if GROUP > 0:
            found *= load_scale(scale_ptr + at, there, SCALE)
        acc += found
    else:
        for i in tl.static_range(PARTS):
            found = tl.sum(x[i] * w[i], axis=1)
            if BIASED:
                found -= tl.sum(x[i], axis=1) * (bias(i, BITS) + OFFSET)
            place = at + i * (128 // PARTS) // GROUP
            if zero_ptr is not None:
                found -= tl.sum(x[i], axis=1) * tl.load(zero_ptr + place, mask=there, other=0).to(tl.float32)
            acc += found * load_scale(scale_ptr + place, there, SCALE)
    return acc


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
def gemv(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, n, k, x_stride,
         w_stride, upper_stride, scale_stride, M: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
         SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
         ASM: tl.constexpr, BN: tl.constexpr, CHUNKS: tl.constexpr):  # fmt: skip
    """x [M, k], M from 1 to 4, to out [M, n] = x @ w^T + bias; one program for BN columns of out.

    A thread has 16 bytes of each of the BN rows, which share their scales; products and sums are f32. EXACT: codes
    become f32 one by one. Otherwise integers are read as mantissas of powers of two, whose sum over x is taken away: an
    error below 2^-15 of the sum of |x| times a step.
    """
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    BIASED: tl.constexpr = KIND == "int" and not EXACT
    TO: tl.constexpr = tl.float32 if EXACT else tl.float16
    first = tl.program_id(0) * BN
    byte = tl.arange(0, 16)[None, :]
    slots: tl.constexpr = BN * (4 if M == 3 else M)
    accs = ()
    for _ in tl.static_range(slots):
        accs = accs + (tl.zeros([CHUNKS], tl.float32),)
    for block in range(0, w_stride // 16, CHUNKS):
        chunks = block + tl.arange(0, CHUNKS)
        within = chunks < w_stride // 16
        odd = (chunks // 2 % 2).to(tl.uint8)[:, None]
        start = chunks * 16 // (128 // PARTS) * 128 + chunks * 16 % (128 // PARTS)
        tiles = ()
        uppers = ()
        for r in tl.static_range(BN):
            row = (first + r).to(tl.int64)
            there = within & (chunks * 0 + first + r < n)
            w = tl.load(w_ptr + row * w_stride + (chunks * 16)[:, None] + byte, mask=there[:, None], other=0)
            tiles = tiles + (w,)
            if BITS == 3:
                at = (chunks // 4 * 32 + chunks % 2 * 16)[:, None] + byte
                uppers = uppers + (tl.load(upper_ptr + row * upper_stride + at, mask=there[:, None], other=0),)
        if BITS != 3:
            uppers = tiles
        xs = ()
        for m in tl.static_range(M):
            xs = xs + (_floats(x_ptr + m * x_stride, start, k, PARTS),)
        updated = ()
        for r in tl.static_range(BN):
            row = (first + r).to(tl.int64)
            there = within & (chunks * 0 + first + r < n)
            if BIASED:
                decoded = biased(tiles[r], uppers[r], odd, BITS, ASM)
            else:
                decoded = values(tiles[r], uppers[r], odd, table_ptr, OFFSET, BITS, KIND, NATIVE, ASM, TO)
            w = ()
            for i in tl.static_range(PARTS):
                w = w + (decoded[i].to(tl.float32),)
            at = row * scale_stride + (start // GROUP if GROUP > 0 else tl.zeros_like(start))
            for m in tl.static_range(M):
                acc = _scaled(accs[r * (slots // BN) + m], xs[m], w, at, there, scale_ptr, zero_ptr, PARTS, SCALE,
                              GROUP, OFFSET, BITS, BIASED)  # fmt: skip
                updated = updated + (acc,)
            if M == 3:
                updated = updated + (accs[r * 4 + 3],)
        accs = updated
    total = tl.sum(_stacked(accs, slots), axis=0)  # [BN, M], M of 3 as 4
    slot = tl.arange(0, slots)
    rows = (first + slot // (slots // BN)).to(tl.int64)
    tokens = slot % (slots // BN)
    here = (rows < n) & (tokens < M)
    total *= tl.load(whole_ptr)
    if GROUP == 0:
        total *= load_scale(scale_ptr + rows * scale_stride, here, SCALE)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + tokens.to(tl.int64) * n + rows, total.to(out_ptr.dtype.element_ty), mask=here)
