"""Blocks of channels times a Hadamard matrix, and rows of the result to 8-bit codes.

A block of SIZE = A * B channels is read as a matrix X [A, B], and H as a Kronecker product of a matrix over A and one
over B, so that the block of the result is left @ X @ right / sqrt(SIZE). Channel (a, b) lies at
(a // HIGH) * SIZE / (A / HIGH) + (a % HIGH) * LOW + (b // LOW) * HIGH * LOW + b % LOW: A takes the outermost factors
and, of the innermost factors of two, all but LOW. The tile of a program is [R * AP, BJ], of R blocks; AP: A, padded.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.rounding import codes_of, e4m3_of, greater, greatest, guarded

_HIGH_BITS = tl.constexpr(-8192)  # sign, exponent and 10 bits of mantissa: what TF32 keeps of f32


@triton.jit
def _product(x, h, acc, DOT: tl.constexpr, IEEE: tl.constexpr):
    """acc + x @ h, x f32 [M, K] holding values of DOT, h [K, N] of DOT. f32 goes as two TF32 terms, exact for h of 1
    and -1.
    """
    if DOT != tl.float32:
        acc = tl.dot(x.to(DOT), h, acc)
    elif IEEE:
        acc = tl.dot(x, h, acc, input_precision="ieee")
    else:
        high = (x.to(tl.int32, bitcast=True) & _HIGH_BITS).to(tl.float32, bitcast=True)
        acc = tl.dot(high, h, acc, input_precision="tf32")
        acc = tl.dot(x - high, h, acc, input_precision="tf32")
    return acc


@triton.jit
def _left_product(left, x, TERM: tl.constexpr):
    """left @ x for left of 1 and -1 in TERM and x f32, which goes as two terms of bf16, or of TF32."""
    if TERM == tl.float32:
        high = (x.to(tl.int32, bitcast=True) & _HIGH_BITS).to(tl.float32, bitcast=True)
        acc = tl.dot(left, high, input_precision="tf32")
        acc = tl.dot(left, x - high, acc, input_precision="tf32")
    else:
        high = x.to(TERM)
        acc = tl.dot(left, high)
        acc = tl.dot(left, (x - high.to(tl.float32)).to(TERM), acc)
    return acc


@triton.jit
def _places(index, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Offsets of the columns `index` of X in a block."""
    return (index // LOW) * (HIGH * LOW) + index % LOW


@triton.jit
def _matrix(ptr, row, column, N: tl.constexpr, TO: tl.constexpr):
    """Some rows and columns of a matrix [N, N], zero outside of it."""
    inside = (row < N)[:, None] & (column < N)[None, :]
    return tl.load(ptr + row[:, None] * N + column[None, :], mask=inside, other=0).to(TO)


@triton.jit
def _rotated(x_ptr, sign_ptr, right_ptr, base, lead, inside, left, right, column, scale, B: tl.constexpr,
             HIGH: tl.constexpr, LOW: tl.constexpr, A: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
             TERM: tl.constexpr, IEEE: tl.constexpr, INVERSE: tl.constexpr):  # fmt: skip
    """f32 [R * A, BJ]: the columns `column` of a tile. base, lead: offsets of blocks, and of the rows of X in them."""
    acc = tl.zeros([base.shape[0], column.shape[0]], tl.float32)
    for start in range(0, B, BK):
        k = start + tl.arange(0, BK)
        place = lead[:, None] + _places(k, HIGH, LOW)[None, :]
        given = inside[:, None] & (k < B)[None, :]
        x = tl.load(x_ptr + base[:, None] + place, mask=given, other=0.0).to(tl.float32)
        if A > 1 and not INVERSE:
            x = x * tl.load(sign_ptr + place, mask=given, other=0).to(tl.float32)
        if BK >= B:
            acc = _product(x, right, acc, DOT, IEEE)
        else:
            acc = _product(x, _matrix(right_ptr, k, column, B, DOT), acc, DOT, IEEE)
    if A > 1:
        acc = _left_product(left, acc, TERM)
        if INVERSE:
            place = lead[:, None] + _places(column, HIGH, LOW)[None, :]
            given = inside[:, None] & (column < B)[None, :]
            acc = acc * tl.load(sign_ptr + place, mask=given, other=0).to(tl.float32)
    return acc * scale


@triton.jit
def _row_at(row, inner, last, outer_stride, inner_stride, last_stride):
    """Offset of a row of x [outer, inner, last, K], whose axes have these strides."""
    found = (row // (inner * last)).to(tl.int64) * outer_stride + (row // last % inner).to(tl.int64) * inner_stride
    return found + (row % last).to(tl.int64) * last_stride


@triton.jit(do_not_specialize_on_alignment=["units"])
def hadamard(x_ptr, y_ptr, sign_ptr, left_ptr, right_ptr, units, blocks, inner, last, outer_stride, inner_stride,
             last_stride, scale, SIZE: tl.constexpr,
             A: tl.constexpr, AP: tl.constexpr, B: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr,
             R: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, DOT: tl.constexpr, TERM: tl.constexpr,
             IEEE: tl.constexpr, INVERSE: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """A program goes over tiles of R blocks: x [outer, inner, last, blocks * SIZE] of these strides -> y, contiguous.

    units: rows * blocks. left [A, A], right [B, B], sign [SIZE]: int8, right f32 where a factor is random.
    """
    wait_for_earlier(EARLY)
    t = tl.arange(0, R * AP)
    lead = (t % AP // HIGH) * (SIZE // (A // HIGH)) + t % AP % HIGH * LOW
    column = tl.program_id(1) * BJ + tl.arange(0, BJ)
    left = _matrix(left_ptr, tl.arange(0, AP), tl.arange(0, AP), A, TERM)
    right = _matrix(right_ptr, tl.arange(0, BK), column, B, DOT)
    for tile in range(tl.program_id(0), tl.cdiv(units, R), tl.num_programs(0)):
        unit = tile * R + t // AP
        inside = (unit < units) & (t % AP < A)
        base = _row_at(unit // blocks, inner, last, outer_stride, inner_stride, last_stride) + unit % blocks * SIZE
        y = _rotated(x_ptr, sign_ptr, right_ptr, base, lead, inside, left, right, column, scale, B, HIGH, LOW, A, BK,
                     DOT, TERM, IEEE, INVERSE)  # fmt: skip
        place = lead[:, None] + _places(column, HIGH, LOW)[None, :]
        given = inside[:, None] & (column < B)[None, :]
        tl.store(y_ptr + unit.to(tl.int64)[:, None] * SIZE + place, y.to(y_ptr.dtype.element_ty), mask=given)


@triton.jit
def _rounded(y, step, QMIN: tl.constexpr, QMAX: tl.constexpr, FLOAT: tl.constexpr, BY_HAND: tl.constexpr):
    """Codes of y [T, BJ] with the scales step [T]: int8, or the bits of e4m3 (FLOAT)."""
    step = step[:, None] + tl.zeros_like(y)
    if FLOAT:
        codes = e4m3_of(tl.div_rn(y, step), BY_HAND)
    else:
        codes = codes_of(y, step, QMIN, QMAX).to(tl.int8)
    return codes


@triton.jit(do_not_specialize_on_alignment=["rows"])
def hadamard_quantize(x_ptr, codes_ptr, scale_ptr, sign_ptr, left_ptr, right_ptr, rows, blocks, inner, last,
                      outer_stride, inner_stride, last_stride, scale, SIZE: tl.constexpr, A: tl.constexpr,
                      AP: tl.constexpr, B: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr,
                      BK: tl.constexpr, DOT: tl.constexpr, TERM: tl.constexpr, IEEE: tl.constexpr,
                      INVERSE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, FLOAT: tl.constexpr,
                      BY_HAND: tl.constexpr, ONE: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """The same with B <= BK, then codes [rows, blocks * SIZE] and the scale of each row, f32 [rows].

    Codes are int8, or the bits of e4m3 (FLOAT).
    A program goes over tiles of R whole rows; ONE: a row is one block, else its blocks are computed twice.
    """
    wait_for_earlier(EARLY)
    t = tl.arange(0, R * AP)
    lead = (t % AP // HIGH) * (SIZE // (A // HIGH)) + t % AP % HIGH * LOW
    column = tl.arange(0, BK)
    left = _matrix(left_ptr, tl.arange(0, AP), tl.arange(0, AP), A, TERM)
    right = _matrix(right_ptr, column, column, B, DOT)
    place = lead[:, None] + _places(column, HIGH, LOW)[None, :]
    real: tl.constexpr = x_ptr.dtype.element_ty
    for tile in range(tl.program_id(0), tl.cdiv(rows, R), tl.num_programs(0)):
        row = tile * R + t // AP
        inside = (row < rows) & (t % AP < A)
        base, out = _row_at(row, inner, last, outer_stride, inner_stride, last_stride), row.to(tl.int64) * blocks * SIZE
        given = inside[:, None] & (column < B)[None, :]
        top = tl.zeros([R * AP], tl.float32)
        for block in range(1 if ONE else blocks):
            y = _rotated(x_ptr, sign_ptr, right_ptr, base + block * SIZE, lead, inside, left, right, column, scale, B,
                         HIGH, LOW, A, BK, DOT, TERM, IEEE, INVERSE).to(real).to(tl.float32)  # fmt: skip
            top = greater(top, greatest(y, 1))
            if ONE:
                step = _step(top, A, QMAX)
                tl.store(codes_ptr + out[:, None] + place, _rounded(y, step, QMIN, QMAX, FLOAT, BY_HAND), mask=given)
        step = _step(top, A, QMAX)
        tl.store(scale_ptr + row, step, mask=inside & (t % AP == 0))
        if not ONE:
            for block in range(blocks):
                y = _rotated(x_ptr, sign_ptr, right_ptr, base + block * SIZE, lead, inside, left, right, column, scale,
                             B, HIGH, LOW, A, BK, DOT, TERM, IEEE, INVERSE).to(real).to(tl.float32)  # fmt: skip
                codes = _rounded(y, step, QMIN, QMAX, FLOAT, BY_HAND)
                tl.store(codes_ptr + (out + block * SIZE)[:, None] + place, codes, mask=given)


@triton.jit
def _step(top, A: tl.constexpr, QMAX: tl.constexpr):
    """Scales from the greatest magnitudes of the rows of X, the A of a block taken together."""
    if A > 1:
        top = tl.zeros_like(top) + greatest(top, 0)
    return guarded(tl.div_rn(top, tl.full(top.shape, QMAX, tl.float32)))
