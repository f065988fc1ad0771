"""qfx::cached_attention as com.microsoft GroupQueryAttention, which grows caches where they lie.

Its rows are [B, S, H*D]: views by heads are taken back, and RoPE is applied before them. The mask goes in as a bias, so
that every mask is right (padding on either side, windows, ALiBi); the operator's own causal order is switched off.
It cannot take new tokens of several sequences at once after the first call: those come one at a time, or one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.backends.onnx import rotary
from qfx.backends.onnx.attention import attention, bias_of
from qfx.backends.onnx.branch import choose
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.packed_attention import by_heads
from qfx.backends.onnx.siblings import Part, part
from qfx.backends.onnx.values import Dim, Value, dims_of
from qfx.graph import is_call
from qfx.passes.kv_cache import shared

_aten = torch.ops.aten
TOTAL = "cached and new tokens"  # where a builder keeps their number, int64 [1]


def cached_attention(
    b: Builder, q: Value, k: Value, v: Value, past_k: Value, past_v: Value, mask: Value | None, sinks: Value | None,
    scale: float, causal: bool, softcap: float,
) -> list[Value]:  # fmt: skip
    """(attention [B, H, S, D], grown keys, grown values)."""
    assert b.node is not None
    if b.standard or not fits(b, q, k, v, causal):
        keys, values = (
            _shaped(b.op("Concat", past, new, axis=2), b.out[i]) for i, past, new in ((1, past_k, k), (2, past_v, v))
        )
        return [attention(b, q, keys, values, mask, sinks, scale, causal, softcap), keys, values]
    given = operands(b, q, k, v, dims_of(b.out[1].shape)[2], mask, sinks)
    y, keys, values = b.ops(
        "GroupQueryAttention", *given.rows, past_k, past_v, *given.rest, dtypes=[torch.float32] * 3, domain=MICROSOFT,
        scale=scale, softcap=softcap or None, **given.attributes,
    )  # fmt: skip
    return [by_rows(b, y, q), keys, values]


@dataclass(frozen=True)
class Operands:
    """What the operator takes: rows of query, key and value, then, after the caches, the rest, and its attributes."""

    rows: Sequence[Value | None]
    rest: list[Value | None]
    attributes: dict[str, int]


def operands(
    b: Builder, q: Value, k: Value, v: Value, length: Dim, mask: Value | None, sinks: Value | None
) -> Operands:
    """Of the attention being lowered, whose first three arguments are q, k and v; `length`: cached and new tokens."""
    assert b.node is not None
    bias = bias_of(b, mask, (q.dims[2], length))
    total = total_length(b)
    packed = _packed(b, total)
    rows = packed.rows if packed else [_rows(b, n, x) for n, x in zip(b.node.args[:3], (q, k, v), strict=True)]
    angles = packed.angles if packed else [None, None, None]
    rest = [_last_place(b, total, q.dims[0]), total, *angles, bias, sinks]
    heads = {"num_heads": q.dims[1], "kv_num_heads": k.dims[1], "causal": 0}
    return Operands(rows, rest, {**heads, **(packed.attributes if packed else {})})


def by_rows(b: Builder, y: Value, q: Value) -> Value:
    """The operator's result [B, S, H*D] as [B, H, S, D], the shape of q."""
    whole = Value(y.name, torch.float32, (q.dims[0], q.dims[2], q.dims[1] * q.dims[3]))
    return by_heads(b, whole, q.dims[1])


def fits(b: Builder, q: Value, k: Value, v: Value, causal: bool) -> bool:
    """Can the operator compute this attention?"""
    known = all(isinstance(size, int) for value in (q, k, v) for size in (value.dims[1], value.dims[3]))
    past = shared(b.root) if isinstance(b.root, fx.GraphModule) else {}
    return known and bool(past) and not causal and q.dtype == torch.float32 and v.dims[3] == q.dims[3] == k.dims[3]


def _shaped(value: Value, fake: torch.Tensor) -> Value:
    return Value(value.name, value.dtype, dims_of(fake.shape))


def total_length(b: Builder) -> Value:
    """int32 [1]: cached and new tokens."""
    if "int32 total" not in b.memo:
        b.memo["int32 total"] = b.cast(b.memo.get(TOTAL) or b.ints([1]), torch.int32)
    found: Value = b.memo["int32 total"]
    return found


@dataclass(frozen=True)
class Packed:
    """Query, key and value as one input of the operator, which applies RoPE by these tables itself."""

    rows: list[Value | None]
    angles: list[Value | None]
    attributes: dict[str, int]


