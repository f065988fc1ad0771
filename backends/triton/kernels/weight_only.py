"""Floats times packed weights on tensor cores, the sum of parts of K, and packed weights back to floats.

Arguments and modes: see `qfx.backends.triton.kernels.weight_only_gemv`.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import exact, load_scale, parts_of, values
from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.epilogue import activated


@triton.jit
def _adjusted(a, rows, here, column, scale_ptr, zero_ptr, factor, scale_stride, SCALE: tl.constexpr,
              GROUP: tl.constexpr, SCALED: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """A tile of weights [BN, PART] less their zero points and, if SCALED, times scales times factor, in the type TO.

    Its first column is `column`. Scales are read by group, not by column.
    """
    BN: tl.constexpr = a.shape[0]
    PART: tl.constexpr = a.shape[1]
    EACH: tl.constexpr = GROUP if GROUP > 0 and GROUP < PART // 2 else PART // 2  # columns read under one scale
    at = rows * scale_stride
    if SCALED:  # apart by EACH columns: so most tiles stay in the registers in which tensor cores read them
        group = column + tl.arange(0, PART // EACH) * EACH
        at += (group // GROUP if GROUP > 0 else group * 0)[None, :]
        a = a.reshape(BN, PART // EACH, EACH)
        if zero_ptr is not None:
            a -= tl.load(zero_ptr + at, mask=here, other=0).to(tl.float32).to(TO)[:, :, None]
        a *= (load_scale(scale_ptr + at, here, SCALE) * factor).to(TO)[:, :, None]
        a = a.reshape(BN, PART)
    elif zero_ptr is not None:
        if GROUP > 0:
            at += column // GROUP
        a -= tl.load(zero_ptr + at, mask=here, other=0).to(tl.float32).to(TO)
    return a


@triton.jit
def product(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, tokens, rows, split,
            each, units, m, n, k, x_stride, w_stride, upper_stride, scale_stride, BITS: tl.constexpr,
            KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr,
            EXACT: tl.constexpr, ASM: tl.constexpr, ASM_ODD: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr,
            SPLITS: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """A tile of `dot_tiles`: rows `tokens` [BM] of x below m, `rows` [BN] of w, part `split` of the `units` of k."""
    UNITS: tl.constexpr = GROUP > 0 and GROUP % 128 == 0 and not FIRST
    EARLY: tl.constexpr = GROUP > 0 and not UNITS
    PARTS: tl.constexpr = parts_of(BITS)
    PART: tl.constexpr = 128 // PARTS
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    PRECISION: tl.constexpr = "tf32x3" if EXACT else "tf32"
    x_rows = x_ptr + tl.minimum(tokens, m - 1).to(tl.int64) * x_stride
    held = tl.minimum(rows, n - 1).to(tl.int64)
    byte = tl.arange(0, PART)
    here = (rows < n)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    near = tl.load(whole_ptr + 1)
    start = split * each
    for v in range(start, tl.minimum(start + each, units)):
        for h in tl.static_range(HALVES):  # of three bits, two units share the bytes of the upper one
            u = v * HALVES + h
            w = tl.load(w_ptr + held[:, None] * w_stride + u * PART + byte[None, :])
            upper = w
            if BITS == 3:
                upper = tl.load(upper_ptr + held[:, None] * upper_stride + v * PART + byte[None, :])
            tiles = values(w, upper, h, table_ptr, OFFSET, BITS, KIND, NATIVE, ASM_ODD if h else ASM, TO)
            part = tl.zeros([BN, BM], tl.float32)
            for i in tl.static_range(PARTS):
                columns = u * 128 + i * PART + byte
                if EVEN:
                    x = tl.load(x_rows[:, None] + columns[None, :])
                else:
                    x = tl.load(x_rows[:, None] + columns[None, :], mask=(columns < k)[None, :], other=0.0)
                a = _adjusted(tiles[i], held[:, None], here, u * 128 + i * PART, scale_ptr, zero_ptr, near,
                              scale_stride, SCALE, GROUP, EARLY, TO)  # fmt: skip
                if UNITS:
                    part = tl.dot(a, tl.trans(x.to(TO)), part, input_precision=PRECISION)
                else:
                    acc = tl.dot(a, tl.trans(x.to(TO)), acc, input_precision=PRECISION)
            if UNITS:
                acc += part * load_scale(scale_ptr + held[:, None] * scale_stride + u * 128 // GROUP, here, SCALE)
    if EARLY:
        acc *= tl.load(whole_ptr) / near
    else:
        acc *= tl.load(whole_ptr)
    if GROUP == 0:
        acc *= load_scale(scale_ptr + held[:, None] * scale_stride, here, SCALE)
    acc = tl.where(units > 0, acc, 0.0)  # of nothing, whatever the scales are
    if bias_ptr is not None and SPLITS == 1:
        acc += tl.load(bias_ptr + held).to(tl.float32)[:, None]
    at = tokens.to(tl.int64)[None, :] * n + rows[:, None]
    at += tl.cast(split, tl.int64) * m * n
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=here & (tokens < m)[None, :])


@triton.jit(do_not_specialize_on_alignment=["m"])
def dot_tiles(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, m, n, k, x_stride,
              w_stride, upper_stride, scale_stride, each, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
              GROUP: tl.constexpr, OFFSET: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
              ASM_ODD: tl.constexpr, TO: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, FIRST: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """x [m, k] to out [m, n] = x @ w^T + bias, or, with SPLITS, to f32 [SPLITS, m, n], `each` units of K in each.

    Weights are the left operand, in the type TO: the sum over a unit is scaled in f32 where groups are whole units,
    else, or with FIRST, weights are scaled before, which takes fewer registers. Three bits: ASM_ODD serves units of odd
    number, and `each` counts pairs of units. EVEN: k is a multiple of what `each` counts.
    """
    wait_for_earlier(EARLY)
    UNIT: tl.constexpr = 256 if BITS == 3 else 128
    by_m = tl.cdiv(m, BM)
    by_n = tl.cdiv(n, BN)
    pid = tl.program_id(0)
    first = pid // (8 * by_n) * 8
    height = tl.minimum(by_m - first, 8)
    tokens = (first + pid % (8 * by_n) % height) * BM + tl.arange(0, BM)
    rows = pid % (8 * by_n) // height * BN + tl.arange(0, BN)
    product(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, tokens, rows,
            tl.program_id(1), each, tl.cdiv(k, UNIT), m, n, k, x_stride, w_stride, upper_stride, scale_stride, BITS,
            KIND, SCALE, GROUP, OFFSET, NATIVE, EXACT, ASM, ASM_ODD, TO, EVEN, SPLITS, FIRST, BM, BN)  # fmt: skip


@triton.jit
def _summed(parts_ptr, bias_ptr, at, column, inside, size, SPLITS: tl.constexpr):
    """Elements `at` of f32 [SPLITS, size], added up in this order, plus those of bias at `column`."""
    total = tl.zeros(at.shape, tl.float32)
    part = parts_ptr + at
    for _ in tl.static_range(SPLITS):
        total += tl.load(part, mask=inside, other=0.0).to(tl.float32)
        part += tl.cast(size, tl.int64)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def sum_splits(parts_ptr, bias_ptr, out_ptr, size, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
               ACT: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Parts [SPLITS, m, n] added up in this order, plus bias [n], to out [m, n] of `size` elements.

    ACT: parts are [SPLITS, m, 2 n], bias [2 n], and out is ACT of the first n columns, times the others.
    """
    wait_for_earlier(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    column = at % n
    if ACT == "":
        found = _summed(parts_ptr, bias_ptr, at, column, inside, size, SPLITS)
    else:
        first, each = at + at // n * n, tl.cast(size, tl.int64) * 2
        gate = _summed(parts_ptr, bias_ptr, first, column, inside, each, SPLITS)
        up = _summed(parts_ptr, bias_ptr, first + n, column + n, inside, each, SPLITS)
        found = activated(gate, ACT) * up
    tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize(w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, out_ptr, n, k, w_stride, upper_stride,
               scale_stride, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
               OFFSET: tl.constexpr, BN: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """BN rows of a unit of packed weights to out [n, k], computed in f32 and rounded once."""
    wait_for_earlier(EARLY)
    PARTS: tl.constexpr = parts_of(BITS)
    PART: tl.constexpr = 128 // PARTS
    rows = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None]
    here = rows < n
    u = tl.program_id(0)
    byte = tl.arange(0, PART)[None, :]
    w = tl.load(w_ptr + rows * w_stride + u * PART + byte, mask=here, other=0)
    upper = w
    if BITS == 3:
        upper = tl.load(upper_ptr + rows * upper_stride + u // 2 * 32 + byte, mask=here, other=0)
    odd = tl.full([1, 1], u % 2, tl.uint8)
    for i in tl.static_range(PARTS):
        columns = u * 128 + i * PART + byte
        found = exact(w, upper, odd, table_ptr, i, BITS, KIND) - OFFSET
        found = _adjusted(found, rows, here, u * 128 + i * PART, scale_ptr, zero_ptr, tl.load(whole_ptr), scale_stride,
                          SCALE, GROUP, True, tl.float32)  # fmt: skip
        tl.store(out_ptr + rows * k + columns, found.to(out_ptr.dtype.element_ty), mask=here & (columns < k))
