"""The products of `gemm8` whose operands come by tensor descriptors: the copies of tiles run beside the tensor cores.

One thread asks for a tile, the memory unit lays it into shared memory as wgmma reads it and fills zeros beyond the
edges. For compute capability 9.0; of many rows.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.gemm8 import E4M3_SQUARED, added, e4m3_added, ended, tile_at
from qfx.backends.triton.kernels.rounding import f16_of_e4m3


@triton.jit
def _int8_sums(x, w, row, column, k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
               HALVES: tl.constexpr):  # fmt: skip
    """int32 [BLOCK_M, BLOCK_N] of the rows of x from `row`, of w from `column` on; those of the next half of w."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    other = acc
    for step in range(tl.cdiv(k, BLOCK_K)):
        codes = x.load([row, step * BLOCK_K])
        acc = added(acc, codes, w.load([column, step * BLOCK_K]), False, None)
        if HALVES == 2:
            other = added(other, codes, w.load([column + BLOCK_N, step * BLOCK_K]), False, None)
    return acc, other


@triton.jit
def _e4m3_sums(x, w, row, column, x_scale_at, w_scale_at, v_scale_at, k, BLOCK_M: tl.constexpr,
               BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, X_GROUP: tl.constexpr,
               W_GROUP: tl.constexpr, W_WHOLE: tl.constexpr, BY_HAND: tl.constexpr,
               PROMOTE: tl.constexpr):  # fmt: skip
    """As `_int8_sums`, f32; scales and PROMOTE as in `gemm8.e4m3_sums`."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    other = acc
    for step in range(tl.cdiv(k, BLOCK_K)):
        if HALVES == 2:  # first, so that nothing is waited for between the halves
            more = w.load([column + BLOCK_N, step * BLOCK_K])
        codes, half = x.load([row, step * BLOCK_K]), w.load([column, step * BLOCK_K])
        if BY_HAND:
            codes, half = f16_of_e4m3(codes), f16_of_e4m3(half)
        acc = e4m3_added(acc, codes, half, x_scale_at, w_scale_at, step * BLOCK_K, False, X_GROUP, W_GROUP, W_WHOLE,
                         PROMOTE)  # fmt: skip
        if HALVES == 2:
            if BY_HAND:
                more = f16_of_e4m3(more)
            other = e4m3_added(other, codes, more, x_scale_at, v_scale_at, step * BLOCK_K, False, X_GROUP, W_GROUP,
                               W_WHOLE, PROMOTE)  # fmt: skip
    if BY_HAND:
        acc *= E4M3_SQUARED
        other *= E4M3_SQUARED
    return acc, other


@triton.jit
def _tile(tile, x, w, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
          residual_ptr, m, n, k, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
          BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
          BLOCK_K: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr, PROMOTE: tl.constexpr):  # fmt: skip
    tile_row, tile_column = tile_at(tile, m, n, BLOCK_M, BLOCK_N * HALVES, GROUP)
    first_row, first = tile_row * BLOCK_M, tile_column * BLOCK_N * HALVES
    row = first_row + tl.arange(0, BLOCK_M)
    if FLOAT:
        W_WHOLE: tl.constexpr = W_ROWS % BLOCK_N == 0
        column = first if W_WHOLE else first + tl.arange(0, BLOCK_N)
        near, far = tl.minimum(column, n - 1), tl.minimum(column + BLOCK_N, n - 1)
        acc, other = _e4m3_sums(x, w, first_row, first, x_scale_ptr + tl.minimum(row, m - 1) * x_groups,
                                w_scale_ptr + near // W_ROWS * w_groups, w_scale_ptr + far // W_ROWS * w_groups, k,
                                BLOCK_M, BLOCK_N, BLOCK_K, HALVES, X_GROUP, W_GROUP, W_WHOLE, BY_HAND,
                                PROMOTE)  # fmt: skip
    else:
        acc, other = _int8_sums(x, w, first_row, first, k, BLOCK_M, BLOCK_N, BLOCK_K, HALVES)
    ended(acc, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, residual_ptr,
          0, row, first, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION, 1)  # fmt: skip
    if HALVES == 2:
        ended(other, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
              residual_ptr, 0, row, first + BLOCK_N, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION,
              1)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["m"])
def gemm8_described(x, w, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
                    residual_ptr, m, n, k, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
                    X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
                    BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr, PERSISTENT: tl.constexpr,
                    PROMOTE: tl.constexpr):  # fmt: skip
    """Grid (tiles,), or (programs,) where PERSISTENT: each goes through every programs-th tile.

    x [m, k], w [n, k]: descriptors of blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K]; all else as in `gemm8`, of one
    part. PERSISTENT flattens the loops, so that the first tiles of operands come while the last results go.
    PROMOTE: after how many products of e4m3 the tensor core's sums go to f32; None: at the end.
    """
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N * HALVES)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(tile, x, w, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
                  bias_ptr, residual_ptr, m, n, k, x_groups, w_groups, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, W_ROWS,
                  FLOAT, BY_HAND, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, GROUP, PROMOTE)  # fmt: skip
    else:
        _tile(tl.program_id(0), x, w, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
              bias_ptr, residual_ptr, m, n, k, x_groups, w_groups, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, W_ROWS,
              FLOAT, BY_HAND, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, GROUP, PROMOTE)  # fmt: skip
