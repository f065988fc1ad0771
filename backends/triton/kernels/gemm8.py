"""Products of two 8-bit matrices, y [m, n] = x [m, k] w [n, k]^T: int8 with exact int32 sums, and e4m3.

Both operands have k contiguous and rows that begin at multiples of 16 bytes, k a multiple of 16.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.epilogue import finish
from qfx.backends.triton.kernels.rounding import f16_of_e4m3

E4M3_SQUARED = tl.constexpr(65536.0)  # of two values over 256, see `f16_of_e4m3`


@triton.jit
def tile_at(tile, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile number to (tile row, tile column): GROUP rows go along the columns together, and so share w in the L2."""
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = tile % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def _loaded(at, rows, left, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of an operand; zero where fewer than BLOCK_K of k are left. rows: those that are read, None for all."""
    if rows is not None:
        if EVEN_K:
            tile = tl.load(at, mask=rows[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=rows[:, None] & (tl.arange(0, BLOCK_K) < left)[None, :], other=0.0)
    elif EVEN_K:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(tl.arange(0, BLOCK_K) < left)[None, :], other=0.0)
    return tile


@triton.jit
def added(acc, x, w, SWAP: tl.constexpr, PROMOTE: tl.constexpr):
    """acc + x w^T, or acc + w x^T (SWAP).

    PROMOTE: after how many products of e4m3 the tensor core's own sum goes to acc; None: at the end.
    """
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, max_num_imprecise_acc=PROMOTE, out_dtype=acc.dtype)
    else:
        acc = tl.dot(x, tl.trans(w), acc, max_num_imprecise_acc=PROMOTE, out_dtype=acc.dtype)
    return acc


@triton.jit
def int8_sums(x_at, w_at, v_at, rows, k, begin, end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_K: tl.constexpr, HALVES: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """Steps begin to end of BLOCK_K over k: int32 [BLOCK_M, BLOCK_N], twice. x_at, w_at: pointers of the first tiles.

    rows [BLOCK_M]: those of x that are read, or None. SWAP: w is the left operand, so that few rows of x fill an
    instruction. HALVES 2: v_at points to a second tile of w,
    whose sums are the second result; both tiles then share what is read of x.
    """
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.int32)
    other = acc
    for step in range(begin, end):
        x = _loaded(x_at, rows, k - step * BLOCK_K, EVEN_K, BLOCK_K)
        acc = added(acc, x, _loaded(w_at, None, k - step * BLOCK_K, EVEN_K, BLOCK_K), SWAP, None)
        if HALVES == 2:
            other = added(other, x, _loaded(v_at, None, k - step * BLOCK_K, EVEN_K, BLOCK_K), SWAP, None)
            v_at += BLOCK_K
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SWAP:
        acc, other = tl.trans(acc), tl.trans(other)
    return acc, other


@triton.jit
def e4m3_added(acc, x, w, x_scale_at, w_scale_at, start, SWAP: tl.constexpr, X_GROUP: tl.constexpr,
                W_GROUP: tl.constexpr, W_WHOLE: tl.constexpr, PROMOTE: tl.constexpr):  # fmt: skip
    """As `added`, with the scales of the products from `start` on; W_WHOLE: one serves the whole tile of w."""
    if X_GROUP or W_GROUP:
        part = added(tl.zeros_like(acc), x, w, SWAP, None)  # of at most 128 of k: no need to promote within
        if X_GROUP:
            scale = tl.load(x_scale_at + start // X_GROUP)
            part *= scale[None, :] if SWAP else scale[:, None]
        if W_GROUP:
            scale = tl.load(w_scale_at + start // W_GROUP)
            if W_WHOLE:
                part *= scale
            else:
                part *= scale[:, None] if SWAP else scale[None, :]
        acc += part
    else:
        acc = added(acc, x, w, SWAP, PROMOTE)
    return acc


@triton.jit
def e4m3_sums(x_at, w_at, v_at, x_scale_at, w_scale_at, v_scale_at, rows, k, begin, end, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, SWAP: tl.constexpr,
              EVEN_K: tl.constexpr, X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_WHOLE: tl.constexpr,
              BY_HAND: tl.constexpr):  # fmt: skip
    """As `int8_sums`, f32. The tensor core's own sums, which lose bits, go to f32 every 128 of k or more often.

    X_GROUP, W_GROUP: of how many k a scale is, or 0; such scales multiply those sums. x_scale_at [BLOCK_M]: pointers
    of the first; w_scale_at, v_scale_at [BLOCK_N], or one (W_WHOLE). BY_HAND: the operands are bytes, decoded to f16.
    """
    PROMOTE: tl.constexpr = None if BY_HAND else (128 if BLOCK_K >= 128 else BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    other = acc
    for step in range(begin, end):
        x = _loaded(x_at, rows, k - step * BLOCK_K, EVEN_K, BLOCK_K)
        w = _loaded(w_at, None, k - step * BLOCK_K, EVEN_K, BLOCK_K)
        if BY_HAND:
            x, w = f16_of_e4m3(x), f16_of_e4m3(w)
        acc = e4m3_added(acc, x, w, x_scale_at, w_scale_at, step * BLOCK_K, SWAP, X_GROUP, W_GROUP, W_WHOLE, PROMOTE)
        if HALVES == 2:
            v = _loaded(v_at, None, k - step * BLOCK_K, EVEN_K, BLOCK_K)
            if BY_HAND:
                v = f16_of_e4m3(v)
            other = e4m3_added(other, x, v, x_scale_at, v_scale_at, step * BLOCK_K, SWAP, X_GROUP, W_GROUP, W_WHOLE,
                                PROMOTE)  # fmt: skip
            v_at += BLOCK_K
        x_at += BLOCK_K
        w_at += BLOCK_K
    if BY_HAND:
        acc *= E4M3_SQUARED
        other *= E4M3_SQUARED
    if SWAP:
        acc, other = tl.trans(acc), tl.trans(other)
    return acc, other


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
def ended(acc, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
           residual_ptr, split, row, first, m, n, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
           X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The sums of a tile from column `first` on to y, or as they are to the part `split` of the workspace y."""
    WIDTH: tl.constexpr = acc.shape[1]
    column = first + tl.arange(0, WIDTH)
    if SPLIT > 1:
        inside = (row < m)[:, None] & (column < n)[None, :]
        part = y_ptr + split.to(tl.int64) * m * n
        tl.store(part + row.to(tl.int64)[:, None] * n + column[None, :], acc, mask=inside)
    elif WIDTH >= 128:  # in two parts, so that what is read for the columns fits the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, WIDTH // 2)), (0, 2, 1)))
        ended(left, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
               residual_ptr, split, row, first, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION,
               SPLIT)  # fmt: skip
        ended(right, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
               residual_ptr, split, row, first + WIDTH // 2, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION,
               SPLIT)  # fmt: skip
    else:
        y = scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, row, column, m, n,
                   X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP)  # fmt: skip
        finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)


