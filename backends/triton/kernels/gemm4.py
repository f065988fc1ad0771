"""Products of int8 activations and weights of 2, 4 or 8 bits on the tensor cores for int8: exact int32 sums.

A code of BITS stays in the upper bits of its byte, which makes it 2^(8 - BITS) times as large: a shift and a mask give
an operand, and sums are exact multiples. Weights are [n, bytes of k] in units of SUB bytes (see `layout.pack_halves`):
a shift gives the codes of SUB neighbours in k, times their own SUB columns of x. The weight is the left operand, so
that few rows of x fill an instruction, and that the unpacked codes can go from registers into it.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.epilogue import finish
from qfx.backends.triton.kernels.gemm8 import scaled, tile_at

# Four bytes shifted left and masked as one register; byte by byte it takes six times the instructions.
_FOUR_BITS_0 = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }")
_TWO_BITS_0 = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 6; and.b32 $0, t, 0xC0C0C0C0; }")
_TWO_BITS_1 = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xC0C0C0C0; }")
_TWO_BITS_2 = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 2; and.b32 $0, t, 0xC0C0C0C0; }")
_FOUR_BITS_1 = tl.constexpr("and.b32 $0, $1, 0xF0F0F0F0;")
_TWO_BITS_3 = tl.constexpr("and.b32 $0, $1, 0xC0C0C0C0;")


@triton.jit
def _by_register(data, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r", [data], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def raised(data, PART: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Code number PART of every byte, two's complement of BITS, times 2^(8 - BITS), as int8. ASM: by assembly."""
    if BITS == 8:
        codes = data.to(tl.int8, bitcast=True)
    elif not ASM:
        if PART < 8 // BITS - 1:
            data = data << (8 - BITS * (PART + 1))
        codes = (data & (256 - (1 << (8 - BITS)))).to(tl.int8, bitcast=True)
    elif BITS == 4:
        codes = _by_register(data, _FOUR_BITS_0 if PART == 0 else _FOUR_BITS_1)
    elif PART < 2:
        codes = _by_register(data, _TWO_BITS_0 if PART == 0 else _TWO_BITS_1)
    else:
        codes = _by_register(data, _TWO_BITS_2 if PART == 2 else _TWO_BITS_3)
    return codes


@triton.jit
def input_tile(x_at, first, k, SUB: tl.constexpr, EVEN_K: tl.constexpr):
    """Columns first to first + SUB of x, zero from k on; x_at: pointers of columns 0 to SUB."""
    if EVEN_K:
        x = tl.load(x_at + first)
    else:
        x = tl.load(x_at + first, mask=(first + tl.arange(0, SUB) < k)[None, :], other=0)
    return x


