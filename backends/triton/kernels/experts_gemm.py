"""Codes of rows, sorted by expert, times those of the matrix of their expert: integers exactly, e4m3 with f32 sums.

How a program finds its expert and rows: see `experts`. Operands and epilogues are those of `gemm4` and `gemm8`, with
experts in front of all tensors of the weight; there are as many parts of k as one. Rows after the last end give zeros.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.epilogue import finish
from qfx.backends.triton.kernels.experts import rows_of_tile, tile_of_grid
from qfx.backends.triton.kernels.gemm4 import group_sums, whole_sums
from qfx.backends.triton.kernels.gemm8 import e4m3_sums, scaled


@triton.jit(do_not_specialize_on_alignment=["t", "tiles"])
def grouped_integers(x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
                     offs_ptr, t, n, k, experts, tiles, x_stride, w_stride, groups, X_SHIFT: tl.constexpr,
                     X_PER_ROW: tl.constexpr, BITS: tl.constexpr, SUB: tl.constexpr, GROUP: tl.constexpr,
                     ASM: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BY_ROW: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """Grid (tiles * cdiv(n, BLOCK_N),), arguments as of `gemm4`; groups: those of a matrix, 1 where GROUP is 0."""
    PARTS: tl.constexpr = 8 // BITS
    tile, first = tile_of_grid(tiles, n, BLOCK_N)
    e, start, end = rows_of_tile(offs_ptr, tile, t, experts, BLOCK_M, BY_ROW, EXPERTS)
    if start < end:
        row = start + tl.arange(0, BLOCK_M)
        column = first + tl.arange(0, BLOCK_N)
        units = tl.where(e < experts, tl.cdiv(k, PARTS * SUB), 0)
        held = tl.minimum(e, experts - 1).to(tl.int64) * n
        near_row, near_column = tl.minimum(row, end - 1).to(tl.int64), tl.minimum(column, n - 1).to(tl.int64)
        x_at = x_ptr + near_row[:, None] * x_stride + tl.arange(0, SUB)[None, :]
        w_at = w_ptr + held * w_stride + near_column[:, None] * w_stride + tl.arange(0, SUB)[None, :]
        w_scale_ptr += held * groups
        w_sums_at = None if w_sums_ptr is None else w_sums_ptr + held
        zero_ptr = None if w_zero_ptr is None else w_zero_ptr + held * groups
        zero_at = None if w_zero_ptr is None else zero_ptr + near_column
        if GROUP:
            sums_at = None if x_sums_ptr is None else x_sums_ptr + near_row
            acc = group_sums(x_at, w_at, w_scale_ptr + near_column, zero_at, sums_at, n, t, k, 0, units, BLOCK_M,
                             BLOCK_N, SUB, BITS, GROUP, ASM, EVEN_K)  # fmt: skip
        else:
            acc = whole_sums(x_at, w_at, zero_at if x_sums_ptr is None else None, k, 0, units, BLOCK_M, BLOCK_N, SUB,
                             BITS, ASM, EVEN_K)  # fmt: skip
        left = None if GROUP or x_sums_ptr is None else zero_ptr
        y = scaled(tl.trans(acc), x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, left, w_sums_at, row, column, end,
                   n, X_SHIFT, X_PER_ROW, 0, GROUP)  # fmt: skip
        y = tl.where(e < experts, y, 0.0)
        finish(y, y_ptr, None, None, row, column, end, n, "")


@triton.jit(do_not_specialize_on_alignment=["t", "tiles"])
def grouped_e4m3(x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, offs_ptr, t, n, k, experts, tiles, x_stride, x_groups,
                 w_groups, w_scales, X_PER_ROW: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr,
                 W_ROWS: tl.constexpr, BY_HAND: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, BY_ROW: tl.constexpr,
                 EXPERTS: tl.constexpr):  # fmt: skip
    """Grid (tiles * cdiv(n, BLOCK_N),), arguments as of `gemm8`; w_scales: scales of a matrix."""
    W_WHOLE: tl.constexpr = W_ROWS % BLOCK_N == 0
    tile, first = tile_of_grid(tiles, n, BLOCK_N)
    e, start, end = rows_of_tile(offs_ptr, tile, t, experts, BLOCK_M, BY_ROW, EXPERTS)
    if start < end:
        row = start + tl.arange(0, BLOCK_M)
        column = first + tl.arange(0, BLOCK_N)
        steps = tl.where(e < experts, tl.cdiv(k, BLOCK_K), 0)
        held = tl.minimum(e, experts - 1).to(tl.int64)
        at_k = tl.arange(0, BLOCK_K)[None, :]
        near_row, near = tl.minimum(row, end - 1).to(tl.int64), tl.minimum(column, n - 1)
        x_at = x_ptr + near_row[:, None] * x_stride + at_k
        w_at = w_ptr + held * n * k + near.to(tl.int64)[:, None] * k + at_k
        w_scale_ptr += held * w_scales
        scaled_by = first if W_WHOLE else near
        w_scale_at = w_scale_ptr + scaled_by // W_ROWS * w_groups
        rows = row < end if SWAP else None
        acc, _ = e4m3_sums(x_at, w_at, w_at, x_scale_ptr + near_row * x_groups, w_scale_at, w_scale_at, rows, k, 0,
                           steps, BLOCK_M, BLOCK_N, BLOCK_K, 1, SWAP, EVEN_K, X_GROUP, W_GROUP, W_WHOLE,
                           BY_HAND)  # fmt: skip
        y = scaled(acc, x_scale_ptr, None, None, w_scale_ptr, None, None, row, column, end, n, 0, X_PER_ROW, X_GROUP,
                   W_GROUP)  # fmt: skip
        y = tl.where(e < experts, y, 0.0)
        finish(y, y_ptr, None, None, row, column, end, n, "")
