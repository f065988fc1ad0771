"""Floats times packed weights for a few rows of x, on tensor cores, with weights that never leave their registers.

A thread reads the bytes of a row that lie side by side, and what it unpacks of them is what the tensor core wants of
it: columns are multiplied in another order, in which x is read too, so that nothing is exchanged between threads.
Warps have parts of K of their own, batches of one product, whose results are added at the end in a fixed order.

Arguments and modes: see `qfx.backends.triton.kernels.weight_only_gemv`. Two bytes are one number of 16 bits here, with
the codes of an even and an odd column: ASM (see `qfx.backends.triton.pair_asm`) unpacks two such numbers, "" does it in
Triton's language. LANE: numbers that a thread has of a row, 4 of 2 or 3 bits, else 8; four threads have a block of
4 LANE numbers, whose codes in one place are those of WIDE = 8 LANE columns side by side.
"""
# ruff: noqa: RUF005, SIM300 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import load_scale


@triton.jit
def _unpacked(data, upper, odd: tl.constexpr, table_ptr, OFFSET: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
              ASM: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """The values of all codes of numbers of 16 bits, less OFFSET: a tile for each, even and odd of a place in turn."""
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    STEP: tl.constexpr = 8 // PARTS
    tiles = ()
    if ASM == "":
        wide = data.to(tl.int32) & 0xFFFF
        for i in tl.static_range(2 * PARTS):
            place: tl.constexpr = i // 2 * STEP + i % 2 * 8
            code = (wide >> place) & ((1 << STEP) - 1)
            if BITS == 3:
                code |= ((upper.to(tl.int32) >> (place + odd)) & 1) << 2
            if KIND == "lut":
                found = tl.load(table_ptr + code)
            else:
                found = (code - OFFSET).to(tl.float32)
            tiles = tiles + (found.to(TO),)
    else:
        if PARTS == 1:
            raw = tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [data], dtype=(tl.int16, tl.int16), is_pure=True, pack=2)
        elif PARTS == 2:
            raw = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,r", [data], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
            )
        elif BITS == 2:
            raw = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [data],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
                pack=2,
            )  # fmt: skip
        else:
            raw = tl.inline_asm_elementwise(
                ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [data, upper],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
                pack=2,
            )  # fmt: skip
        for i in tl.static_range(2 * PARTS):
            tiles = tiles + (raw[i].to(TO, bitcast=True),)
    return tiles


@triton.jit
def _sixteen(pointer, stride, low, high):
    """Rows low [8] and high [8] of numbers, [S, 16, 4 LANE]. pointer [S, 1, 4 LANE]."""
    first = tl.load(pointer + low[None, :, None] * stride)
    second = tl.load(pointer + high[None, :, None] * stride)
    return tl.join(first, second).permute(0, 3, 1, 2).reshape(first.shape[0], 16, first.shape[2])


@triton.jit
def _left(tile, LANE: tl.constexpr):
    """A tile [S, 16, 4 LANE] with its columns as tensor cores find them in the registers of four threads."""
    S: tl.constexpr = tile.shape[0]
    if LANE == 8:
        found = tile.reshape(S, 16, 4, 2, 2, 2).permute(0, 1, 3, 4, 2, 5)
    else:
        found = tile.reshape(S, 16, 4, 2, 2).permute(0, 1, 3, 2, 4)
    return found.reshape(S, 16, 4 * LANE)


@triton.jit
def _right(x_at, column, k, LANE: tl.constexpr, EVEN: tl.constexpr, TO: tl.constexpr):
    """Even and odd columns of 8 rows of x, [S, 4 LANE, 8], in the order of `_left`. column [S, 1, 4, 8]: those at x_at."""
    S: tl.constexpr = x_at.shape[0]
    if EVEN:
        x = tl.load(x_at)
    else:
        x = tl.load(x_at, mask=column < k, other=0.0)
    even, odd = tl.split(x.to(TO).reshape(S, 8, 4, 4, 2))
    if LANE == 8:
        if EVEN:
            x = tl.load(x_at + 8)
        else:
            x = tl.load(x_at + 8, mask=column + 8 < k, other=0.0)
        more_even, more_odd = tl.split(x.to(TO).reshape(S, 8, 4, 4, 2))
        even = tl.join(even, more_even).reshape(S, 8, 4, 2, 2, 2).permute(0, 1, 5, 3, 2, 4)
        odd = tl.join(odd, more_odd).reshape(S, 8, 4, 2, 2, 2).permute(0, 1, 5, 3, 2, 4)
    else:
        even = even.reshape(S, 8, 4, 2, 2).permute(0, 1, 3, 2, 4)
        odd = odd.reshape(S, 8, 4, 2, 2).permute(0, 1, 3, 2, 4)
    return even.reshape(S, 8, 4 * LANE).permute(0, 2, 1), odd.reshape(S, 8, 4 * LANE).permute(0, 2, 1)


