"""Floats times packed weights for a few rows of x, on tensor cores, with weights that never leave their registers.

A thread reads the bytes of a row that lie side by side, and what it unpacks of them is what the tensor core wants of
it: columns are multiplied in another order, in which x is read too, so that nothing is exchanged between threads.
Warps have parts of K of their own, batches of one product, whose results are added at the end in a fixed order.

Arguments and modes: see `qfx.backends.triton.kernels.weight_only_gemv`. Two bytes are one number of 16 bits here, with
the codes of an even and an odd column: ASM (see `qfx.backends.triton.pair_asm`) unpacks two such numbers, "" does it in
Triton's language. LANE: numbers that a thread has of a row, 4 of 2 or 3 bits and in groups of 32 columns, else 8; four
threads have a block of 4 LANE numbers, whose codes in one place are those of WIDE = 8 LANE columns side by side.
"""
# ruff: noqa: RUF005, SIM300 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import load_scale, parts_of
from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.epilogue import activated


@triton.constexpr_function
def lane_of(bits, group):
    """Numbers of 16 bits that a thread has of a row, see LANE above."""
    return 4 if bits < 4 or group == 32 else 8


@triton.constexpr_function
def together_of(bits, group):
    """How many of these share a scale."""
    parts = parts_of(bits)
    return parts if group == 0 or group >= 128 else max(1, group * parts // 128)


@triton.constexpr_function
def columns_of(act):
    """Columns of out that sixteen rows of weights give: where `act` gates them, each has two."""
    return 8 if act else 16


@triton.constexpr_function
def _registers(outputs, inputs):
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@triton.jit
def unpacked(data, upper, below, odd: tl.constexpr, table_ptr, OFFSET: tl.constexpr, BITS: tl.constexpr,
              KIND: tl.constexpr, ASM: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """The values of all codes of numbers of 16 bits, less OFFSET: a tile for each, even and odd of a place in turn.

    below: what is added to the codes of as many places each, tiles in the type TO, zero points for ASM over its gain.
    """
    PARTS: tl.constexpr = parts_of(BITS)
    STEP: tl.constexpr = 8 // PARTS
    COUNT: tl.constexpr = len(below)
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
                if COUNT > 0:
                    found += below[i // 2 * COUNT // PARTS].to(tl.float32)
            tiles = tiles + (found.to(TO),)
    else:
        given = (data,)
        if BITS == 3:
            given = given + (upper,)
        for i in tl.static_range(COUNT):
            given = given + (below[i].to(tl.int16, bitcast=True),)
        WANTED: tl.constexpr = _registers(2 * PARTS, len(given))
        if PARTS == 1:
            raw = tl.inline_asm_elementwise(ASM, WANTED, given, dtype=(tl.int16, tl.int16), is_pure=True, pack=2)
        elif PARTS == 2:
            raw = tl.inline_asm_elementwise(
                ASM, WANTED, given, dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
            )
        else:
            raw = tl.inline_asm_elementwise(
                ASM, WANTED, given,
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
                pack=2,
            )  # fmt: skip
        for i in tl.static_range(2 * PARTS):
            tiles = tiles + (raw[i].to(TO, bitcast=True),)
    return tiles


@triton.jit
def rows_of(first, n, S: tl.constexpr, ABREAST: tl.constexpr, GATED: tl.constexpr = False):
    """The row of each thread's numbers, of sixteen from row `first` on, [2 S 32] int64, none beyond n.

    ABREAST: the S have rows of their own, side by side, not all the same. GATED: eight, and the same eight of the
    next n rows.

    What is side by side in one thread is one dimension, what is not another: so the layout is the same for any Triton.
    """
    at = tl.arange(0, 2 * S * 32)  # half of the rows, part of K, row, a fourth of the block
    half, row = at // (32 * S), first + at // 4 % 8
    if ABREAST:
        row += at // 32 % S * 16
    if GATED:
        found = tl.minimum(row, n - 1) + half * n
    else:
        found = tl.minimum(row + half * 8, n - 1)
    return found.to(tl.int64)


@triton.jit
def _each_of(first, n, GATED: tl.constexpr):
    """The rows of `rows_of` in the order of what tensor cores give, [16] int64."""
    at = tl.arange(0, 16)
    if GATED:
        found = tl.minimum(first + at % 8, n - 1) + at // 8 * n
    else:
        found = tl.minimum(first + at, n - 1)
    return found.to(tl.int64)


@triton.jit
def _arranged(found, S: tl.constexpr, LANE: tl.constexpr):
    """What threads have, [2 S 32, LANE], as [S, 16, 4 LANE]."""
    return found.reshape(2, S, 8, 4, LANE).permute(1, 0, 2, 3, 4).reshape(S, 16, 4 * LANE)


@triton.jit
def sixteen(rows, start, S: tl.constexpr, LANE: tl.constexpr):
    """Numbers of rows, [S, 16, 4 LANE]; rows, start [2 S 32]: where each begins, the first number of each thread."""
    return _arranged(tl.load((rows + start)[:, None] + tl.arange(0, LANE)[None, :]), S, LANE)


@triton.jit
def below_of(zero, S: tl.constexpr, LANE: tl.constexpr, GAIN: tl.constexpr, COMPILED: tl.constexpr, TO: tl.constexpr):
    """Zero points [2 S 32] as what is added to codes over GAIN, [S, 16, 4 LANE]."""
    wide = zero.to(tl.int32)
    if COMPILED:  # hides the load, by whose width Triton would lay out what tensor cores read
        wide = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [wide], dtype=tl.int32, is_pure=False, pack=1)
    less = (wide.to(tl.float32) * (-1.0 / GAIN)).to(TO)
    return _arranged(tl.broadcast_to(less[:, None], [2 * S * 32, LANE]), S, LANE)


@triton.jit
def _left(tile, LANE: tl.constexpr):
    """A tile [S, 16, 4 LANE] with its columns as tensor cores find them in the registers of four threads."""
    S: tl.constexpr = tile.shape[0]
    found = tile.reshape(S, 16, 4, LANE // 2, 2).permute(0, 1, 3, 2, 4)
    return found.reshape(S, 16, 4 * LANE)


@triton.jit
def _right(x_ptr, first, m, x_stride, start, k, S: tl.constexpr, LANE: tl.constexpr, EVEN: tl.constexpr,
           TO: tl.constexpr):  # fmt: skip
    """Even and odd columns of 8 rows of x from row `first` on, [S, 4 LANE, 8], in the order of `_left`.

    start [LANE / 4 S 32]: the first column of each thread.
    """
    CHUNKS: tl.constexpr = LANE // 4
    at = tl.arange(0, CHUNKS * S * 32)  # chunk of 8 columns, part of K, row, a fourth of the block
    rows = x_ptr + tl.minimum(first + at // 4 % 8, m - 1).to(tl.int64) * x_stride
    columns = start[:, None] + tl.arange(0, 8)[None, :]
    if EVEN:
        x = tl.load(rows[:, None] + columns)
    else:
        x = tl.load(rows[:, None] + columns, mask=columns < k, other=0.0)
    even, odd = tl.split(x.to(TO).reshape(CHUNKS, S, 8, 4, 2, 2, 2))
    even = even.permute(1, 0, 4, 3, 5, 2).reshape(S, 4 * LANE, 8)
    return even, odd.permute(1, 0, 4, 3, 5, 2).reshape(S, 4 * LANE, 8)


@triton.jit
def column_of(block, EACH: tl.constexpr, WIDE: tl.constexpr):
    """The first column of a block, of the codes in the first place."""
    return block // EACH * 128 + block % EACH * WIDE


@triton.jit
def group_of(block, FURTHER: tl.constexpr, EACH: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr):
    """The group of the column that is FURTHER columns, whole groups or parts of one, behind a block's first."""
    wide = tl.cast(block, tl.uint32)  # of which a quotient is a shift
    if GROUP == 0:
        found = wide * 0
    elif GROUP >= 128:
        found = wide // (EACH * (GROUP // 128))
    elif EACH == 1:
        found = wide * (128 // GROUP) + FURTHER // GROUP
    else:
        found = (column_of(wide, EACH, WIDE) + FURTHER) // GROUP
    return found


@triton.jit
def _replaced(tiles, i: tl.constexpr, tile, COUNT: tl.constexpr):
    """Tiles with another one in place i."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (tile if j == i else tiles[j],)
    return found


@triton.jit
def fragment_tile(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, first, blocks,
                  m, n, k, x_stride, w_stride, upper_stride, scale_stride, BITS: tl.constexpr, KIND: tl.constexpr,
                  SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr,
                  ASM_ODD: tl.constexpr, GAIN: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr,
                  UNITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, S: tl.constexpr,
                  ACT: tl.constexpr):  # fmt: skip
    """Columns of out from `first` on, as many as `fragments` has in a program, of `blocks` blocks of K."""
    GATED: tl.constexpr = ACT != ""
    HIGH: tl.constexpr = columns_of(ACT)
    LANE: tl.constexpr = lane_of(BITS, GROUP)
    PARTS: tl.constexpr = parts_of(BITS)
    APART: tl.constexpr = 128 // PARTS  # columns from one place to the next
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    WIDE: tl.constexpr = 8 * LANE
    EACH: tl.constexpr = APART // WIDE  # blocks of a unit of 128 columns
    TOGETHER: tl.constexpr = together_of(BITS, GROUP)
    split = tl.arange(0, S)
    of_w, of_x = tl.arange(0, 2 * S * 32), tl.arange(0, LANE // 4 * S * 32)
    codes = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    uppers = upper_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    within, fourth = of_x % 4 * (2 * LANE) + of_x // (32 * S) * 8, of_w % 4 * LANE
    accs = ()
    for _ in tl.static_range(ROWS * TOKENS):
        accs = accs + (tl.zeros([S, 16, 8], tl.float32),)
    scales, zeros, lower, above = (), (), (), ()  # where rows begin
    for r in tl.static_range(ROWS):
        rows = rows_of(first + HIGH * r, n, S, False, GATED)
        lower = lower + (codes + rows * (w_stride // 2),)
        if BITS == 3:
            above = above + (uppers + rows * (upper_stride // 2),)
        if zero_ptr is not None:
            zeros = zeros + (zero_ptr + rows * scale_stride,)
        at = _each_of(first + HIGH * r, n, GATED)
        scales = scales + ((scale_ptr + at * scale_stride)[None, :],)
    for start in range(0, blocks, S):
        held, of_scale = start + of_w // 32 % S, start + split
        begin = start + of_x // 32 % S
        if not EVEN:  # what is read for nothing meets zeros of x, or its product is dropped
            held, of_scale = tl.minimum(held, blocks - 1), tl.minimum(of_scale, blocks - 1)
            if UNITS:
                begin = tl.minimum(begin, blocks - 1)
        for h in tl.static_range(HALVES):
            tiles = ()
            for r in tl.static_range(ROWS):
                data = sixteen(lower[r], (held * HALVES + h) * (4 * LANE) + fourth, S, LANE)
                upper = data
                if BITS == 3:
                    upper = sixteen(above[r], held * (4 * LANE) + fourth, S, LANE)
                below = ()
                if zero_ptr is not None:
                    for g in tl.static_range(PARTS // TOGETHER):
                        group = group_of(held * HALVES + h, g * TOGETHER * APART, EACH, WIDE, GROUP)
                        below = below + (below_of(tl.load(zeros[r] + group), S, LANE, GAIN, ASM != "", TO),)
                found = unpacked(data, upper, below, h, table_ptr, OFFSET, BITS, KIND, ASM_ODD if h else ASM, TO)
                tiles = tiles + (found,)
            for g in tl.static_range(PARTS // TOGETHER):
                parts = ()
                for _ in tl.static_range(ROWS * TOKENS):
                    parts = parts + (tl.zeros([S, 16, 8], tl.float32),)
                for i in tl.static_range(g * TOGETHER, (g + 1) * TOGETHER):
                    for j in tl.static_range(TOKENS):
                        column = column_of(begin * HALVES + h, EACH, WIDE) + i * APART + within
                        even, odd = _right(x_ptr, 8 * j, m, x_stride, column, k, S, LANE, UNITS, TO)
                        for r in tl.static_range(ROWS):
                            part = tl.dot(_left(tiles[r][2 * i], LANE), even, parts[j * ROWS + r])
                            part = tl.dot(_left(tiles[r][2 * i + 1], LANE), odd, part)
                            parts = _replaced(parts, j * ROWS + r, part, ROWS * TOKENS)
                group = group_of(of_scale * HALVES + h, g * TOGETHER * APART, EACH, WIDE, GROUP)[:, None]
                for r in tl.static_range(ROWS):
                    for j in tl.static_range(TOKENS):
                        part = parts[j * ROWS + r]
                        if GROUP > 0:
                            part *= load_scale(scales[r] + group, None, SCALE)[:, :, None]
                        if UNITS and not EVEN:
                            part = tl.where((start + split < blocks)[:, None, None], part, 0.0)
                        accs = _replaced(accs, j * ROWS + r, accs[j * ROWS + r] + part, ROWS * TOKENS)
    factor = tl.load(whole_ptr)
    for r in tl.static_range(ROWS):
        columns = (first + HIGH * r + tl.arange(0, HIGH)).to(tl.int64)
        rows = _each_of(first + HIGH * r, n, GATED)
        times = factor * GAIN + tl.zeros([16], tl.float32)
        if GROUP == 0:
            times *= load_scale(scale_ptr + rows * scale_stride, None, SCALE)
        times = tl.where(blocks > 0, times, 0.0)  # of nothing, whatever the scales are
        for j in tl.static_range(TOKENS):
            found = tl.sum(accs[j * ROWS + r], axis=0) * times[:, None]
            if bias_ptr is not None:
                found += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
            if GATED:
                gate, up = tl.split(found.reshape(2, 8, 8).permute(1, 2, 0))
                found = activated(gate, ACT) * up
            tokens = 8 * j + tl.arange(0, 8)
            at = tokens.to(tl.int64)[None, :] * n + columns[:, None]
            tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty),
                     mask=(columns < n)[:, None] & (tokens < m)[None, :])  # fmt: skip


@triton.jit
def blocks_of(k, BITS: tl.constexpr, GROUP: tl.constexpr):
    """How many blocks k columns have, of three bits pairs of them."""
    if BITS == 3:
        found = tl.cdiv(k, 256)
    else:
        found = tl.cdiv(k, 128) * ((BITS // 4 if BITS > 4 else 1) * (2 if BITS >= 4 and GROUP == 32 else 1))
    return found


@triton.jit
def fragments(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, m, n, k, x_stride,
              w_stride, upper_stride, scale_stride, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
              GROUP: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr, ASM_ODD: tl.constexpr, GAIN: tl.constexpr,
              TO: tl.constexpr, EVEN: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
              S: tl.constexpr, ACT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """x [m, k] to out [m, n] = x @ w^T + bias; a program for `columns_of(ACT)` ROWS columns of out and 8 TOKENS
    rows, m at most.

    ACT: weights have 2 n rows, and out is ACT of the product with the first n, times that with the others.

    Integers less their zero points are exact in the type TO, values of a table rounded to it; products are added in
    f32. ASM gives values over GAIN. S: parts of K, one for a warp. UNITS: blocks hold k columns and no more. EVEN: and
    all S have as many.
    """
    wait_for_earlier(EARLY)
    fragment_tile(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr,
                  tl.program_id(0) * (columns_of(ACT) * ROWS), blocks_of(k, BITS, GROUP), m, n, k, x_stride,
                  w_stride, upper_stride, scale_stride, BITS, KIND, SCALE, GROUP, OFFSET, ASM, ASM_ODD, GAIN, TO, EVEN,
                  UNITS, ROWS, TOKENS, S, ACT)  # fmt: skip
