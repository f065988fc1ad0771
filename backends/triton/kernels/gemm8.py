"""Products of two 8-bit matrices, y [m, n] = x [m, k] w [n, k]^T: int8 with exact int32 sums, and e4m3.

Both operands have k contiguous and rows that begin at multiples of 16 bytes, k a multiple of 16.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.epilogue import finish
from qfx.backends.triton.kernels.rounding import f16_of_e4m3

_E4M3_SQUARED = tl.constexpr(65536.0)  # of two values over 256, see `f16_of_e4m3`


@triton.jit
def tile_at(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number to (tile row, tile column): GROUP rows go along the columns together, and so share w in the L2."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def int8_sums(x_at, w_at, k, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
              SWAP: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Steps begin to end of BLOCK_K over k: int32 [BLOCK_M, BLOCK_N]. x_at, w_at: pointers of the first tiles.

    SWAP: w is the left operand, so that few rows of x fill an instruction.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.int32)
    for step in range(begin, end):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = (tl.arange(0, BLOCK_K) < k - step * BLOCK_K)[None, :]
            x, w = tl.load(x_at, mask=inside, other=0), tl.load(w_at, mask=inside, other=0)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(w), acc)
        x_at += BLOCK_K
        w_at += BLOCK_K
    return tl.trans(acc) if SWAP else acc


@triton.jit
def e4m3_sums(x_at, w_at, x_scale_at, w_scale_at, k, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, X_GROUP: tl.constexpr,
              W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """As `int8_sums`, f32. The tensor core's own sums, which lose bits, go to f32 every 128 of k or more often.

    X_GROUP, W_GROUP: of how many k a scale is, or 0; such scales multiply those sums. x_scale_at [BLOCK_M]: pointers
    of the first; w_scale_at [BLOCK_N], or one where a block of W_ROWS holds the tile. BY_HAND: the operands are bytes,
    decoded to f16.
    """
    PROMOTE: tl.constexpr = 128 if BLOCK_K >= 128 else BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    for step in range(begin, end):
        if EVEN_K:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside = (tl.arange(0, BLOCK_K) < k - step * BLOCK_K)[None, :]
            x, w = tl.load(x_at, mask=inside, other=0.0), tl.load(w_at, mask=inside, other=0.0)
        if BY_HAND:
            x, w = f16_of_e4m3(x), f16_of_e4m3(w)
        a, b = (w, tl.trans(x)) if SWAP else (x, tl.trans(w))
        if X_GROUP or W_GROUP:
            part = tl.dot(a, b)
            if X_GROUP:
                scale = tl.load(x_scale_at + step * BLOCK_K // X_GROUP)
                part *= scale[None, :] if SWAP else scale[:, None]
            if W_GROUP:
                scale = tl.load(w_scale_at + step * BLOCK_K // W_GROUP)
                if W_ROWS % BLOCK_N == 0:
                    part *= scale
                else:
                    part *= scale[:, None] if SWAP else scale[None, :]
            acc += part
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=0 if BY_HAND else PROMOTE)
        x_at += BLOCK_K
        w_at += BLOCK_K
    if BY_HAND:
        acc *= _E4M3_SQUARED
    return tl.trans(acc) if SWAP else acc


@triton.jit
def scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, row, column, m, n,
           X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr):  # fmt: skip
    """Sums of codes to f32 values. Zero points, exactly: sum (x - a)(w - b) = sum xw - b sum x - a sum (w - b)."""
    row, column = tl.minimum(row, m - 1), tl.minimum(column, n - 1)
    if w_zero_ptr is not None:
        acc -= tl.load(x_sums_ptr + row)[:, None] * tl.load(w_zero_ptr + column)[None, :]
    if x_zero_ptr is not None:
        zero = tl.load(x_zero_ptr + (row if X_PER_ROW else 0 * row)).to(tl.int32) - X_SHIFT
        acc -= zero[:, None] * tl.load(w_sums_ptr + column)[None, :]
    y = acc.to(tl.float32)
    if not X_GROUP:
        y *= tl.load(x_scale_ptr + (row if X_PER_ROW else 0 * row))[:, None]
    if not W_GROUP:
        y *= tl.load(w_scale_ptr + column)[None, :]
    return y


@triton.jit
def _tile(tile, split, x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
          bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
          BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
          SWAP: tl.constexpr):  # fmt: skip
    tile_row, tile_column = tile_at(tile, m, n, BLOCK_M, BLOCK_N, GROUP)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_column * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT)
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(k, BLOCK_K))
    near_row, near_column = tl.minimum(row, m - 1).to(tl.int64), tl.minimum(column, n - 1).to(tl.int64)
    at_k = begin * BLOCK_K + tl.arange(0, BLOCK_K)
    x_at = x_ptr + near_row[:, None] * x_stride + at_k[None, :]
    w_at = w_ptr + near_column[:, None] * k + at_k[None, :]
    if FLOAT:
        x_scale_at = x_scale_ptr + tl.minimum(row, m - 1) * x_groups
        if W_ROWS % BLOCK_N == 0:
            w_scale_at = w_scale_ptr + tile_column * BLOCK_N // W_ROWS * w_groups
        else:
            w_scale_at = w_scale_ptr + tl.minimum(column, n - 1) // W_ROWS * w_groups
        acc = e4m3_sums(x_at, w_at, x_scale_at, w_scale_at, k, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K,
                        X_GROUP, W_GROUP, W_ROWS, BY_HAND)  # fmt: skip
    else:
        acc = int8_sums(x_at, w_at, k, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN_K)
    if SPLIT > 1:
        inside = (row < m)[:, None] & (column < n)[None, :]
        part = y_ptr + split.to(tl.int64) * m * n
        tl.store(part + row.to(tl.int64)[:, None] * n + column[None, :], acc, mask=inside)
    else:
        y = scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, row, column, m, n,
                   X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP)  # fmt: skip
        finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)


@triton.jit
def gemm8(x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
          residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
          BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, SWAP: tl.constexpr,
          PERSISTENT: tl.constexpr):  # fmt: skip
    """Grid (tiles, SPLIT), or (programs, 1) where PERSISTENT: each goes through every programs-th tile.

    x [m, k] of rows x_stride apart, w [n, k]: int8, or e4m3 (FLOAT; as bytes where BY_HAND). x_scale f32 [m]
    (X_PER_ROW) or [1], or [m, x_groups]; w_scale f32 [n], or [n / W_ROWS, w_groups]; x_zero uint8, as many as
    x_scale, less X_SHIFT; x_sums int32 [m] of codes; w_zero int32 [n]; w_sums int32 [n] of codes less w_zero; bias [n];
    residual [m, n].
    y: activation(x w^T + bias) + residual. SPLIT > 1: y int32 or f32 [SPLIT, m, n], sums of parts of k for `reduce8`.
    """
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(tile, 0, x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr,
                  w_sums_ptr, bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT, X_PER_ROW,
                  X_GROUP, W_GROUP, W_ROWS, FLOAT, BY_HAND, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
                  SPLIT, SWAP)  # fmt: skip
    else:
        _tile(tl.program_id(0), tl.program_id(1), x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr,
              w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups,
              X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, W_ROWS, FLOAT, BY_HAND, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N,
              BLOCK_K, GROUP, SPLIT, SWAP)  # fmt: skip


@triton.jit
def reduce8(parts_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
            residual_ptr, m, n, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr, X_GROUP: tl.constexpr,
            W_GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """Grid (tile rows, tile columns): parts [SPLIT, m, n] of `gemm8`, added in their order, to y [m, n]."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    at = parts_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    acc = tl.load(at, mask=inside, other=0)
    for _ in tl.static_range(1, SPLIT):
        at += tl.full([], 1, tl.int64) * m * n
        acc += tl.load(at, mask=inside, other=0)
    y = scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, row, column, m, n,
               X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP)  # fmt: skip
    finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)