@triton.jit
def _replaced(tiles, i: tl.constexpr, tile, COUNT: tl.constexpr):
    """Tiles with another one in place i."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (tile if j == i else tiles[j],)
    return found


@triton.jit
def fragments(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, m, n, k, x_stride,
              w_stride, upper_stride, scale_stride, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
              GROUP: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr, ASM_ODD: tl.constexpr, TO: tl.constexpr,
              EVEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, S: tl.constexpr):  # fmt: skip
    """x [m, k] to out [m, n] = x @ w^T + bias; a program for 16 ROWS columns of out and 8 TOKENS rows, m at most.

    Values of weights are exact in the type TO, zero points are taken away by sums of x; products are added in f32. S:
    parts of K, one for a warp. EVEN: k is a multiple of the columns of S blocks.
    """
    LANE: tl.constexpr = 4 if BITS < 4 else 8
    PARTS: tl.constexpr = 1 if BITS == 8 else (2 if BITS == 4 else 4)
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    WIDE: tl.constexpr = 8 * LANE
    COLUMNS: tl.constexpr = WIDE * PARTS
    TOGETHER: tl.constexpr = PARTS if GROUP == 0 or GROUP >= COLUMNS else GROUP // WIDE  # places of one scale
    first = tl.program_id(0) * (16 * ROWS)
    eight, split = tl.arange(0, 8), tl.arange(0, S)
    number = tl.arange(0, 4 * LANE)[None, None, :]
    codes = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    uppers = upper_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    within = (tl.arange(0, 4) * (2 * LANE))[None, None, :, None] + eight[None, None, None, :]
    ones = tl.full([S, 16, 4 * LANE], 1.0, TO)
    accs = ()
    for _ in tl.static_range(ROWS * TOKENS):
        accs = accs + (tl.zeros([S, 16, 8], tl.float32),)
    blocks = tl.cdiv(k, COLUMNS * HALVES)
    for start in range(0, blocks, S):
        block = start + split
        held = tl.minimum(block, blocks - 1)  # what is read for nothing meets zeros of x
        for h in tl.static_range(HALVES):
            tiles = ()
            for r in tl.static_range(ROWS):
                low = tl.minimum(first + 16 * r + eight, n - 1).to(tl.int64)
                high = tl.minimum(first + 16 * r + 8 + eight, n - 1).to(tl.int64)
                at = codes + ((held * HALVES + h) * (4 * LANE))[:, None, None] + number
                data = _sixteen(at, w_stride // 2, low, high)
                above = data
                if BITS == 3:
                    at = uppers + (held * (4 * LANE))[:, None, None] + number
                    above = _sixteen(at, upper_stride // 2, low, high)
                tiles = tiles + (
                    _unpacked(data, above, h, table_ptr, OFFSET, BITS, KIND, ASM_ODD if h else ASM, TO),
                )
            for g in tl.static_range(PARTS // TOGETHER):
                sums = ()
                parts = ()
                for j in tl.static_range(TOKENS):
                    sums = sums + (tl.zeros([S, 16, 8], tl.float32),)
                    for r in tl.static_range(ROWS):
                        parts = parts + (tl.zeros([S, 16, 8], tl.float32),)
                for i in tl.static_range(g * TOGETHER, (g + 1) * TOGETHER):
                    for j in tl.static_range(TOKENS):
                        tokens = tl.minimum(8 * j + eight, m - 1).to(tl.int64)
                        begin = ((block * HALVES + h) * COLUMNS + i * WIDE)[:, None, None, None]
                        column = begin + within
                        even, odd = _right(x_ptr + tokens[None, :, None, None] * x_stride + column, column, k, LANE,
                                           EVEN, TO)  # fmt: skip
                        if zero_ptr is not None:
                            total = tl.dot(ones, odd, tl.dot(ones, even, sums[j]))
                            sums = _replaced(sums, j, total, TOKENS)
                        for r in tl.static_range(ROWS):
                            part = tl.dot(_left(tiles[r][2 * i], LANE), even, parts[j * ROWS + r])
                            part = tl.dot(_left(tiles[r][2 * i + 1], LANE), odd, part)
                            parts = _replaced(parts, j * ROWS + r, part, ROWS * TOKENS)
                for r in tl.static_range(ROWS):
                    rows = tl.minimum(first + 16 * r + tl.arange(0, 16), n - 1).to(tl.int64)[None, :]
                    at = rows * scale_stride
                    if GROUP > 0:
                        at += (((held * HALVES + h) * COLUMNS + g * TOGETHER * WIDE) // GROUP)[:, None]
                    for j in tl.static_range(TOKENS):
                        part = parts[j * ROWS + r]
                        if zero_ptr is not None:
                            part -= sums[j] * tl.load(zero_ptr + at).to(tl.float32)[:, :, None]
                        if GROUP > 0:
                            part *= load_scale(scale_ptr + at, at >= 0, SCALE)[:, :, None]
                        accs = _replaced(accs, j * ROWS + r, accs[j * ROWS + r] + part, ROWS * TOKENS)
    factor = tl.load(whole_ptr)
    for r in tl.static_range(ROWS):
        rows = (first + 16 * r + tl.arange(0, 16)).to(tl.int64)
        here = rows < n
        times = factor + tl.zeros([16], tl.float32)
        if GROUP == 0:
            times *= load_scale(scale_ptr + rows * scale_stride, here, SCALE)
        for j in tl.static_range(TOKENS):
            found = tl.sum(accs[j * ROWS + r], axis=0) * times[:, None]
            if bias_ptr is not None:
                found += tl.load(bias_ptr + rows, mask=here, other=0.0).to(tl.float32)[:, None]
            tokens = 8 * j + eight
            at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
            tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=here[:, None] & (tokens < m)[None, :])