@triton.jit
def whole_sums(x_at, w_at, zero_at, k, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUB: tl.constexpr,
               BITS: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Units begin to end: int32 [BLOCK_N, BLOCK_M], sums of products of codes. w_at: bytes of unit `begin`.

    zero_at: int32, [BLOCK_N], taken off the codes, or None. The sums of x that this needs are a product with ones.
    """
    PARTS: tl.constexpr = 8 // BITS
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    ones = tl.full([BLOCK_N, SUB], 1, tl.int8)
    for unit in range(begin, end):
        data = tl.load(w_at)
        for part in tl.static_range(PARTS):
            x = input_tile(x_at, (unit * PARTS + part) * SUB, k, SUB, EVEN_K)
            acc = tl.dot(raised(data, part, BITS, ASM), tl.trans(x), acc, out_dtype=tl.int32)
            if zero_at is not None:
                sums = tl.dot(ones, tl.trans(x), sums, out_dtype=tl.int32)
        w_at += SUB
    acc = acc >> (8 - BITS)
    if zero_at is not None:
        acc -= tl.load(zero_at)[:, None] * sums
    return acc


@triton.jit
def group_sums(x_at, w_at, scale_at, zero_at, sums_at, n, m, k, begin, end, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, SUB: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
               ASM: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """The same in f32, each group exact and times its scale. scale_at, zero_at: [BLOCK_N] of group 0, rows of n apart.

    zero_at int8, or None; sums_at: int32 sums of SUB columns of x, [BLOCK_M] of the first, rows of m apart, or None.
    """
    ones = tl.full([BLOCK_N, SUB], 1, tl.int8)
    PARTS: tl.constexpr = 8 // BITS
    TIMES: tl.constexpr = 1 << (8 - BITS)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in range(begin, end):
        data = tl.load(w_at)
        for part in tl.static_range(PARTS):
            number = unit * PARTS + part
            first = number * SUB
            group = (first // GROUP).to(tl.int64)
            x = input_tile(x_at, first, k, SUB, EVEN_K)
            found = tl.dot(raised(data, part, BITS, ASM), tl.trans(x)).to(tl.float32)
            scale = tl.load(scale_at + group * n).to(tl.float32) * (1.0 / TIMES)
            if zero_at is not None:
                zero = tl.load(zero_at + group * n).to(tl.float32) * TIMES
                if sums_at is None:
                    sums = tl.dot(ones, tl.trans(x)).to(tl.float32)
                else:
                    sums = tl.load(sums_at + number.to(tl.int64) * m).to(tl.float32)[None, :]
                found -= zero[:, None] * sums
            acc += found * scale[:, None]
        w_at += SUB
    return acc


@triton.jit(do_not_specialize_on_alignment=["m"])
def gemm4(x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
          residual_ptr, m, n, k, x_stride, w_stride, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          BITS: tl.constexpr, SUB: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr,
          EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
          SPLIT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Grid (tiles, SPLIT). x int8 [m, k] of rows x_stride apart, w bytes [n, w_stride], whole units.

    GROUP 0: a scale per channel, as `gemm8` with w_scale f32 [n], w_zero int32 [n], x_sums int32 [m], w_sums int32 [n].
    Else w_scale [G, n], w_zero int8 [G, n], x_sums int32 [parts, m] of SUB columns, w_sums f32 [n] of values.
    x_sums None with w_zero: found here, which costs as much as the products, for few rows.
    y: activation(x w^T + bias) + residual. SPLIT > 1: y int32 or f32 [SPLIT, m, n], sums of parts of k for `reduce8`.
    """
    wait_for_earlier(EARLY)
    PARTS: tl.constexpr = 8 // BITS
    tile_row, tile_column = tile_at(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, TILES)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.cdiv(k, PARTS * SUB)
    steps = tl.cdiv(units, SPLIT)
    split = tl.program_id(1)
    begin, end = split * steps, tl.minimum(split * steps + steps, units)
    near_row, near_column = tl.minimum(row, m - 1).to(tl.int64), tl.minimum(column, n - 1).to(tl.int64)
    x_at = x_ptr + near_row[:, None] * x_stride + tl.arange(0, SUB)[None, :]
    w_at = w_ptr + near_column[:, None] * w_stride + (begin * SUB + tl.arange(0, SUB))[None, :]
    zero_at = None if w_zero_ptr is None else w_zero_ptr + near_column
    if GROUP:
        sums_at = None if x_sums_ptr is None else x_sums_ptr + near_row
        acc = group_sums(x_at, w_at, w_scale_ptr + near_column, zero_at, sums_at, n, m, k, begin, end,
                         BLOCK_M, BLOCK_N, SUB, BITS, GROUP, ASM, EVEN_K)  # fmt: skip
    else:
        acc = whole_sums(
            x_at, w_at, zero_at if x_sums_ptr is None else None, k, begin, end, BLOCK_M, BLOCK_N, SUB, BITS, ASM, EVEN_K
        )
    acc = tl.trans(acc)
    if SPLIT > 1:
        inside = (row < m)[:, None] & (column < n)[None, :]
        part = y_ptr + split.to(tl.int64) * m * n
        tl.store(part + row.to(tl.int64)[:, None] * n + column[None, :], acc, mask=inside)
    else:
        left = None if GROUP or x_sums_ptr is None else w_zero_ptr
        y = scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, left, w_sums_ptr, row, column, m, n, X_SHIFT,
                   X_PER_ROW, 0, GROUP)  # fmt: skip
        finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)


@triton.jit(do_not_specialize_on_alignment=["m"])
def part_sums(
    x_ptr, sums_ptr, m, k, stride, parts, SUB: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False
):
    """Grid (m, blocks of parts): sums of SUB columns of x int8 [m, k], int32 [parts, m]; zero from k on."""
    wait_for_earlier(EARLY)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = part[:, None] * SUB + tl.arange(0, SUB)[None, :]
    x = tl.load(x_ptr + row * stride + column, mask=column < k, other=0).to(tl.int32)
    tl.store(sums_ptr + part.to(tl.int64) * m + row, tl.sum(x, 1), mask=part < parts)