@triton.jit
def _tile(tile, split, x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr,
          bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
          BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
          SWAP: tl.constexpr):  # fmt: skip
    tile_row, tile_column = tile_at(tile, m, n, BLOCK_M, BLOCK_N * HALVES, GROUP)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile_column * BLOCK_N * HALVES
    column = first + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT)
    begin = split * steps
    end = tl.minimum(begin + steps, tl.cdiv(k, BLOCK_K))
    at_k = (begin * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    near, far = tl.minimum(column, n - 1), tl.minimum(column + BLOCK_N, n - 1)
    x_at = x_ptr + tl.minimum(row, m - 1).to(tl.int64)[:, None] * x_stride + at_k
    w_at = w_ptr + near.to(tl.int64)[:, None] * k + at_k
    v_at = w_ptr + far.to(tl.int64)[:, None] * k + at_k
    rows = row < m if SWAP else None  # of many rows the last tile reads one again
    if FLOAT:
        W_WHOLE: tl.constexpr = W_ROWS % BLOCK_N == 0
        if W_WHOLE:
            near, far = first, tl.minimum(first + BLOCK_N, n - 1)
        acc, other = e4m3_sums(x_at, w_at, v_at, x_scale_ptr + tl.minimum(row, m - 1) * x_groups,
                               w_scale_ptr + near // W_ROWS * w_groups, w_scale_ptr + far // W_ROWS * w_groups, rows, k,
                               begin, end, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, SWAP, EVEN_K, X_GROUP, W_GROUP, W_WHOLE,
                               BY_HAND)  # fmt: skip
    else:
        acc, other = int8_sums(x_at, w_at, v_at, rows, k, begin, end, BLOCK_M, BLOCK_N, BLOCK_K, HALVES, SWAP, EVEN_K)
    ended(acc, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
           residual_ptr, split, row, first, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION, SPLIT)  # fmt: skip
    if HALVES == 2:
        ended(other, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
               residual_ptr, split, row, first + BLOCK_N, m, n, X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, ACTIVATION,
               SPLIT)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["m"])
def gemm8(x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
          residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr,
          X_GROUP: tl.constexpr, W_GROUP: tl.constexpr, W_ROWS: tl.constexpr, FLOAT: tl.constexpr,
          BY_HAND: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
          SWAP: tl.constexpr, PERSISTENT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Grid (tiles, SPLIT), or (programs, 1) where PERSISTENT: each goes through every programs-th tile.

    A tile has BLOCK_M rows and HALVES times BLOCK_N columns.

    x [m, k] of rows x_stride apart, w [n, k]: int8, or e4m3 (FLOAT; as bytes where BY_HAND). x_scale f32 [m]
    (X_PER_ROW) or [1], or [m, x_groups]; w_scale f32 [n], or [n / W_ROWS, w_groups]; x_zero uint8, as many as
    x_scale, less X_SHIFT; x_sums int32 [m] of codes; w_zero int32 [n]; w_sums int32 [n] of codes less w_zero; bias [n];
    residual [m, n].
    y: activation(x w^T + bias) + residual. SPLIT > 1: y int32 or f32 [SPLIT, m, n], sums of parts of k for `reduce8`.
    """
    wait_for_earlier(EARLY)
    if PERSISTENT:
        tiles = tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N * HALVES)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _tile(tile, 0, x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr,
                  w_sums_ptr, bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups, X_SHIFT, X_PER_ROW,
                  X_GROUP, W_GROUP, W_ROWS, FLOAT, BY_HAND, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
                  HALVES, GROUP, SPLIT, SWAP)  # fmt: skip
    else:
        _tile(tl.program_id(0), tl.program_id(1), x_ptr, w_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr,
              w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr, residual_ptr, m, n, k, x_stride, x_groups, w_groups,
              X_SHIFT, X_PER_ROW, X_GROUP, W_GROUP, W_ROWS, FLOAT, BY_HAND, ACTIVATION, EVEN_K, BLOCK_M, BLOCK_N,
              BLOCK_K, HALVES, GROUP, SPLIT, SWAP)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["m"])
def reduce8(parts_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, w_zero_ptr, w_sums_ptr, bias_ptr,
            residual_ptr, m, n, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr, X_GROUP: tl.constexpr,
            W_GROUP: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Grid (tile rows, tile columns): parts [SPLIT, m, n] of `gemm8`, added in their order, to y [m, n]."""
    wait_for_earlier(EARLY)
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
