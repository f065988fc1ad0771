"""Attention of few queries to a cache as it is stored: split over its tokens, then put together (flash decoding).

The queries that share a head of keys are the rows of a tile. Scales of whole tokens go into scores and into weights:
a weight is 2^(s - m) times its value's scale, with m the maximum of s + log2(scale) rounded down, and so at most 2 in
whatever range the scales are.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.cache_codes import scale_of, tile
from qfx.backends.triton.kernels.early import wait_for_earlier

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(at, heads):
    """The number of the at-th bit that is set."""
    number = tl.arange(0, 64)
    bit = (tl.cast(heads, tl.int64) >> number) & 1  # shifts of an int32 end at 31
    return tl.sum(tl.where((bit == 1) & (tl.cumsum(bit, 0) == at + 1), number, 0), 0)


@triton.jit
def seen(s, mask_ptr, row_at, place, mask_place, row, query, tokens, MASK: tl.constexpr, CAUSAL: tl.constexpr,
         EACH_ROW: tl.constexpr):  # fmt: skip
    """Scores [M, R] with what is not seen at -inf: a bool mask (MASK 1), an additive one (2), causality, the end.

    Scores are those of 2^s; the least finite number that a mask adds stays finite.
    """
    inside = place < tokens
    if MASK != 0:
        if EACH_ROW:
            found = tl.load(mask_ptr + row_at[:, None] + place[None, :] * mask_place,
                            mask=row[:, None] & inside[None, :], other=0)  # fmt: skip
        else:
            found = tl.load(mask_ptr + place * mask_place, mask=inside, other=0)[None, :]
        if MASK == 1:
            s = tl.where(found != 0, s, -float("inf"))
        else:
            added = found.to(tl.float32)
            s += tl.where(added == -float("inf"), added, tl.maximum(added, -2e38) * _LOG2E)
    if CAUSAL:
        s = tl.where(place[None, :] <= query[:, None], s, -float("inf"))
    return tl.where(inside[None, :], s, -float("inf"))


@triton.jit
def weights_of(s, factor, most, total):
    """Scores to weights: (weights, what the old sums are to be times, the new maximum, the new total).

    factor: of the values, of which the weights get theirs; the maximum is that of s + the factor's exponent.
    """
    if factor is None:
        new = tl.maximum(most, tl.max(s, 1))
    else:
        exponent = ((factor.to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)
        new = tl.maximum(most, tl.max(s + exponent[None, :], 1))
    safe = tl.where(new == -float("inf"), 0.0, new)
    p = tl.exp2(s - safe[:, None])
    old = tl.exp2(most - safe)
    total = total * old + tl.sum(p, 1)
    if factor is not None:
        p *= factor[None, :]
    return p, old, new, total


@triton.jit
def _floats_of(keys_ptr, values_ptr, q, count, at, tokens, sums, most, total, mask_ptr, row_at, mask_place, row,
               query, scale, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
               CAUSAL: tl.constexpr, EACH_ROW: tl.constexpr):  # fmt: skip
    """Attention to `count` tokens in float, rows of D, which are those from place `at` on."""
    channel = tl.arange(0, BLOCK_D)
    out = tl.arange(0, BLOCK_V)
    for start in range(0, count, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < count
        k = tl.load(keys_ptr + token[:, None] * D + channel[None, :], mask=inside[:, None] & (channel < D)[None, :],
                    other=0.0).to(DOT)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        place = tl.where(inside, token + at, tokens)
        s = seen(s, mask_ptr, row_at, place, mask_place, row, query, tokens, MASK, CAUSAL, EACH_ROW)
        p, old, most, total = weights_of(s, None, most, total)
        v = tl.load(values_ptr + token[:, None] * DV + out[None, :], mask=inside[:, None] & (out < DV)[None, :],
                    other=0.0).to(DOT)  # fmt: skip
        sums = tl.dot(p.to(DOT), v, sums * old[:, None], input_precision=PRECISION)
    return sums, most, total


@triton.jit
def split_attention(
    q_ptr, sums_ptr, most_ptr, total_ptr, length_ptr, stored_ptr, first_k, first_v, newest_k, newest_v,
    k_data, k_scale, k_zero, v_data, v_scale, v_zero, mask_ptr, heads, own_heads, queries, groups, scale, k_rows,
    k_scale_rows, v_rows, v_scale_rows, mask_batch, mask_head, mask_query, mask_place, splits,
    MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SINKS: tl.constexpr, ROOM: tl.constexpr, U: tl.constexpr,
    K_SCALES: tl.constexpr, K_MODE: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_MIDDLE: tl.constexpr,
    K_GROUP: tl.constexpr, K_DOT: tl.constexpr, K_FAST: tl.constexpr, V_SCALES: tl.constexpr, V_MODE: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_MIDDLE: tl.constexpr, V_GROUP: tl.constexpr, V_DOT: tl.constexpr,
    V_FAST: tl.constexpr, Q_DOT: tl.constexpr, PRECISION: tl.constexpr, ALL: tl.constexpr, MASK: tl.constexpr,
    EACH_ROW: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, FLOATS: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (head of a sequence and tile of its rows, split): sums f32 [B, G, splits + 1, rows, DV], their maximum
    and total [B, G, splits + 1, rows]; the first split is that of the tokens in float.

    q [B, H, S, D] contiguous, rows: MANY * S; memory of the part's own heads, whose numbers are the bits of `heads`.
    """
    wait_for_earlier(EARLY)
    tiles = tl.cdiv(MANY * queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    split = tl.program_id(1)
    batch = (head // own_heads).to(tl.int64)
    own = batch * own_heads + head % own_heads
    g = head % own_heads
    if not ALL:
        g = head_of(g, heads)
    both = batch * groups + g
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = row < MANY * queries
    query = row % queries
    channel = tl.arange(0, BLOCK_D)
    out = tl.arange(0, BLOCK_V)
    q = tl.load(q_ptr + (both * MANY * queries + row[:, None]) * D + channel[None, :],
                mask=known[:, None] & (channel < D)[None, :], other=0.0)  # fmt: skip
    row_at = (g * MANY + row // queries).to(tl.int64) * mask_head + query.to(tl.int64) * mask_query
    mask_ptr = mask_ptr if MASK == 0 else mask_ptr + batch * mask_batch
    if MASK != 0 and not EACH_ROW:
        mask_ptr += g.to(tl.int64) * MANY * mask_head
    tokens = tl.load(length_ptr).to(tl.int32)
    stored = tl.load(stored_ptr).to(tl.int32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if split == 0:
        sinks = tl.minimum(tokens, SINKS)
        given = q.to(tl.float32).to(Q_DOT)
        if SINKS > 0:
            sums, most, total = _floats_of(
                first_k + both * SINKS * D, first_v + both * SINKS * DV, given, sinks, 0, tokens, sums, most, total,
                mask_ptr, row_at, mask_place, known, query, scale, D, DV, BLOCK_D, BLOCK_V, 16, Q_DOT,
                PRECISION, MASK, CAUSAL, EACH_ROW,
            )  # fmt: skip
        rest = tl.minimum(tl.maximum(tokens - sinks - stored, 0), ROOM)
        sums, most, total = _floats_of(
            newest_k + both * ROOM * D, newest_v + both * ROOM * DV, given, rest, sinks + stored, tokens, sums, most,
            total, mask_ptr, row_at, mask_place, known, query, scale, D, DV, BLOCK_D, BLOCK_V, FLOATS,
            Q_DOT, PRECISION, MASK, CAUSAL, EACH_ROW,
        )  # fmt: skip
    else:
        units = stored // U
        blocks = tl.cdiv(units, BLOCK_R)
        first = blocks * (split - 1) // splits
        last = blocks * split // splits
        wide = q.to(tl.float32)
        factor = tl.full([BLOCK_M], _LOG2E, tl.float32) * scale
        if K_DOT == tl.float16 and Q_DOT != tl.float16:  # rows to at most 1, by a power of two
            up = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000
            up = tl.minimum(tl.maximum(up, 0x01000000), 0x7E000000)
            wide = wide * (0x7F000000 - up).to(tl.float32, bitcast=True)[:, None]
            factor = factor * up.to(tl.float32, bitcast=True)
        rows = wide.to(K_DOT)
        whole = tl.sum(rows.to(tl.float32), 1)
        off = tl.zeros([BLOCK_M], tl.float32)
        k_data += own * k_rows * D
        v_data += own * v_rows * DV
        if K_MODE != 0:
            k_scale += own * k_scale_rows * K_SCALES
        if V_MODE != 0:
            v_scale += own * v_scale_rows * V_SCALES
        if k_zero is not None:
            k_zero += own * k_scale_rows * K_SCALES
        if v_zero is not None:
            v_zero += own * v_scale_rows * V_SCALES
        for block in range(first, last):
            unit = block * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = unit < units
            for J in tl.static_range(U):
                token = unit * U + J
                k = tile(k_data, k_scale, k_zero, block * BLOCK_R, units, D, K_SCALES, K_MODE, K_KIND, K_BITS,
                         K_MIDDLE, K_GROUP, U, J, BLOCK_R, BLOCK_D, K_DOT, K_FAST, False)  # fmt: skip
                s = tl.dot(rows, tl.trans(k), input_precision=PRECISION)
                if K_MODE == 1:
                    step = scale_of(tl.load(k_scale + token, mask=inside, other=1))
                    if K_KIND == 2:
                        step *= 256.0
                    if k_zero is not None:
                        s -= whole[:, None] * tl.load(k_zero + token, mask=inside, other=0).to(tl.float32)[None, :]
                    s *= step[None, :]
                s *= factor[:, None]
                place = tl.where(inside, token + SINKS, tokens)
                s = seen(s, mask_ptr, row_at, place, mask_place, known, query, tokens, MASK, CAUSAL, EACH_ROW)
                v = tile(v_data, v_scale, v_zero, block * BLOCK_R, units, DV, V_SCALES, V_MODE, V_KIND, V_BITS,
                         V_MIDDLE, V_GROUP, U, J, BLOCK_R, BLOCK_V, V_DOT, V_FAST, True)  # fmt: skip
                if V_MODE == 1:
                    step = scale_of(tl.load(v_scale + token, mask=inside, other=1))
                    if V_KIND == 2:
                        step *= 256.0
                    p, old, most, total = weights_of(s, step, most, total)
                else:
                    p, old, most, total = weights_of(s, None, most, total)
                p = p.to(V_DOT)
                if V_MODE == 1 and v_zero is not None:
                    zero = tl.load(v_zero + token, mask=inside, other=0).to(tl.float32)
                    off = off * old + tl.sum(p.to(tl.float32) * zero[None, :], 1)
                sums = tl.dot(p, v, sums * old[:, None], input_precision=PRECISION)
        if V_MODE == 1 and v_zero is not None:
            sums -= off[:, None]
    at = (both * (splits + 1) + split) * MANY * queries + row
    tl.store(most_ptr + at, most, mask=known)
    tl.store(total_ptr + at, total, mask=known)
    tl.store(sums_ptr + at[:, None] * DV + out[None, :], sums,
             mask=(known & (total != 0.0))[:, None] & (out < DV)[None, :])  # fmt: skip


@triton.jit
def join_splits(sums_ptr, most_ptr, total_ptr, y_ptr, rows, splits, DV: tl.constexpr, SPLITS: tl.constexpr,
                BLOCK: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Program (row of a head, channels): y [B, G, rows, DV]. Splits without a token have the total 0 and no sums."""
    wait_for_earlier(EARLY)
    head = (tl.program_id(0) // rows).to(tl.int64)
    row = tl.program_id(0) % rows
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    at = (head * splits + split) * rows + row
    most = tl.load(most_ptr + at, mask=split < splits, other=-float("inf"))
    total = tl.load(total_ptr + at, mask=split < splits, other=0.0)
    all_most = tl.max(most, 0)
    weight = tl.exp2(most - tl.where(all_most == -float("inf"), 0.0, all_most))
    held = total != 0.0
    sums = tl.load(sums_ptr + at[:, None] * DV + column[None, :], mask=held[:, None] & (column < DV)[None, :],
                   other=0.0)  # fmt: skip
    y = tl.sum(sums * weight[:, None], 0)
    whole = tl.sum(total * weight, 0)
    y = y / tl.where(whole == 0.0, 1.0, whole)
    tl.store(y_ptr + (head * rows + row) * DV + column, y.to(y_ptr.dtype.element_ty), mask=column < DV)
