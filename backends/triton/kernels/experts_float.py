"""Rows of x, sorted by expert, times the float matrix of their expert. How programs find theirs: see `experts`."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.experts import rows_of_tile, tile_of_grid


@triton.jit(do_not_specialize_on_alignment=["t", "tiles"])
def grouped_floats(x_ptr, w_ptr, offs_ptr, out_ptr, t, n, k, experts, tiles, x_stride, e_stride, n_stride, k_stride,
                   EXACT: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, BK: tl.constexpr, BY_ROW: tl.constexpr, EXPERTS: tl.constexpr):  # fmt: skip
    """x [t, k] times w [experts, n, k] of any strides to out [t, n], grid (tiles * cdiv(n, BN),), sums in f32.

    Weights are the left operand, so that few rows fill an instruction. Multiplied in the type TO, f32 (EXACT) as three
    terms of tf32. EVEN: k is a multiple of BK. TURNED: rows of w lie side by side, not
    columns; none is read twice, which would break what is read at once.
    """
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    tile, column = tile_of_grid(tiles, n, BN)
    e, first, end = rows_of_tile(offs_ptr, tile, t, experts, BM, BY_ROW, EXPERTS)
    if first < end:
        tokens = first + tl.arange(0, BM)
        rows = column + tl.arange(0, BN)
        units = tl.where(e < experts, tl.cdiv(k, BK), 0)
        held = tl.minimum(e, experts - 1).to(tl.int64)
        x_rows = x_ptr + tl.minimum(tokens, end - 1).to(tl.int64)[:, None] * x_stride
        held_rows = rows if TURNED else tl.minimum(rows, n - 1)
        w_rows = w_ptr + held * e_stride + held_rows.to(tl.int64)[:, None] * n_stride
        acc = tl.zeros([BN, BM], tl.float32)
        for u in range(units):
            columns = u * BK + tl.arange(0, BK)
            x_at, w_at = x_rows + columns[None, :], w_rows + columns.to(tl.int64)[None, :] * k_stride
            if EVEN:
                x = tl.load(x_at)
            else:
                x = tl.load(x_at, mask=(columns < k)[None, :], other=0.0)
            if TURNED:
                w = tl.load(w_at, mask=(rows < n)[:, None] & (columns < k)[None, :], other=0.0)
            elif EVEN:
                w = tl.load(w_at)
            else:
                w = tl.load(w_at, mask=(columns < k)[None, :], other=0.0)
            acc = tl.dot(w.to(TO), tl.trans(x.to(TO)), acc, input_precision=PRECISION)
        at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(rows < n)[:, None] & (tokens < end)[None, :])
