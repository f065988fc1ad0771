"""qfx::quantized_cached_attention as GroupQueryAttention over caches of int8 or of two 4-bit codes a byte.

    If(nothing is cached, or many tokens are new):
          GroupQueryAttention in float over the dequantized cache, then its new keys and values as codes into the caches
    else: GroupQueryAttention over the quantized caches

The kernel over codes dequantizes every key for every new token, which makes it two to three times slower than the one
in float for a prompt of 512 tokens; a single token it reads faster, for it reads fewer bytes. Both ways write into
memory that past and present share where it has room; where not, the caches are made anew. Scales of int8 caches are
folded into the rows where RoPE comes before the operator: it then reads them as one scale of 1.

For the runtime "standard", and for attention that the kernel does not take, the same is spelled out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qfx.backends.onnx.attention import attention
from qfx.backends.onnx.branch import choose_each
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.gqa import TOTAL, by_rows, fits, operands
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.values import Dim, Value, dims_of
from qfx.format import Format
from qfx.ops.cached import PROMPT

_CHANNEL, _TENSOR = "PER_CHANNEL", "PER_TENSOR"


def quantized_cached_attention(
    b: Builder, q: Value, k: Value, v: Value, past_k: Value, past_v: Value, k_scale: Value, v_scale: Value,
    mask: Value | None, sinks: Value | None, scale: float, causal: bool, softcap: float, k_format: str, v_format: str,
) -> list[Value]:  # fmt: skip
    """(attention [B, H, S, D], grown keys, grown values), the caches as stored."""
    formats = [Format.parse(text) for text in (k_format, v_format)]
    steps = [k_scale, v_scale]
    length = dims_of(b.out[1].shape)[2]
    if b.standard or not fits(b, q, k, v, causal):
        ways = zip((k, v), (past_k, past_v), steps, formats, strict=True)
        grown = [_grown(b, new, past, step, fmt, length) for new, past, step, fmt in ways]
        (keys, kept_keys), (values, kept_values) = grown
        y = attention(b, q, keys, values, mask, sinks, scale, causal, softcap)
        return [y, kept_keys, kept_values]
    given = operands(b, q, k, v, length, mask, sinks)
    first, places, room = _is_prompt(b, q), _places(b, k, past_k, length), _room(b, past_k)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap or None, "domain": MICROSOFT, **given.attributes}
    pasts, flat = [past_k, past_v], (q.dims[0], q.dims[2], q.dims[1] * q.dims[3])
    shapes = [flat, *(dims_of(fake.shape) for fake in b.out[1:])]

    def prompt() -> list[Value]:
        cached = [_cached(b, past) for past in pasts]
        old = [_decoded(b, one, step, fmt) for one, step, fmt in zip(cached, steps, formats, strict=True)]
        y, *grown = b.ops("GroupQueryAttention", *given.rows, *old, *given.rest, dtypes=[torch.float32] * 3, **options)
        new = [_new(b, one, value, past_k) for one, value in zip(grown, (k, v), strict=True)]
        codes = [_encoded(b, n, step, fmt) for n, step, fmt in zip(new, steps, formats, strict=True)]
        return _shaped([y, *_written(b, room, pasts, cached, places, codes)], shapes)

    unscaled = formats[0].bits == 8 and None not in given.rows

    def token() -> list[Value]:
        rows, scales, granularity = given.rows, steps, _CHANNEL
        if unscaled:
            rows = _unscaled(b, [row for row in given.rows if row is not None], *steps)
            scales, granularity = [b.const([1.0], torch.float32)] * 2, _TENSOR
        inputs = [*rows, *pasts, *given.rest, *scales]
        dtypes = [torch.float32, past_k.dtype, past_v.dtype]
        types: dict[str, Any] = {
            "k_quant_type": granularity,
            "v_quant_type": granularity,
            "kv_cache_bit_width": formats[0].bits,
        }
        y, *grown = b.ops("GroupQueryAttention", *inputs, dtypes=dtypes, **types, **options)
        if unscaled:
            y = b.op("Mul", y, _by_head(b, v_scale, q.dims[1]))
        return _shaped([y, *grown], shapes)

    sources = [row for row in (*given.rows, *pasts) if row is not None]
    y, keys, values = choose_each(b, first, sources, prompt, token)
    return [by_rows(b, y, q), keys, values]


def _shaped(values: Sequence[Value], shapes: Sequence[Sequence[Dim]]) -> list[Value]:
    return [Value(value.name, value.dtype, tuple(shape)) for value, shape in zip(values, shapes, strict=True)]


def _unscaled(b: Builder, rows: Sequence[Value], k_scale: Value, v_scale: Value) -> list[Value]:
    """Rows [B, S, heads * D] of query, key and value, with which the caches' scales are 1.

        q k^T = (q * c) (k / c)^T        y = p v = (p (v / c)) * c        c of each channel

    The kernel then multiplies no code by a scale of its own: with heads of 128 it is almost twice as fast.
    """
    q, k, v = rows
    width = int(k_scale.dims[-1])
    return [
        b.op("Mul", q, _by_head(b, k_scale, int(q.dims[-1]) // width)),
        b.op("Div", k, _by_head(b, k_scale, int(k.dims[-1]) // width)),
        b.op("Div", v, _by_head(b, v_scale, int(v.dims[-1]) // width)),
    ]


def _by_head(b: Builder, scale: Value, heads: Dim) -> Value:
    """Scales [1, G, 1, D] as a row f32 [heads * D]: those of a key head for each of the query heads that share it."""
    key = ("scales of heads", scale.name, heads)
    if key not in b.memo:
        groups, width = (int(scale.dims[i]) for i in (1, 3))
        shared = b.op("Expand", scale, b.ints([1, groups, int(heads) // groups, width]))
        b.memo[key] = b.op("Reshape", shared, b.ints([int(heads) * width]))
    found: Value = b.memo[key]
    return found


def _is_prompt(b: Builder, new: Value) -> Value:
    """bool [1]: nothing is cached, or PROMPT tokens or more are new. new [.., S, D]"""
    key = ("prompt", new.dims[2])
    if key not in b.memo:
        count = b.dim(new.dims[2])
        alone = b.op("Equal", b.memo.get(TOTAL) or b.ints([1]), count, dtype=torch.bool)
        many = b.op("GreaterOrEqual", count, b.ints([PROMPT]), dtype=torch.bool)
        b.memo[key] = b.op("Or", alone, many)
    found: Value = b.memo[key]
    return found


def _room(b: Builder, past: Value) -> Value:
    """bool [1]: the memory of a cache takes all tokens. The caches of all layers are alike."""
    if "room" not in b.memo:
        size = b.op("Shape", past, dtype=torch.int64, start=2, end=3)
        b.memo["room"] = b.op("GreaterOrEqual", size, b.memo.get(TOTAL) or b.ints([1]), dtype=torch.bool)
    found: Value = b.memo["room"]
    return found


def _places(b: Builder, new: Value, past: Value, length: Dim) -> Value:
    """int64 [B, G, S, 3]: the first three indices of each new token in a cache [B, G, room, D]."""
    sizes = new.dims[:3]
    key = ("cache places", sizes)
    if key not in b.memo:
        one, whole = b.scalar(1, torch.int64), b.shape([*sizes, 1])
        ends = [(0, sizes[0]), (0, sizes[1]), (past.dims[2], length)]
        axes = []
        for axis, (start, end) in enumerate(ends):
            counted = b.op("Range", b.scalar(start, torch.int64), b.scalar(end, torch.int64), one)
            column = b.op("Reshape", counted, b.ints([-1 if i == axis else 1 for i in range(4)]))
            axes.append(b.op("Expand", column, whole))
        b.memo[key] = b.op("Concat", *axes, axis=3)
    found: Value = b.memo[key]
    return found


def _cached(b: Builder, past: Value) -> Value:
    """The tokens that a cache's memory holds."""
    held = b.op("Slice", past, b.ints([0]), b.dim(past.dims[2]), b.ints([2]))
    return Value(held.name, past.dtype, past.dims)


