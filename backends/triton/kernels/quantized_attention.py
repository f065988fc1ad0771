"""Attention over rounded operands, a block of queries at a time, without the scores in memory.

After FlashAttention-2 (Dao 2023): softmax found while the blocks of keys pass; with integers in q.k as in
SageAttention (Zhang et al. 2024). Scores are kept in powers of two.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.attention_operands import round_mantissa
from qfx.backends.triton.kernels.rounding import greater, guarded, round_even

_LEAST = tl.constexpr(-3.4028234663852886e38)  # below it are only scores that take no part
_LOG2E = tl.constexpr(1.4426950408889634)
_LEAST_ADDED = tl.constexpr(-2.3586e38)  # times log2 e it is not infinite


@triton.jit
def _scores(q, k_at, k_step_at, mask_at, mask_n, step, bias, row, start, length, softcap, rows, CAUSAL: tl.constexpr,
            FAST: tl.constexpr, BOOL: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Scores f32 [BLOCK_M, BLOCK_N] of the keys from `start` on, -inf where a row may not look.

    FAST: still to be multiplied by the row's step. EDGE: some are masked, or beyond the keys, or beyond the row.
    """
    column = start + tl.arange(0, BLOCK_N)
    if EDGE:
        k = tl.load(k_at, mask=(column < length)[:, None], other=0.0)
    else:
        k = tl.load(k_at)
    if q.dtype == tl.int8:
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    else:
        s = tl.dot(q, tl.trans(k))
    if k_step_at is not None:
        if EDGE:
            s = s * tl.load(k_step_at + column, mask=column < length, other=1.0)[None, :]
        else:
            s = s * tl.load(k_step_at + column)[None, :]
    if not FAST:
        s = s * step[:, None]
        if bias is not None:
            s = s + bias[:, None]
        if softcap is not None:  # tanh x = 2 sigmoid(2 x) - 1
            s = (tl.sigmoid(s * (2.0 / softcap)) * 2.0 - 1.0) * softcap
    if EDGE:
        if mask_at is not None:
            given = tl.load(mask_at + column.to(tl.int64)[None, :] * mask_n,
                            mask=(row < rows)[:, None] & (column < length)[None, :], other=0)  # fmt: skip
            if BOOL:
                s = tl.where(given != 0, s, float("-inf"))
            else:
                given = given.to(tl.float32)
                s = s + tl.where(given == float("-inf"), given, tl.maximum(given, _LEAST_ADDED) * _LOG2E)
        keep = (column < length)[None, :]
        if CAUSAL:
            keep = keep & (column[None, :] <= row[:, None])
        s = tl.where(keep, s, float("-inf"))
    return s


@triton.jit
def _weights(s, step, most, FAST: tl.constexpr):
    """2^(scores - most)."""
    if FAST:
        return tl.exp2(s * step[:, None] - most[:, None])
    return tl.exp2(s - most[:, None])


@triton.jit
def _most(s, step, FAST: tl.constexpr):
    """The greatest score of each row."""
    if FAST:
        return tl.max(s, 1) * step
    return tl.max(s, 1)


@triton.jit
def _value_tile(v_at, start, length, EDGE: tl.constexpr, BLOCK_N: tl.constexpr):
    if EDGE:
        inside = (start + tl.arange(0, BLOCK_N)) < length
        return tl.load(v_at, mask=inside[:, None], other=0.0)
    return tl.load(v_at)


