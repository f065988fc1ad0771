"""Products with a weight whose rows have codes of several widths, in one launch.

Rows lie sorted by the bits of their codes, 8, then 4, then 2, each kind padded to whole tiles in a tensor of its own,
so that a tile takes one branch. `order` gives the row of the result, n for padding; scales, zero points and sums are
in the order of the result.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import values
from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.epilogue import finish
from qfx.backends.triton.kernels.gemm4 import group_sums, input_tile, whole_sums
from qfx.backends.triton.kernels.gemm8 import scaled, tile_at


@triton.jit
def _integer_sums(x_at, w_ptr, row, stride, scale_at, zero_at, sums_at, m, n, k, split, BLOCK_M: tl.constexpr,
                  BLOCK_N: tl.constexpr, SUB: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
                  EVEN_K: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The part `split` of k for rows [BLOCK_N] of the tensor of BITS: int32 or (GROUP) f32 [BLOCK_N, BLOCK_M]."""
    units = tl.cdiv(k, 8 // BITS * SUB)
    steps = tl.cdiv(units, SPLIT)
    begin, end = split * steps, tl.minimum(split * steps + steps, units)
    w_at = w_ptr + row.to(tl.int64)[:, None] * stride + (begin * SUB + tl.arange(0, SUB))[None, :]
    if GROUP:
        acc = group_sums(x_at, w_at, scale_at, zero_at, sums_at, n, m, k, begin, end, BLOCK_M, BLOCK_N, SUB, BITS,
                         GROUP, ASM, EVEN_K)  # fmt: skip
    else:
        acc = whole_sums(x_at, w_at, zero_at, k, begin, end, BLOCK_M, BLOCK_N, SUB, BITS, ASM, EVEN_K)
    return acc


@triton.jit(do_not_specialize_on_alignment=["m"])
def mixed_integer(x_ptr, w8_ptr, w4_ptr, w2_ptr, order_ptr, y_ptr, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr,
                  w_zero_ptr, w_sums_ptr, bias_ptr, residual_ptr, m, n, rows, k, rows8, rows4, x_stride, w8_stride,
                  w4_stride, w2_stride, X_SHIFT: tl.constexpr, X_PER_ROW: tl.constexpr, SUB: tl.constexpr,
                  GROUP: tl.constexpr, ASM: tl.constexpr, ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
                  SPLIT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """`gemm4` with rows of 8, 4 and 2 bits: rows8, then rows4, then the others, multiples of BLOCK_N, or None."""
    wait_for_earlier(EARLY)
    tile_row, tile_column = tile_at(tl.program_id(0), m, rows, BLOCK_M, BLOCK_N, TILES)
    first = tile_column * BLOCK_N
    place = first + tl.arange(0, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.load(order_ptr + place)
    near_row, near = tl.minimum(row, m - 1).to(tl.int64), tl.minimum(column, n - 1).to(tl.int64)
    x_at = x_ptr + near_row[:, None] * x_stride + tl.arange(0, SUB)[None, :]
    inside: tl.constexpr = GROUP > 0 or x_sums_ptr is None
    zero_at = w_zero_ptr + near if w_zero_ptr is not None and inside else None
    sums_at = x_sums_ptr + near_row if x_sums_ptr is not None and GROUP > 0 else None
    scale_at, split = w_scale_ptr + near, tl.program_id(1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32 if GROUP else tl.int32)
    if w8_ptr is not None:
        if first < rows8:
            acc = _integer_sums(x_at, w8_ptr, place, w8_stride, scale_at, zero_at, sums_at, m, n, k, split, BLOCK_M,
                                BLOCK_N, SUB, 8, GROUP, ASM, EVEN_K, SPLIT)  # fmt: skip
    if w4_ptr is not None:
        if (first >= rows8) & (first < rows8 + rows4):
            acc = _integer_sums(x_at, w4_ptr, place - rows8, w4_stride, scale_at, zero_at, sums_at, m, n, k, split,
                                BLOCK_M, BLOCK_N, SUB, 4, GROUP, ASM, EVEN_K, SPLIT)  # fmt: skip
    if w2_ptr is not None:
        if first >= rows8 + rows4:
            acc = _integer_sums(x_at, w2_ptr, place - rows8 - rows4, w2_stride, scale_at, zero_at, sums_at, m, n, k,
                                split, BLOCK_M, BLOCK_N, SUB, 2, GROUP, ASM, EVEN_K, SPLIT)  # fmt: skip
    acc = tl.trans(acc)
    if SPLIT > 1:
        there = (row < m)[:, None] & (column < n)[None, :]
        part = y_ptr + split.to(tl.int64) * m * n
        tl.store(part + row.to(tl.int64)[:, None] * n + column[None, :], acc, mask=there)
    else:
        left = None if inside else w_zero_ptr
        y = scaled(acc, x_scale_ptr, x_zero_ptr, x_sums_ptr, w_scale_ptr, left, w_sums_ptr, row, column, m, n, X_SHIFT,
                   X_PER_ROW, 0, GROUP)  # fmt: skip
        finish(y, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)


@triton.jit
def _float_sums(x_at, w_ptr, row, stride, scale_at, zero_at, n, k, split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                SUB: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr, TO: tl.constexpr,
                EVEN_K: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The same for floats: f32 [BLOCK_N, BLOCK_M] of codes less zero points, which TO holds exactly, times scales."""
    PARTS: tl.constexpr = 8 // BITS
    PRECISION: tl.constexpr = "tf32x3" if TO == tl.float32 else "tf32"
    units = tl.cdiv(k, PARTS * SUB)
    steps = tl.cdiv(units, SPLIT)
    begin, end = split * steps, tl.minimum(split * steps + steps, units)
    w_at = w_ptr + row.to(tl.int64)[:, None] * stride + (begin * SUB + tl.arange(0, SUB))[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in range(begin, end):
        data = tl.load(w_at)
        codes = values(data, data, data, None, 1 << (BITS - 1), BITS, "int", False, ASM, TO)
        for part in tl.static_range(PARTS):
            first = (unit * PARTS + part) * SUB
            group = (first // GROUP).to(tl.int64) * n if GROUP else 0
            a = codes[part]
            if zero_at is not None:
                a -= tl.load(zero_at + group).to(tl.float32).to(TO)[:, None]
            x = tl.trans(input_tile(x_at, first, k, SUB, EVEN_K).to(TO))
            if GROUP:
                scale = tl.load(scale_at + group).to(tl.float32)
                acc += tl.dot(a, x, input_precision=PRECISION) * scale[:, None]
            else:
                acc = tl.dot(a, x, acc, input_precision=PRECISION)
        w_at += SUB
    if not GROUP:
        acc *= tl.load(scale_at)[:, None]
    return acc


@triton.jit(do_not_specialize_on_alignment=["m"])
def mixed_float(x_ptr, w8_ptr, w4_ptr, w2_ptr, order_ptr, y_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, residual_ptr, m, n,
                rows, k, rows8, rows4, x_stride, w8_stride, w4_stride, w2_stride, SUB: tl.constexpr,
                GROUP: tl.constexpr, ASM8: tl.constexpr, ASM4: tl.constexpr, ASM2: tl.constexpr, TO: tl.constexpr,
                ACTIVATION: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                TILES: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """`mixed_integer` for x [m, k] of floats. Codes are unsigned, less half of their range.

    w_scale f32 [n], w_zero int16 [n], or [G, n] of both. SPLIT > 1: y f32 [SPLIT, m, n] without the bias.
    """
    wait_for_earlier(EARLY)
    tile_row, tile_column = tile_at(tl.program_id(0), m, rows, BLOCK_M, BLOCK_N, TILES)
    first = tile_column * BLOCK_N
    place = first + tl.arange(0, BLOCK_N)
    row = tile_row * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.load(order_ptr + place)
    near_row, near = tl.minimum(row, m - 1).to(tl.int64), tl.minimum(column, n - 1).to(tl.int64)
    x_at = x_ptr + near_row[:, None] * x_stride + tl.arange(0, SUB)[None, :]
    zero_at = None if w_zero_ptr is None else w_zero_ptr + near
    scale_at, split = w_scale_ptr + near, tl.program_id(1)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if w8_ptr is not None:
        if first < rows8:
            acc = _float_sums(x_at, w8_ptr, place, w8_stride, scale_at, zero_at, n, k, split, BLOCK_M, BLOCK_N, SUB, 8,
                              GROUP, ASM8, TO, EVEN_K, SPLIT)  # fmt: skip
    if w4_ptr is not None:
        if (first >= rows8) & (first < rows8 + rows4):
            acc = _float_sums(x_at, w4_ptr, place - rows8, w4_stride, scale_at, zero_at, n, k, split, BLOCK_M, BLOCK_N,
                              SUB, 4, GROUP, ASM4, TO, EVEN_K, SPLIT)  # fmt: skip
    if w2_ptr is not None:
        if first >= rows8 + rows4:
            acc = _float_sums(x_at, w2_ptr, place - rows8 - rows4, w2_stride, scale_at, zero_at, n, k, split, BLOCK_M,
                              BLOCK_N, SUB, 2, GROUP, ASM2, TO, EVEN_K, SPLIT)  # fmt: skip
    acc = tl.trans(acc)
    if SPLIT > 1:
        there = (row < m)[:, None] & (column < n)[None, :]
        part = y_ptr + split.to(tl.int64) * m * n
        tl.store(part + row.to(tl.int64)[:, None] * n + column[None, :], acc, mask=there)
    else:
        finish(acc, y_ptr, bias_ptr, residual_ptr, row, column, m, n, ACTIVATION)


@triton.jit
def _write_floats(w_ptr, row, stride, unit, column, scale_at, zero_at, out_ptr, n, k, SUB: tl.constexpr,
                  BITS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    PARTS: tl.constexpr = 8 // BITS
    if unit * PARTS * SUB < k:
        data = tl.load(w_ptr + row.to(tl.int64)[:, None] * stride + (unit * SUB + tl.arange(0, SUB))[None, :])
        codes = values(data, data, data, None, 1 << (BITS - 1), BITS, "int", False, "", tl.float32)
        for part in tl.static_range(PARTS):
            first = (unit * PARTS + part) * SUB
            group = (first // GROUP).to(tl.int64) * n if GROUP else 0
            a = codes[part]
            if zero_at is not None:
                a -= tl.load(zero_at + group).to(tl.float32)[:, None]
            a *= tl.load(scale_at + group).to(tl.float32)[:, None]
            at = first + tl.arange(0, SUB)
            out = out_ptr + column.to(tl.int64)[:, None] * k + at[None, :]
            tl.store(out, a.to(out_ptr.dtype.element_ty), mask=(column < n)[:, None] & (at < k)[None, :])


@triton.jit
def mixed_dequantize(w8_ptr, w4_ptr, w2_ptr, order_ptr, w_scale_ptr, w_zero_ptr, out_ptr, n, k, rows8, rows4, w8_stride,
                     w4_stride, w2_stride, SUB: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Grid (units of SUB columns, tiles of rows): the weight of `mixed_float` as floats [n, k], rounded once."""
    first = tl.program_id(1) * BLOCK_N
    place = first + tl.arange(0, BLOCK_N)
    column, unit = tl.load(order_ptr + place), tl.program_id(0)
    near = tl.minimum(column, n - 1).to(tl.int64)
    zero_at = None if w_zero_ptr is None else w_zero_ptr + near
    if w8_ptr is not None:
        if first < rows8:
            _write_floats(w8_ptr, place, w8_stride, unit, column, w_scale_ptr + near, zero_at, out_ptr, n, k, SUB, 8,
                          GROUP)  # fmt: skip
    if w4_ptr is not None:
        if (first >= rows8) & (first < rows8 + rows4):
            _write_floats(w4_ptr, place - rows8, w4_stride, unit, column, w_scale_ptr + near, zero_at, out_ptr, n, k,
                          SUB, 4, GROUP)  # fmt: skip
    if w2_ptr is not None:
        if first >= rows8 + rows4:
            _write_floats(w2_ptr, place - rows8 - rows4, w2_stride, unit, column, w_scale_ptr + near, zero_at, out_ptr,
                          n, k, SUB, 2, GROUP)  # fmt: skip