def _new(b: Builder, grown: Value, new: Value, past: Value) -> Value:
    """The new tokens [B, G, S, D] of grown keys or values, which RoPE has turned."""
    ends = b.ints([torch.iinfo(torch.int64).max])
    return Value(b.op("Slice", grown, b.dim(past.dims[2]), ends, b.ints([2])).name, grown.dtype, new.dims)


def _written(
    b: Builder, room: Value, pasts: Sequence[Value], cached: Sequence[Value], places: Value, codes: Sequence[Value]
) -> Sequence[Value]:
    """The caches grown by `codes`: in their own memory where that takes them."""

    def into() -> list[Value]:
        pairs = zip(pasts, codes, strict=True)
        return [Value(b.op("ScatterND", past, places, new).name, new.dtype) for past, new in pairs]

    def anew() -> list[Value]:
        pairs = zip(cached, codes, strict=True)
        return [Value(b.op("Concat", old, new, axis=2).name, new.dtype) for old, new in pairs]

    return choose_each(b, room, codes, into, anew)


def _encoded(b: Builder, x: Value, step: Value, fmt: Format) -> Value:
    """x [B, G, S, D] as a cache stores it."""
    steps = b.op("Div", x, step)
    if fmt.bits == 8:
        one = b.scalar(1.0, torch.float32)
        codes = b.op("QuantizeLinear", steps, one, b.const(0, torch.int8), dtype=torch.int8)
        return Value(codes.name, torch.int8, x.dims)
    low, high, offset = (b.scalar(float(n), torch.float32) for n in (fmt.qmin, fmt.qmax, -fmt.qmin))
    shifted = b.op("Add", b.op("Clip", b.op("Round", steps), low, high), offset)
    return _paired(b, Value(b.cast(shifted, torch.uint8).name, torch.uint8, x.dims))


