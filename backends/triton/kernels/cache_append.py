"""New tokens into the memory of a packed cache: whole groups of the newest to codes, the rest behind the newest.

How much there is of what is found on the device, as `qfx.kv.packed_ops.Memory.append` finds it.
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.cache_attention import head_of
from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.rounding import e4m3_of, greater, is_nan, round_even

_TINY = tl.constexpr(1.1754943508222875e-38)
_TICKET = tl.constexpr(1 << 40)  # more than there are tokens


@triton.jit
def counts(length_ptr, stored_ptr, new, SINKS: tl.constexpr, RESIDUAL: tl.constexpr, STEP: tl.constexpr,
           ROOM: tl.constexpr):  # fmt: skip
    """(tokens before, stored, new ones that are sinks, newest that are held, those to be stored now)."""
    length = tl.load(length_ptr).to(tl.int32)
    # Volatile, as programs that end add their tickets meanwhile: an atomic addition races with a plain load.
    stored = (tl.load(stored_ptr, volatile=True) & (_TICKET - 1)).to(tl.int32)
    missing = tl.minimum(tl.maximum(SINKS - length, 0), new)
    held = tl.maximum(length - SINKS - stored, 0)
    ready = tl.maximum(held - RESIDUAL, 0) // STEP * STEP
    if held - ready + new - missing > ROOM:
        ready = tl.maximum(held + new - missing - RESIDUAL, 0) // STEP * STEP
    return length, stored, missing, held, ready


@triton.jit
def _over(x, y):
    """x / y as torch rounds it; y may be a number."""
    return tl.div_rn(x, tl.zeros_like(x) + y)


@triton.jit
def _kept(scale, AS: tl.constexpr):
    """(f32, stored) of a scale as `numerics` stores it. AS: 0 f32, 1 f16, 2 bf16, 3 a power of two, in a byte.

    One that is infinite or NaN is stored as NaN, but in f32, where it stays.
    """
    scale = tl.where(scale < _TINY, 1.0, scale)
    finite = scale < float("inf")
    if AS == 1:
        stored = tl.minimum(tl.maximum(scale, 5.960464477539063e-08), 65504.0)
        stored = tl.where(finite, stored, float("nan")).to(tl.float16)
        return stored.to(tl.float32), stored
    elif AS == 2:
        bits = tl.minimum(scale, 3.3895313892515355e38).to(tl.int32, bitcast=True)
        bits = tl.where(finite, (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536, 0x7FC00000)
        return bits.to(tl.float32, bitcast=True), bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    elif AS == 3:
        bits = scale.to(tl.int32, bitcast=True)
        byte = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)
        return _power_of_two(byte, finite)
    else:
        return scale, scale


@triton.jit
def _power_of_two(byte, finite):
    """(f32, stored) of a scale in a byte; where it is not finite the byte is that of NaN."""
    scale = tl.where(finite, (byte << 23).to(tl.float32, bitcast=True), float("nan"))
    return scale, tl.where(finite, byte, 255).to(tl.uint8)


@triton.jit
def _chosen(low, high, lost, QMAX: tl.constexpr, AFFINE: tl.constexpr, LARGEST: tl.constexpr, AS: tl.constexpr,
            EMAX: tl.constexpr, LEAST: tl.constexpr):  # fmt: skip
    """(scale f32, scale as stored, zero) for values from low to high; lost: 1 where one of them is NaN.

    LEAST: zeros get the least scale, not 1, and infinities the greatest.
    """
    high = tl.where(lost == 0, high, float("nan"))
    if AFFINE:
        middle = (high + low) * 0.5
        half = (high - low) * 0.5
        low = middle - half
        high = middle + half
        step = greater(_over(high - low, QMAX), _over(tl.abs(low), LARGEST))
        scale, stored = _kept(_over(greater(step * QMAX, 0.0), QMAX), AS)
        zero = tl.minimum(tl.maximum(round_even(_over(-low, scale)), -LARGEST), LARGEST)
    else:
        zero = low * 0.0
        most = greater(-tl.minimum(low, 0.0), greater(high, 0.0))
        if AS == 3:  # 2^(floor(log2 most) - EMAX)
            exponent = ((most.to(tl.int32, bitcast=True) >> 23) & 255) - EMAX
            byte = tl.minimum(tl.maximum(tl.where(most < _TINY, 127, exponent), 1), 254)
            scale, stored = _power_of_two(byte, most < float("inf"))
        elif LEAST:
            stored = tl.minimum(tl.maximum(_over(most, QMAX), 5.960464477539063e-08), 65504.0)
            stored = tl.where(lost == 0, stored, most).to(tl.float16)
            scale = stored.to(tl.float32)
        else:
            scale, stored = _kept(_over(most, QMAX), AS)
    return scale, stored, zero


@triton.jit
def _read(newest_ptr, new_ptr, token, held, missing, stride, column, inside, WIDTH: tl.constexpr):
    """Values, f32, of the newest tokens and the new ones behind them."""
    old = tl.load(newest_ptr + token * WIDTH + column, mask=inside & (token < held), other=0.0)
    more = (missing + token - held).to(tl.int64) * stride + column
    new = tl.load(new_ptr + more, mask=inside & (token >= held), other=0.0)
    return tl.where(token < held, old.to(tl.float32), new.to(tl.float32))


@triton.jit
def encode(data_ptr, scale_ptr, zero_ptr, newest_ptr, new_ptr, block, chunk, stored, held, missing, ready, stride,
           WIDTH: tl.constexpr, SCALES: tl.constexpr, MODE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
           MIDDLE: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr,
           LARGEST: tl.constexpr, AS: tl.constexpr, EMAX: tl.constexpr, LEAST: tl.constexpr, TOKENS: tl.constexpr,
           SPAN: tl.constexpr, PADDED: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Codes of TOKENS tokens and of SPAN channels of a head, whole groups of both; pointers are of the head.

    PADDED: units of tokens that share bytes, up to a power of two.
    """
    PLANES: tl.constexpr = 1 if BITS >= 8 else 8 // BITS if 8 % BITS == 0 else 8
    LONG: tl.constexpr = TOKENS // PLANES
    ROWS: tl.constexpr = 1 if BITS >= 8 else PLANES * BITS // 8
    unit = tl.arange(0, PADDED)[:, None, None]
    plane = tl.arange(0, PLANES)[None, :, None]
    channel = tl.arange(0, SPAN)[None, None, :]
    token = block * TOKENS + unit * PLANES + plane
    WHOLE: tl.constexpr = SPAN if MODE == 2 or MODE == 0 else GROUP if GROUP < WIDTH else WIDTH
    column = chunk * WHOLE + channel
    inside = (unit < LONG) & (token < ready) & (channel < WHOLE) & (column < WIDTH)
    x = _read(newest_ptr, new_ptr, token, held, missing, stride, column, inside, WIDTH)
    at = stored + token
    if MODE == 0:
        tl.store(data_ptr + at * WIDTH + column, x.to(data_ptr.dtype.element_ty), mask=inside)
    else:
        low = tl.where(inside, x, float("inf"))
        high = tl.where(inside, x, -float("inf"))
        lost = (inside & is_nan(x)).to(tl.int32)
        if MODE == 2:
            low = tl.min(tl.min(low, 0), 0)[None, None, :]
            high = tl.max(tl.max(high, 0), 0)[None, None, :]
            lost = tl.max(tl.max(lost, 0), 0)[None, None, :]
            place = (stored + block * TOKENS) // GROUP * SCALES + column
            known = (column < WIDTH) & (channel < WHOLE)
        else:
            low = tl.min(low, 2)[:, :, None]
            high = tl.max(high, 2)[:, :, None]
            lost = tl.max(lost, 2)[:, :, None]
            if GROUPED and WIDTH % GROUP != 0:  # zeros fill the last group
                if (chunk + 1) * GROUP > WIDTH:
                    low = tl.minimum(low, 0.0)
                    high = tl.maximum(high, 0.0)
            place = at * SCALES + chunk
            known = (unit < LONG) & (token < ready)
        low = tl.where(known, low, 0.0)
        high = tl.where(known, high, 0.0)
        scale, kept, zero = _chosen(low, high, lost, QMAX, zero_ptr is not None, LARGEST, AS, EMAX, LEAST)
        tl.store(scale_ptr + place, kept, mask=known)
        if zero_ptr is not None:
            tl.store(zero_ptr + place, zero.to(tl.int32).to(zero_ptr.dtype.element_ty), mask=known)
        steps = tl.div_rn(x, tl.zeros_like(x) + scale)
        if KIND == 2:
            tl.store(data_ptr + at * WIDTH + column, e4m3_of(steps, BY_HAND), mask=inside)
        elif KIND == 3:
            tl.store(data_ptr + at * WIDTH + column, _e5m2_of(steps), mask=inside)
        else:
            steps = round_even(tl.minimum(tl.maximum(steps, -2097152.0), 2097152.0)) + zero
            code = tl.minimum(tl.maximum(steps, QMIN), QMAX).to(tl.int32) + MIDDLE
            if BITS == 8:
                tl.store(data_ptr + at * WIDTH + column, code.to(data_ptr.dtype.element_ty), mask=inside)
            else:
                if BITS > 4:
                    code = code.to(tl.int64)
                word = tl.sum(tl.where(inside, code, 0) << (plane * BITS), 1)
                first = block * TOKENS + tl.arange(0, PADDED)[:, None] * PLANES
                out = chunk * WHOLE + tl.arange(0, SPAN)[None, :]
                row = (stored + first) // PLANES * ROWS
                held_row = (tl.arange(0, PADDED)[:, None] < LONG) & (first < ready)
                held_row = held_row & (out < WIDTH) & (out < (chunk + 1) * WHOLE)
                for i in tl.static_range(ROWS):
                    byte = ((word >> (8 * i)) & 255).to(tl.uint8)
                    tl.store(data_ptr + (row + i) * WIDTH + out, byte, mask=held_row)


