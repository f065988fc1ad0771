"""Attention of few queries to many keys and values in float: split over the tokens, then put together.

The queries that share a head of keys are the rows of a tile. Before and behind what a mask shows nothing is read: in a
cache of fixed length that is all behind the newest token. Splits take blocks in turn, so that each has as many of those
that are read.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.cache_attention import seen, weights_of
from qfx.backends.triton.kernels.early import wait_for_earlier

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def mask_spans(
    mask_ptr,
    spans_ptr,
    tokens,
    batch_stride,
    place_stride,
    BOOL: tl.constexpr,
    SCAN: tl.constexpr,
    EARLY: tl.constexpr = False,
):
    """Program (sequence): the first place that a mask [B, tokens] shows, and the one behind the last, i32 [B, 2].

    Additive masks hide what is -inf, and no finite number: where all of a row is the least one, all of it counts alike.
    """
    wait_for_earlier(EARLY)
    batch = tl.program_id(0)
    mask_ptr += batch.to(tl.int64) * batch_stride
    low = tl.full([SCAN], 0x7FFFFFFF, tl.int32)
    high = tl.zeros([SCAN], tl.int32)
    for start in range(0, tokens, SCAN):
        place = start + tl.arange(0, SCAN)
        found = tl.load(mask_ptr + place.to(tl.int64) * place_stride, mask=place < tokens, other=0)
        show = ((found != 0) if BOOL else (found.to(tl.float32) != -float("inf"))) & (place < tokens)
        low = tl.minimum(low, tl.where(show, place, 0x7FFFFFFF))
        high = tl.maximum(high, tl.where(show, place + 1, 0))
    tl.store(spans_ptr + batch * 2, tl.minimum(tl.min(low, 0), tokens))
    tl.store(spans_ptr + batch * 2 + 1, tl.max(high, 0))


@triton.jit
def split_float_attention(
    q_ptr, k_ptr, v_ptr, mask_ptr, spans_ptr, sinks_ptr, sums_ptr, most_ptr, total_ptr, groups, queries, tokens,
    scale, softcap, q_batch, q_head, q_query, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch,
    mask_head, mask_query, mask_place, spans_batch, splits,
    MANY: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, MASK: tl.constexpr, EACH_ROW: tl.constexpr,
    CAUSAL: tl.constexpr, ONE: tl.constexpr, DOT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (head of keys of a sequence and tile of its rows, split): sums f32 [B, G, splits, rows, DV], their
    maximum and total [B, G, splits, rows]; with ONE split the result itself, [B, G, rows, DV].

    q [B, H, S, D], k [B, G, L, D], v [B, G, L, DV], last strides 1; rows: MANY * S. MASK: 0 none, 1 booleans,
    2 additive; CAUSAL: columns up to the row. spans: of `mask_spans`, outside of which nothing is read. sinks [H]: a
    score more that takes part, of the first split.
    """
    wait_for_earlier(EARLY)
    tiles = tl.cdiv(MANY * queries, BLOCK_M)
    head = tl.program_id(0) // tiles
    split = tl.program_id(1)
    batch, g = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    row = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = row < MANY * queries
    query, asking = row % queries, g * MANY + row // queries
    channel, out = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_at = q_ptr + batch * q_batch + asking * q_head + query.to(tl.int64) * q_query
    q = tl.load(q_at[:, None] + channel[None, :], mask=known[:, None] & (channel < D)[None, :], other=0.0).to(DOT)
    most = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if sinks_ptr is not None:
        if split == 0:
            most = tl.load(sinks_ptr + asking, mask=known, other=0.0).to(tl.float32) * _LOG2E
            total += 1.0
    row_at = asking * mask_head + query.to(tl.int64) * mask_query
    low, high = 0, tokens
    if spans_ptr is not None:
        low, high = tl.load(spans_ptr + batch * spans_batch), tl.load(spans_ptr + batch * spans_batch + 1)
    if MASK != 0:
        mask_ptr += batch * mask_batch
        if not EACH_ROW:
            mask_ptr += g * MANY * mask_head
    if CAUSAL:
        high = tl.minimum(high, queries)
    k_ptr += batch * k_batch + g * k_head
    v_ptr += batch * v_batch + g * v_head
    for block in range(low // BLOCK_R + split, tl.cdiv(high, BLOCK_R), splits):
        start = block * BLOCK_R
        token = tl.arange(0, BLOCK_R)
        place = start + token
        inside = place < tokens
        k = tl.load(k_ptr + tl.cast(start, tl.int64) * k_token + token[:, None] * k_token + channel[None, :],
                    mask=inside[:, None] & (channel < D)[None, :], other=0.0).to(DOT)  # fmt: skip
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if softcap is not None:  # tanh x = 2 sigmoid(2 x) - 1
            s = (tl.sigmoid(s * (scale * 2.0 / softcap)) * 2.0 - 1.0) * (softcap * _LOG2E)
        else:
            s *= scale * _LOG2E
        s = seen(s, mask_ptr, row_at, place, mask_place, known, query, tokens, MASK, CAUSAL, EACH_ROW)
        p, old, most, total = weights_of(s, None, most, total)
        v = tl.load(v_ptr + tl.cast(start, tl.int64) * v_token + token[:, None] * v_token + out[None, :],
                    mask=inside[:, None] & (out < DV)[None, :], other=0.0).to(DOT)  # fmt: skip
        sums = tl.dot(p.to(DOT), v, sums * old[:, None], input_precision="ieee")
    if ONE:
        at = tl.cast(head, tl.int64) * MANY * queries + row
        y = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(sums_ptr + at[:, None] * DV + out[None, :], y.to(sums_ptr.dtype.element_ty),
                 mask=known[:, None] & (out < DV)[None, :])  # fmt: skip
    else:
        at = (tl.cast(head, tl.int64) * splits + split) * MANY * queries + row
        tl.store(most_ptr + at, most, mask=known)
        tl.store(total_ptr + at, total, mask=known)
        tl.store(sums_ptr + at[:, None] * DV + out[None, :], sums,
                 mask=(known & (total != 0.0))[:, None] & (out < DV)[None, :])  # fmt: skip