@triton.jit
def _bounds(first, length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many blocks of keys all rows of the block from `first` on see, and where the last key ends that one sees."""
    if CAUSAL:
        return tl.minimum(first + 1, length) // BLOCK_N, tl.minimum(first + BLOCK_M, length)
    return length // BLOCK_N, length


@triton.jit
def mask_bounds(mask_ptr, bounds_ptr, rows, length, mask_b, mask_h, mask_m, mask_n, BOOL: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """For each block of rows of a mask [B, H, rows, length] which blocks of keys it leaves: int32 [B, H, blocks, 3].

    Grid (B, H, blocks): only the first axis has room for any number of sequences.
    They are the number of the first block of which something is kept; of that with which those from there on end of
    which everything is kept as it is; and of that behind the last of which something is kept.
    """
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_at = mask_ptr + tl.program_id(0).to(tl.int64) * mask_b + tl.program_id(1).to(tl.int64) * mask_h
    mask_at = mask_at + row.to(tl.int64)[:, None] * mask_m
    first, whole, end = length * 0 - 1, length * 0, length * 0
    for block in range(tl.cdiv(length, BLOCK_N)):
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (column < length)[None, :]
        given = tl.load(mask_at + column.to(tl.int64)[None, :] * mask_n, mask=inside, other=0)
        if BOOL:
            kept, free = given != 0, given != 0
        else:
            kept, free = given.to(tl.float32) > float("-inf"), given.to(tl.float32) == 0.0
        some = tl.max(tl.max((kept & inside).to(tl.int32), 1), 0) > 0
        every = tl.min(tl.min((free | (row >= rows)[:, None]).to(tl.int32), 1), 0) > 0
        every = every & (block * BLOCK_N + BLOCK_N <= length)
        whole = tl.where(some & (first < 0), block, whole)
        first = tl.where(some & (first < 0), block, first)
        whole = tl.where(every & (first >= 0) & (whole == block), block + 1, whole)
        end = tl.where(some, block + 1, end)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(bounds_ptr + at * 3, tl.maximum(first, 0))
    tl.store(bounds_ptr + at * 3 + 1, whole)
    tl.store(bounds_ptr + at * 3 + 2, end)


@triton.jit
def _store(acc, v_step_ptr, v_step_h, out_ptr, batch, own, outer, row, rows, all_heads, DV: tl.constexpr,
           VALUE_WIDTH: tl.constexpr):  # fmt: skip
    if v_step_ptr is not None:
        acc = acc * tl.load(v_step_ptr + own * v_step_h)
    wide = tl.arange(0, VALUE_WIDTH)
    at = (batch.to(tl.int64) * all_heads + outer) * rows + row.to(tl.int64)
    inside = (row < rows)[:, None] & (wide < DV)[None, :]
    tl.store(out_ptr + at[:, None] * DV + wide[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum(most, total, s, step, FAST: tl.constexpr):
    """(greatest score, sum of the weights, weights of this block, by what the earlier ones shrink)."""
    more = tl.maximum(most, _most(s, step, FAST))
    p = _weights(s, step, more, FAST)
    kept = tl.exp2(most - more)
    return more, total * kept + tl.sum(p, 1), p, kept


@triton.jit
def _add(acc, most, total, times, s, step, v, FAST: tl.constexpr, ROUNDED: tl.constexpr, INTEGER: tl.constexpr,
         BITS: tl.constexpr, LEAST: tl.constexpr, QMAX: tl.constexpr):  # fmt: skip
    """The sums with one more block of keys. ROUNDED: `most` is final, and weights times `times` become codes."""
    if ROUNDED:
        p = -greater(-_weights(s, step, most, FAST) * times[:, None], -QMAX)  # at most QMAX, or NaN
        p = round_even(p) if INTEGER else round_mantissa(p, BITS, LEAST)
        return tl.dot(p.to(v.dtype), v, acc), most, total
    most, total, p, kept = _sum(most, total, s, step, FAST)
    return tl.dot(p.to(v.dtype), v, acc * kept[:, None]), most, total


@triton.jit
def _weight_steps(most, best, total, QMAX: tl.constexpr, CLIP: tl.constexpr, BY_ROW: tl.constexpr):
    """(what 2^(score - most) is multiplied by to be the weight in steps, the step) f32 [rows].

    A step is a QMAX-th of 1, or, BY_ROW, of the greatest weight of the row, whose score is `best`.
    """
    inverse = _inverse(total)
    if BY_ROW:
        step = guarded(tl.exp2(best - most) * inverse * (CLIP / QMAX))
        return inverse / step, step
    return inverse * QMAX, tl.full(inverse.shape, 1.0 / QMAX, tl.float32)


@triton.jit
def _inverse(total):
    """1 / total, 0 for a row that sees nothing, NaN for one that sees NaN."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _passed(q, k_at, k_step_at, mask_at, mask_n, step, bias, most, total, row, first, last, length, softcap, rows,
            CAUSAL: tl.constexpr, FAST: tl.constexpr, BOOL: tl.constexpr, EDGE: tl.constexpr, WIDTH: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """(greatest score, sum of the weights) after the keys from first to last. k_at: pointers of those at first."""
    for start in range(first, last, BLOCK_N):
        s = _scores(q, k_at, k_step_at, mask_at, mask_n, step, bias, row, start, length, softcap, rows, CAUSAL, FAST,
                    BOOL, EDGE, BLOCK_N)  # fmt: skip
        most, total, _, _ = _sum(most, total, s, step, FAST)
        k_at += BLOCK_N * WIDTH
    return most, total


@triton.jit
def _added(acc, q, k_at, k_step_at, v_at, v_next, mask_at, mask_n, step, bias, most, total, times, row, first, last,
           length, softcap, rows, CAUSAL: tl.constexpr, FAST: tl.constexpr, BOOL: tl.constexpr, EDGE: tl.constexpr,
           ROUNDED: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr, QMAX: tl.constexpr,
           WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(weighted values, greatest score, sum) after the keys from first to last. k_at, v_at: pointers of those at first.

    The pointers behind the last are no result: Triton before 3.8 would hold them in a layout that takes all registers.
    """
    for start in range(first, last, BLOCK_N):
        s = _scores(q, k_at, k_step_at, mask_at, mask_n, step, bias, row, start, length, softcap, rows, CAUSAL, FAST,
                    BOOL, EDGE, BLOCK_N)  # fmt: skip
        v = _value_tile(v_at, start, length, EDGE, BLOCK_N)
        acc, most, total = _add(acc, most, total, times, s, step, v, FAST, ROUNDED, INTEGER, BITS, LEAST, QMAX)
        k_at += BLOCK_N * WIDTH
        v_at += v_next
    return acc, most, total


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, q_step_ptr, k_step_ptr, v_step_ptr, bias_ptr, mask_ptr, bounds_ptr, sinks_ptr,
              heads_ptr, out_ptr, rows, length, heads, all_heads, v_b, v_g, v_l, v_step_h, mask_b, mask_h, mask_m,
              mask_n, bounds_b, bounds_h, softcap, SHARE: tl.constexpr, CAUSAL: tl.constexpr, FAST: tl.constexpr,
              BOOL: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, DV: tl.constexpr,
              ROUNDED: tl.constexpr, INTEGER: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr,
              QMAX: tl.constexpr, CLIP: tl.constexpr, BY_ROW: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """One block of queries of one head, in one pass over the keys; in two where the weights are ROUNDED.

    q codes [B, heads, rows, WIDTH], k codes [B, heads / SHARE, length, WIDTH], v [.., VALUE_WIDTH] as many, by strides;
    steps f32: of q [B, heads, rows] (times scale and log2 e), of k [B, heads / SHARE, length], of v one with the stride
    v_step_h. bias f32 [B, heads, rows] and softcap: in powers of two. mask: broadcast by strides; bounds as
    `mask_bounds` finds them. heads [heads]: where a head stands in out [B, all_heads, rows, DV], in mask and in sinks.
    """
    blocks = tl.cdiv(rows, BLOCK_M)
    block, one = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = one // heads, one % heads
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    at = (batch.to(tl.int64) * heads + head) * rows
    own = batch.to(tl.int64) * (heads // SHARE) + head // SHARE
    outer = head
    if heads_ptr is not None:
        outer = tl.load(heads_ptr + head).to(tl.int32)
    wide, tall = tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + (at + row.to(tl.int64))[:, None] * WIDTH + wide[None, :], mask=inside[:, None], other=0.0)
    step = tl.load(q_step_ptr + at + row, mask=inside, other=1.0)
    if FAST:
        step = greater(step, 1e-37)  # times -inf it must be -inf
    bias = None
    k_step_at = None
    mask_at = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at + row, mask=inside, other=0.0)
    if k_step_ptr is not None:
        k_step_at = k_step_ptr + own * length
    if mask_ptr is not None:
        mask_at = mask_ptr + batch.to(tl.int64) * mask_b + outer.to(tl.int64) * mask_h
        mask_at = mask_at + row.to(tl.int64)[:, None] * mask_m
    k_first = k_ptr + own * length * WIDTH + tall[:, None] * WIDTH + wide[None, :]
    v_at = v_ptr + batch.to(tl.int64) * v_b + (head // SHARE).to(tl.int64) * v_g
    v_at = v_at + tall.to(tl.int64)[:, None] * v_l + tl.arange(0, VALUE_WIDTH)[None, :]
    v_next = tl.cast(v_l, tl.int64) * BLOCK_N
    whole, end = _bounds(block * BLOCK_M, length, CAUSAL, BLOCK_M, BLOCK_N)
    first = 0
    if mask_ptr is not None:
        bounds_at = bounds_ptr + batch * bounds_b + outer * bounds_h + block * 3
        first = tl.load(bounds_at)
        whole = tl.maximum(tl.minimum(whole, tl.load(bounds_at + 1)), first)
        end = tl.minimum(end, tl.load(bounds_at + 2) * BLOCK_N)
        k_first += tl.cast(first, tl.int64) * (BLOCK_N * WIDTH)
        v_at += first * v_next
        first = first * BLOCK_N  # a product, so that the compiler knows what divides it
    whole = whole * BLOCK_N
    k_rest = k_first + tl.cast(whole - first, tl.int64) * WIDTH
    v_rest = v_at + tl.cast(whole - first, tl.int64) * v_l
    most = tl.full((BLOCK_M,), _LEAST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    times = total
    if ROUNDED:
        most, total = _passed(q, k_first, k_step_at, mask_at, mask_n, step, bias, most, total, row, first, whole,
                              length, softcap, rows, CAUSAL, FAST, BOOL, False, WIDTH, BLOCK_N)  # fmt: skip
        most, total = _passed(q, k_rest, k_step_at, mask_at, mask_n, step, bias, most, total, row, whole, end, length,
                              softcap, rows, CAUSAL, FAST, BOOL, True, WIDTH, BLOCK_N)  # fmt: skip
    best = most
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + outer).to(tl.float32) * _LOG2E
        most = tl.maximum(most, sink)
        total = total * tl.exp2(best - most) + tl.exp2(sink - most)
    if ROUNDED:
        times, weight_step = _weight_steps(most, best, total, QMAX, CLIP, BY_ROW)
    acc = tl.zeros((BLOCK_M, VALUE_WIDTH), tl.float32)
    acc, most, total = _added(
        acc, q, k_first, k_step_at, v_at, v_next, mask_at, mask_n, step, bias, most, total, times, row, first, whole,
        length, softcap, rows, CAUSAL, FAST, BOOL, False, ROUNDED, INTEGER, BITS, LEAST, QMAX, WIDTH, BLOCK_N
    )  # fmt: skip
    acc, most, total = _added(
        acc, q, k_rest, k_step_at, v_rest, v_next, mask_at, mask_n, step, bias, most, total, times, row, whole, end,
        length, softcap, rows, CAUSAL, FAST, BOOL, True, ROUNDED, INTEGER, BITS, LEAST, QMAX, WIDTH, BLOCK_N
    )  # fmt: skip
    if not ROUNDED:
        weight_step = _inverse(total)
    acc = acc * weight_step[:, None]
    _store(acc, v_step_ptr, v_step_h, out_ptr, batch, head // SHARE, outer, row, rows, all_heads, DV, VALUE_WIDTH)