def _paired(b: Builder, codes: Value) -> Value:
    """u8 codes below 16 [.., D], D even, two in a byte: the first of each pair in the low bits."""
    width = codes.dims[-1]
    axis = b.ints([3])
    even, odd = (b.op("Slice", codes, b.ints([start]), b.ints([width]), axis, b.ints([2])) for start in (0, 1))
    high = b.op("BitShift", odd, b.const(4, torch.uint8), direction="LEFT")
    both = b.op("BitwiseOr", even, high)
    return Value(both.name, torch.uint8, (*codes.dims[:-1], width // 2))


def _decoded(b: Builder, stored: Value, step: Value, fmt: Format) -> Value:
    """f32 [B, G, L, D] of what a cache [B, G, L, D or D/2] holds."""
    dims = (*stored.dims[:-1], step.dims[-1])
    if fmt.bits == 8:
        values = b.cast(stored, torch.float32)
    else:
        low = b.op("BitwiseAnd", stored, b.const(15, torch.uint8))
        high = b.op("BitShift", stored, b.const(4, torch.uint8), direction="RIGHT")
        pairs = b.op("Concat", *(b.op("Unsqueeze", half, b.ints([4])) for half in (low, high)), axis=4)
        codes = b.reshape(Value(pairs.name, torch.uint8, (*stored.dims, 2)), dims)
        values = b.op("Sub", b.cast(codes, torch.float32), b.scalar(float(-fmt.qmin), torch.float32))
    return Value(b.op("Mul", values, step).name, torch.float32, dims)


def _grown(b: Builder, new: Value, past: Value, step: Value, fmt: Format, length: Dim) -> tuple[Value, Value]:
    """The values to attend to, f32 [B, G, P + S, D], and the cache that holds them."""
    codes = _encoded(b, new, step, fmt)
    read = b.op("Where", _is_prompt(b, new), new, _decoded(b, codes, step, fmt))
    whole = b.op("Concat", _decoded(b, past, step, fmt), read, axis=2)
    grown = b.op("Concat", past, codes, axis=2)
    dims = (*new.dims[:2], length)
    return Value(whole.name, torch.float32, (*dims, new.dims[3])), Value(grown.name, past.dtype, (*dims, past.dims[3]))


EMIT: dict[str, Emit] = {"qfx.quantized_cached_attention.default": quantized_cached_attention}