@triton.jit
def _e5m2_of(x):
    """f32 to the bits of e5m2 (uint8): half to even, saturated at 57344."""
    held = tl.minimum(tl.maximum(x, -57344.0), 57344.0)
    bits = held.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # 21 of 23 bits of the mantissa go; the exponents' biases are 127 and 15
    normal = ((size + 0xFFFFF + ((size >> 21) & 1)) >> 21) - (112 << 2)
    small = (tl.abs(held) + 128.0).to(tl.uint32, bitcast=True) & 0xFF  # in steps of 2^-16
    return (tl.where(tl.abs(held) < 6.103515625e-05, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _sinks(first_ptr, new_ptr, column, known, stride, length, missing, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The first `missing` new tokens to place `length` on."""
    i = tl.arange(0, BLOCK)[:, None]
    inside = (i < missing) & known
    x = tl.load(new_ptr + i.to(tl.int64) * stride + column, mask=inside, other=0.0)
    tl.store(first_ptr + (length + i) * WIDTH + column, x, mask=inside)


@triton.jit
def _take(first_ptr, newest_ptr, new_ptr, chunk, new, stride, length, missing, held, ready, WIDTH: tl.constexpr,
          SINKS: tl.constexpr, SINKS_BLOCK: tl.constexpr, TOKENS: tl.constexpr, WHOLE: tl.constexpr,
          SPAN: tl.constexpr):  # fmt: skip
    """Sinks and newest tokens of WHOLE channels of a head."""
    channel = tl.arange(0, SPAN)[None, :]
    column = chunk * WHOLE + channel
    known = (channel < WHOLE) & (column < WIDTH)
    if SINKS > 0:
        _sinks(first_ptr, new_ptr, column, known, stride, length, missing, WIDTH, SINKS_BLOCK)
    left = held + new - missing - ready
    start = tl.where(ready == 0, held // TOKENS * TOKENS, 0)
    for at in range(start, left, TOKENS):  # upwards, and what is read lies at or above what is written
        i = at + tl.arange(0, TOKENS)[:, None]
        token = i + ready
        inside = (i < left) & known
        old = tl.load(newest_ptr + token * WIDTH + column, mask=inside & (token < held), other=0.0)
        more = (missing + token - held).to(tl.int64) * stride + column
        x = tl.load(new_ptr + more, mask=inside & (token >= held), other=0.0)
        x = tl.where(token < held, old, x.to(old.dtype))
        tl.debug_barrier()
        tl.store(newest_ptr + i * WIDTH + column, x, mask=inside)


@triton.jit
def _count(stored_ptr, stored, ready, programs):
    """The last program of `programs` to end counts the tokens that were stored: until then all read the old number."""
    if ready > 0:
        tl.debug_barrier()  # every warp has read what the last program overwrites
        ended = tl.atomic_add(stored_ptr, _TICKET) // _TICKET
        if ended == programs - 1:
            tl.store(stored_ptr, (stored + ready).to(tl.int64))


@triton.jit
def _append(first_ptr, newest_ptr, new_ptr, data_ptr, scale_ptr, zero_ptr, chunk, new, length, stored, missing, held,
            ready, stride, WIDTH: tl.constexpr, SCALES: tl.constexpr, MODE: tl.constexpr, KIND: tl.constexpr,
            BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, GROUPED: tl.constexpr, QMIN: tl.constexpr,
            QMAX: tl.constexpr, LARGEST: tl.constexpr, AS: tl.constexpr, EMAX: tl.constexpr, LEAST: tl.constexpr,
            TOKENS: tl.constexpr, SPAN: tl.constexpr, PADDED: tl.constexpr, BY_HAND: tl.constexpr, FEW: tl.constexpr,
            SINKS: tl.constexpr, SINKS_BLOCK: tl.constexpr, TAKEN: tl.constexpr):  # fmt: skip
    """Keys or values of a head, some channels: one block of codes, or, of FEW new tokens, all that is to be done."""
    if FEW:
        for block in range(tl.cdiv(ready, TOKENS)):
            encode(data_ptr, scale_ptr, zero_ptr, newest_ptr, new_ptr, block, chunk, stored, held, missing, ready,
                   stride, WIDTH, SCALES, MODE, KIND, BITS, MIDDLE, GROUP, GROUPED, QMIN, QMAX, LARGEST, AS, EMAX,
                   LEAST, TOKENS, SPAN, PADDED, BY_HAND)  # fmt: skip
        WHOLE: tl.constexpr = SPAN if MODE == 2 or MODE == 0 else GROUP if GROUP < WIDTH else WIDTH
        _take(first_ptr, newest_ptr, new_ptr, chunk, new, stride, length, missing, held, ready, WIDTH, SINKS,
              SINKS_BLOCK, TAKEN, WHOLE, SPAN)  # fmt: skip
    elif tl.program_id(1) * TOKENS < ready:
        encode(data_ptr, scale_ptr, zero_ptr, newest_ptr, new_ptr, tl.program_id(1), chunk, stored, held, missing,
               ready, stride, WIDTH, SCALES, MODE, KIND, BITS, MIDDLE, GROUP, GROUPED, QMIN, QMAX, LARGEST, AS, EMAX,
               LEAST, TOKENS, SPAN, PADDED, BY_HAND)  # fmt: skip


@triton.jit
def append_codes(
    length_ptr, stored_ptr, first_k, first_v, newest_k, newest_v, k_ptr, v_ptr, k_data, k_scale, k_zero, v_data,
    v_scale, v_zero, heads, own_heads, groups, new, k_batch, k_head, k_token, v_batch, v_head, v_token, k_rows,
    k_scale_rows, v_rows, v_scale_rows, k_chunks, programs, places, D: tl.constexpr, DV: tl.constexpr,
    SINKS: tl.constexpr, RESIDUAL: tl.constexpr, STEP: tl.constexpr, ROOM: tl.constexpr, SINKS_BLOCK: tl.constexpr,
    TAKEN: tl.constexpr, ALL: tl.constexpr, FEW: tl.constexpr, BY_HAND: tl.constexpr,
    K_SCALES: tl.constexpr, K_MODE: tl.constexpr, K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_MIDDLE: tl.constexpr,
    K_GROUP: tl.constexpr, K_GROUPED: tl.constexpr, K_QMIN: tl.constexpr, K_QMAX: tl.constexpr,
    K_LARGEST: tl.constexpr, K_AS: tl.constexpr, K_EMAX: tl.constexpr, K_LEAST: tl.constexpr, K_TOKENS: tl.constexpr,
    K_SPAN: tl.constexpr, K_PADDED: tl.constexpr, V_SCALES: tl.constexpr, V_MODE: tl.constexpr, V_KIND: tl.constexpr,
    V_BITS: tl.constexpr, V_MIDDLE: tl.constexpr, V_GROUP: tl.constexpr, V_GROUPED: tl.constexpr, V_QMIN: tl.constexpr,
    V_QMAX: tl.constexpr, V_LARGEST: tl.constexpr, V_AS: tl.constexpr, V_EMAX: tl.constexpr, V_LEAST: tl.constexpr,
    V_TOKENS: tl.constexpr, V_SPAN: tl.constexpr, V_PADDED: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Program (head of a sequence, block of tokens, chunk of channels of keys, then of values) of a part.

    FEW: there is one block; what stays in float is done here, too. programs: those of all parts. places: how many
    tokens the memory is for, no constant, since every length of a cache would have a kernel of its own.
    """
    wait_for_earlier(EARLY)
    length, stored, missing, held, ready = counts(length_ptr, stored_ptr, new, SINKS, RESIDUAL, STEP, ROOM)
    tl.device_assert(length + new <= places, "a cache of fixed length is full: make it with a greater max_length")
    chunk = tl.program_id(2)
    batch = (tl.program_id(0) // own_heads).to(tl.int64)
    at = tl.program_id(0) % own_heads
    own = batch * own_heads + at
    g = at.to(tl.int64)
    if not ALL:
        g = head_of(at, heads).to(tl.int64)
    both = batch * groups + g
    if length + new <= places:
        if chunk < k_chunks:
            _append(first_k + both * SINKS * D, newest_k + both * ROOM * D, k_ptr + batch * k_batch + g * k_head,
                    k_data + own * k_rows * D, k_scale + own * k_scale_rows * K_SCALES,
                    None if k_zero is None else k_zero + own * k_scale_rows * K_SCALES, chunk, new, length, stored,
                    missing, held, ready, k_token, D, K_SCALES, K_MODE, K_KIND, K_BITS, K_MIDDLE, K_GROUP, K_GROUPED,
                    K_QMIN, K_QMAX, K_LARGEST, K_AS, K_EMAX, K_LEAST, K_TOKENS, K_SPAN, K_PADDED, BY_HAND, FEW, SINKS,
                    SINKS_BLOCK, TAKEN)  # fmt: skip
        else:
            _append(first_v + both * SINKS * DV, newest_v + both * ROOM * DV, v_ptr + batch * v_batch + g * v_head,
                    v_data + own * v_rows * DV, v_scale + own * v_scale_rows * V_SCALES,
                    None if v_zero is None else v_zero + own * v_scale_rows * V_SCALES, chunk - k_chunks, new, length,
                    stored, missing, held, ready, v_token, DV, V_SCALES, V_MODE, V_KIND, V_BITS, V_MIDDLE, V_GROUP,
                    V_GROUPED, V_QMIN, V_QMAX, V_LARGEST, V_AS, V_EMAX, V_LEAST, V_TOKENS, V_SPAN, V_PADDED, BY_HAND,
                    FEW, SINKS, SINKS_BLOCK, TAKEN)  # fmt: skip
        if FEW:
            _count(stored_ptr, stored, ready, programs)


@triton.jit
def append_newest(length_ptr, stored_ptr, first_k, first_v, newest_k, newest_v, k_ptr, v_ptr, groups, new, k_batch,
                  k_head, k_token, v_batch, v_head, v_token, k_chunks, programs, places, D: tl.constexpr,
                  DV: tl.constexpr, SINKS: tl.constexpr, RESIDUAL: tl.constexpr, STEP: tl.constexpr, ROOM: tl.constexpr,
                  SINKS_BLOCK: tl.constexpr, TAKEN: tl.constexpr,
                  SPAN: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """Program (head of a sequence, chunk of channels of keys, then of values): what stays in float."""
    wait_for_earlier(EARLY)
    length, stored, missing, held, ready = counts(length_ptr, stored_ptr, new, SINKS, RESIDUAL, STEP, ROOM)
    if length + new <= places:
        both = tl.program_id(0).to(tl.int64)
        batch = both // groups
        g = both % groups
        chunk = tl.program_id(1)
        if chunk < k_chunks:
            _take(first_k + both * SINKS * D, newest_k + both * ROOM * D, k_ptr + batch * k_batch + g * k_head, chunk,
                  new, k_token, length, missing, held, ready, D, SINKS, SINKS_BLOCK, TAKEN, SPAN, SPAN)  # fmt: skip
        else:
            _take(first_v + both * SINKS * DV, newest_v + both * ROOM * DV, v_ptr + batch * v_batch + g * v_head,
                  chunk - k_chunks, new, v_token, length, missing, held, ready, DV, SINKS, SINKS_BLOCK, TAKEN, SPAN,
                  SPAN)  # fmt: skip
        _count(stored_ptr, stored, ready, programs)