def _packed(b: Builder, total: Value) -> Packed | None:
    """q, k and v as they lie in the result [B, S, (H+2G)*D] of one kernel; None where they do not."""
    assert b.node is not None
    q, k, v = (n for n in b.node.args[:3] if isinstance(n, fx.Node))
    turns = [n for n in (q, k) if is_call(n, torch.ops.qfx.rope.default)]
    if len(turns) == 1 or (turns and turns[0].args[1:4] != turns[1].args[1:4]):
        return None
    sources = [n.args[0] for n in turns] or [q, k]
    parts = [_part(b, n) for n in (*sources, v)]
    if any(p is None for p in parts):
        return None
    first, second, third = (p for p in parts if p is not None)
    whole = first.whole
    ends = [first.start == 0, first.width == second.start, second.start + second.width == third.start]
    if not all(ends) or third.start + third.width != whole.dims[-1] or {second.whole, third.whole} != {whole}:
        return None
    if not turns:
        return Packed([whole, None, None], [None] * 3, {})
    tables = rotary.halves(b, turns[0], whole.dims[:2])
    if tables is None or turns[0].meta["val"].shape[-1] % 16:
        return None
    widths = [p.width for p in (first, second, third)]
    ahead = _turned_ahead(b, whole, total)
    rows = choose(
        b, ahead, whole, lambda: _turned(b, whole, widths, tables), lambda: _same_shape(b.op("Identity", whole), whole)
    )
    still = [_unless(b, ahead, one, rest) for one, rest in zip(tables, (1.0, 0.0), strict=True)]
    longer = [_at_least(b, one, total) for one in still]
    return Packed([rows, None, None], [*longer, rotary.places(b, whole.dims)], {"do_rotary": 1})


def _turned_ahead(b: Builder, whole: Value, total: Value) -> Value:
    """bool [1]: first tokens of several sequences are turned before: the operator takes their places to be the same."""
    key = ("turned ahead", whole.dims[:2])
    if key not in b.memo:
        batch, new = (b.dim(size) for size in whole.dims[:2])
        several = b.op("Greater", batch, b.ints([1]), dtype=torch.bool)
        first = b.op("Equal", b.cast(total, torch.int64), new, dtype=torch.bool)
        b.memo[key] = b.op("And", several, first)
    found: Value = b.memo[key]
    return found


def _turned(b: Builder, whole: Value, widths: list[int], tables: list[Value]) -> Value:
    """RoPE of the query and key parts."""
    parts = b.ops("Split", whole, b.ints(widths), dtypes=[whole.dtype] * 3, axis=-1)
    for i in range(2):
        parts[i] = b.op("RotaryEmbedding", parts[i], rotary.places(b, whole.dims), *tables, domain=MICROSOFT)
    return _same_shape(b.op("Concat", *parts, axis=-1), whole)


def _same_shape(value: Value, other: Value) -> Value:
    return Value(value.name, value.dtype, other.shape)


def _unless(b: Builder, condition: Value, table: Value, rest: float) -> Value:
    """The table; where the condition holds all of it is `rest`: angles of zero turn nothing."""
    key = ("unless", condition.name, table.name)
    if key not in b.memo:
        chosen = b.op("Where", condition, b.scalar(rest, table.dtype), table)
        b.memo[key] = _same_shape(chosen, table)
    found: Value = b.memo[key]
    return found


def _part(b: Builder, swap: Any) -> Part | None:
    """Where [B, H, S, D] lies in a packed result of which it is a view."""
    if not rotary.is_swap(swap) or not is_call(swap.args[0], _aten.reshape.default):
        return None
    source = swap.args[0].args[0]
    return part(b, b.value_of(source)) if isinstance(source, fx.Node) and b.has(source) else None


def _at_least(b: Builder, table: Value, total: Value) -> Value:
    """A table [R, D/2] with at least `total` rows, which the operator wants; it reads only those of `places`."""
    key = ("long", table.name)
    if key not in b.memo:
        missing = b.op("Max", b.op("Sub", b.cast(total, torch.int64), b.dim(table.dims[0])), b.ints([0]))
        pads = b.op("Concat", b.ints([0, 0]), missing, b.ints([0]), axis=0)
        b.memo[key] = b.op("Pad", table, pads)
    found: Value = b.memo[key]
    return found


def _last_place(b: Builder, total: Value, batch: Dim) -> Value:
    """int32 [B]: the place of the last token of each sequence."""
    key = ("last place", batch)
    if key not in b.memo:
        b.memo[key] = b.op("Expand", b.op("Sub", total, b.const(1, torch.int32)), b.shape([batch]))
    found: Value = b.memo[key]
    return found


def _rows(b: Builder, node: Any, value: Value) -> Value:
    """[B, H, S, D] as [B, S, H*D]; where the value is a view of that, what it is a view of."""
    batch, heads, length, size = value.dims
    flat = (batch, length, heads * size)
    if is_call(node, torch.ops.qfx.rope.default) and rotary.is_swap(node.args[0]):
        turned = rotary.turned(b, node, flat)
        if turned is not None:
            return turned
    if rotary.is_swap(node):
        return rotary.flat_rows(b, node.args[0], flat)
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return b.reshape(Value(turned.name, turned.dtype, (batch, length, heads, size)), flat)


EMIT: dict[str, Emit] = {"qfx.cached_attention.default": cached_attention}
