"""Rows of x, sorted by expert, times the matrix of their expert: each program finds its expert and rows by itself.

offs int32 [experts] says where the rows of each expert end; it stays on the device. The grid has the least bound that
holds for any of its values, and a program that finds no rows leaves at once. Rows after the last end are those of one
more expert without a matrix, whose sums are over nothing: zeros.

EXPERTS: a power of two above the number of experts. Other arguments: see `weight_only_gemv`, with w [E, N, row bytes]
and so on; whole f32 [E, 2].
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.weight_only import product
from qfx.backends.triton.kernels.weight_only_fragments import blocks_of, fragment_tile
from qfx.backends.triton.kernels.weight_only_gemv import vectors


@triton.jit
def _span(offs_ptr, e, t, experts):
    """(first row, end) of expert e; of number `experts`, those after the last end."""
    first = tl.load(offs_ptr + e - 1, mask=e > 0, other=0)
    end = tl.load(offs_ptr + e, mask=e < experts, other=t)
    return first, tl.minimum(end, t)


@triton.jit
def of_row(offs_ptr, row, t, experts, EXPERTS: tl.constexpr):
    """(expert, first row, end) of the expert that a row belongs to."""
    number = tl.arange(0, EXPERTS)
    ends = tl.load(offs_ptr + number, mask=number < experts, other=0)
    e = tl.sum(((ends <= row) & (number < experts)).to(tl.int32), 0)
    first, end = _span(offs_ptr, e, t, experts)
    return e, first, end


@triton.jit
def of_tile(offs_ptr, tile, t, experts, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end) of tile number `tile`, of up to BM rows of one expert; no rows where first >= end.

    The tiles of expert e begin at number (its first row) // BM + e: far enough from those of the expert before it for
    any number of rows, so that no sum over experts is needed, and t // BM + experts + 1 tiles are enough.
    """
    number = tl.arange(0, EXPERTS)
    starts = tl.load(offs_ptr + number - 1, mask=(number > 0) & (number <= experts), other=0)
    begun = (starts // BM + number <= tile) & (number <= experts)
    e = tl.sum(begun.to(tl.int32), 0) - 1
    first, end = _span(offs_ptr, e, t, experts)
    return e, first + (tile - first // BM - e) * BM, end


@triton.jit
def rows_of_tile(offs_ptr, tile, t, experts, BM: tl.constexpr, BY_ROW: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end) of a tile as `of_tile`, or, BY_ROW, of t tiles, where those of most rows have none."""
    if BY_ROW:
        e, first, end = of_row(offs_ptr, tile, t, experts, EXPERTS)
        row = tl.where((tile - first) % BM == 0, tile, end)
    else:
        e, row, end = of_tile(offs_ptr, tile, t, experts, BM, EXPERTS)
    return e, row, end


@triton.jit
def tile_of_grid(tiles, n, BN: tl.constexpr):
    """(tile of rows, first column of a tile of BN): 8 tiles of rows go along the columns together, see `dot_tiles`."""
    by_n = tl.cdiv(n, BN)
    pid = tl.program_id(0)
    start = pid // (8 * by_n) * 8
    height = tl.minimum(tiles - start, 8)
    return start + pid % (8 * by_n) % height, pid % (8 * by_n) // height * BN


@triton.jit
def _of_expert(w_ptr, upper_ptr, scale_ptr, whole_ptr, e, experts, n, w_stride, upper_stride, scale_stride):
    """The pointers of all experts' tensors as those of expert e, and how far its scales are; of `experts`, of any.

    That of zero points is not among them: Triton 3.6 returns no None.
    """
    held = tl.minimum(e, experts - 1).to(tl.int64)
    further = held * n * scale_stride
    return (w_ptr + held * n * w_stride, upper_ptr + held * n * upper_stride, scale_ptr + further,
            whole_ptr + held * 2, further)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["t"])
def grouped_vectors(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, offs_ptr, out_ptr, t, n, k,
                    experts, x_stride, w_stride, upper_stride, scale_stride, BITS: tl.constexpr, KIND: tl.constexpr,
                    SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr,
                    EXACT: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
                    CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """x [t, k] to out [t, n], grid (cdiv(n, BN), t), multiplied as in `gemv`. ROWS: 1 or 2 of an expert in a program.

    Of 2, the program of every second row takes it and the next; that one's leaves.
    """
    row = tl.program_id(1)
    e, first, end = of_row(offs_ptr, row, t, experts, EXPERTS)
    if (row - first) % ROWS == 0:
        column = tl.program_id(0) * BN
        stop = tl.where(e < experts, w_stride // 16, 0)
        x_ptr += row.to(tl.int64) * x_stride
        out_ptr += row.to(tl.int64) * n
        w_ptr, upper_ptr, scale_ptr, whole_ptr, further = _of_expert(
            w_ptr, upper_ptr, scale_ptr, whole_ptr, e, experts, n, w_stride, upper_stride, scale_stride
        )
        if zero_ptr is not None:
            zero_ptr += further
        if ROWS == 2 and row + 1 < end:
            vectors(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, None, out_ptr, column, n, k,
                    stop, x_stride, w_stride, upper_stride, scale_stride, 2, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE,
                    EXACT, ASM, BN, CHUNKS)  # fmt: skip
        else:
            vectors(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, None, out_ptr, column, n, k,
                    stop, x_stride, w_stride, upper_stride, scale_stride, 1, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE,
                    EXACT, ASM, BN, CHUNKS)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["t", "tiles"])
def grouped_tiles(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, offs_ptr, out_ptr, t, n, k,
                  experts, tiles, x_stride, w_stride, upper_stride, scale_stride, BITS: tl.constexpr,
                  KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                  NATIVE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr, ASM_ODD: tl.constexpr,
                  TO: tl.constexpr, EVEN: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BY_ROW: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """x [t, k] to out [t, n], grid (tiles * cdiv(n, BN),), multiplied as in `dot_tiles`."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 128
    tile, column = tile_of_grid(tiles, n, BN)
    e, row, end = rows_of_tile(offs_ptr, tile, t, experts, BM, BY_ROW, EXPERTS)
    if row < end:
        units = tl.where(e < experts, tl.cdiv(k, UNIT), 0)
        w_ptr, upper_ptr, scale_ptr, whole_ptr, further = _of_expert(
            w_ptr, upper_ptr, scale_ptr, whole_ptr, e, experts, n, w_stride, upper_stride, scale_stride
        )
        if zero_ptr is not None:
            zero_ptr += further
        product(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, None, out_ptr,
                row + tl.arange(0, BM), column + tl.arange(0, BN), 0, units, units, end, n, k, x_stride, w_stride,
                upper_stride, scale_stride, BITS, KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM, ASM_ODD, TO, EVEN, 1,
                FIRST, BM, BN)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["t", "tiles"])
def grouped_fragments(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, offs_ptr, out_ptr, t, n, k,
                      experts, tiles, x_stride, w_stride, upper_stride, scale_stride, BITS: tl.constexpr,
                      KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
                      ASM: tl.constexpr, ASM_ODD: tl.constexpr, GAIN: tl.constexpr, TO: tl.constexpr,
                      EVEN: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                      S: tl.constexpr, BY_ROW: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """x [t, k] to out [t, n], grid (tiles * cdiv(n, 16 ROWS),), multiplied as in `fragments`."""
    tile, column = tile_of_grid(tiles, n, 16 * ROWS)
    e, row, end = rows_of_tile(offs_ptr, tile, t, experts, 8 * TOKENS, BY_ROW, EXPERTS)
    if row < end:
        blocks = tl.where(e < experts, blocks_of(k, BITS, GROUP), 0)
        x_ptr += row.to(tl.int64) * x_stride
        out_ptr += row.to(tl.int64) * n
        w_ptr, upper_ptr, scale_ptr, whole_ptr, further = _of_expert(
            w_ptr, upper_ptr, scale_ptr, whole_ptr, e, experts, n, w_stride, upper_stride, scale_stride
        )
        if zero_ptr is not None:
            zero_ptr += further
        fragment_tile(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, None, out_ptr,
                      column, blocks, end - row, n, k, x_stride, w_stride, upper_stride, scale_stride, BITS, KIND,
                      SCALE, GROUP, OFFSET, ASM, ASM_ODD, GAIN, TO, EVEN, UNITS, ROWS, TOKENS, S, "")  # fmt: skip
