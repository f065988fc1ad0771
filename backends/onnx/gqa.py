"""qfx::cached_attention as com.microsoft GroupQueryAttention, which grows caches where they lie.

Its rows are [B, S, H*D]: views by heads are taken back, and RoPE is applied before them. The mask goes in as a bias, so
that every mask is right (padding on either side, windows, ALiBi); the operator's own causal order is switched off.
It cannot take new tokens of several sequences at once after the first call: those come one at a time, or one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.backends.onnx.attention import attention, bias_of, rope
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.packed_attention import by_heads
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
    if b.standard or not _fits(b, q, k, v, causal):
        keys, values = (
            _shaped(b.op("Concat", past, new, axis=2), b.out[i]) for i, past, new in ((1, past_k, k), (2, past_v, v))
        )
        return [attention(b, q, keys, values, mask, sinks, scale, causal, softcap), keys, values]
    heads, groups = q.dims[1], k.dims[1]
    rows = [_rows(b, node, value) for node, value in zip(b.node.args[:3], (q, k, v), strict=True)]
    bias = bias_of(b, mask, (q.dims[2], dims_of(b.out[1].shape)[2]))
    total = _total(b)
    batch = b.op("Expand", b.op("Sub", total, b.const(1, torch.int32)), b.shape([q.dims[0]]))
    inputs = [*rows, past_k, past_v, batch, total, None, None, None, bias, sinks]
    y, keys, values = b.ops(
        "GroupQueryAttention", *inputs, dtypes=[torch.float32] * 3, domain=MICROSOFT, num_heads=heads,
        kv_num_heads=groups, scale=scale, softcap=softcap or None, causal=0,
    )  # fmt: skip
    whole = Value(y.name, torch.float32, (q.dims[0], q.dims[2], heads * q.dims[3]))
    return [by_heads(b, whole, heads), keys, values]


def _fits(b: Builder, q: Value, k: Value, v: Value, causal: bool) -> bool:
    known = all(isinstance(size, int) for value in (q, k, v) for size in (value.dims[1], value.dims[3]))
    past = shared(b.root) if isinstance(b.root, fx.GraphModule) else {}
    return known and bool(past) and not causal and q.dtype == torch.float32 and v.dims[3] == q.dims[3] == k.dims[3]


def _shaped(value: Value, fake: torch.Tensor) -> Value:
    return Value(value.name, value.dtype, dims_of(fake.shape))


def _total(b: Builder) -> Value:
    """int32 [1]: cached and new tokens."""
    if "int32 total" not in b.memo:
        b.memo["int32 total"] = b.cast(b.memo.get(TOTAL) or b.ints([1]), torch.int32)
    found: Value = b.memo["int32 total"]
    return found


def _rows(b: Builder, node: Any, value: Value) -> Value:
    """[B, H, S, D] as [B, S, H*D]; where the value is a view of that, what it is a view of."""
    batch, heads, length, size = value.dims
    flat = (batch, length, heads * size)
    if is_call(node, torch.ops.qfx.rope.default) and _is_swap(node.args[0]):
        turned = _turned(b, node, flat)
        if turned is not None:
            return turned
    if _is_swap(node):
        return _flat(b, node.args[0], flat)
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return b.reshape(Value(turned.name, turned.dtype, (batch, length, heads, size)), flat)


def _flat(b: Builder, split: fx.Node, flat: tuple[Dim, ...]) -> Value:
    """[B, S, H, D] as [B, S, H*D], which it may be a view of."""
    if is_call(split, _aten.reshape.default) and isinstance(split.args[0], fx.Node) and b.has(split.args[0]):
        source: Value = b.value_of(split.args[0])
        if source.shape == flat:
            return source
    return b.reshape(b.value_of(split), flat)


def _turned(b: Builder, node: fx.Node, flat: tuple[Dim, ...]) -> Value | None:
    """RoPE before the view by heads: one kernel where cos and sin are of two equal halves, else spelled out."""
    by_heads_, cos, sin, interleaved = node.args[:4]
    assert isinstance(by_heads_, fx.Node)
    split = by_heads_.args[0]
    assert isinstance(split, fx.Node)
    angles = [_before_heads(b, n) for n in (cos, sin)]
    if any(a is None for a in angles):
        return None
    width = node.meta["val"].shape[-1]
    known = [a for a in angles if a is not None]
    alike = _has_equal_halves(cos) and _has_equal_halves(sin) and all(a.dims[:2] == flat[:2] for a in known)
    if not interleaved and alike:
        tables = [_table(b, a, width) for a in known]
        y = b.op("RotaryEmbedding", _flat(b, split, flat), _places(b, flat), *tables, domain=MICROSOFT)
        return Value(y.name, y.dtype, flat)
    wide = [_widened(b, a) for a in known]
    source = b.value_of(split)
    y = rope(b, source, wide[0], wide[1], bool(interleaved))
    return b.reshape(Value(y.name, y.dtype, source.dims), flat)


def _places(b: Builder, flat: tuple[Dim, ...]) -> Value:
    """int64 [B, S]: which row of the tables belongs to a token; every token has its own."""
    key = ("places", flat[:2])
    if key not in b.memo:
        zero, one = b.scalar(0, torch.int64), b.scalar(1, torch.int64)
        rows = b.op("Range", zero, b.scalar(flat[0] * flat[1], torch.int64), one)
        b.memo[key] = b.reshape(Value(rows.name, torch.int64, (flat[0] * flat[1],)), flat[:2])
    found: Value = b.memo[key]
    return found


def _table(b: Builder, angle: Value, width: int) -> Value:
    """cos or sin [B, S, D] as a table [B*S, D/2]."""
    key = ("table", angle.name)
    if key not in b.memo:
        half = b.op("Slice", angle, b.ints([0]), b.ints([width // 2]), b.ints([2]))
        rows = angle.dims[0] * angle.dims[1]
        b.memo[key] = b.reshape(Value(half.name, half.dtype, (*angle.dims[:2], width // 2)), (rows, width // 2))
    found: Value = b.memo[key]
    return found


def _has_equal_halves(node: Any) -> bool:
    """Is it made element by element of a concatenation of a tensor with itself?"""
    while isinstance(node, fx.Node) and is_call(node, *_BY_ELEMENT):
        node = node.args[0]
    if not isinstance(node, fx.Node) or not is_call(node, _aten.cat.default):
        return False
    parts = node.args[0]
    return isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1] and node.args[1] in (-1, 2)


_BY_ELEMENT = (_aten.unsqueeze.default, _aten.cos.default, _aten.sin.default, _aten._to_copy.default, _aten.mul.Scalar)


def _is_swap(node: Any) -> bool:
    """A transpose of heads and tokens."""
    return isinstance(node, fx.Node) and is_call(node, _aten.transpose.int) and {a % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _before_heads(b: Builder, node: Any) -> Value | None:
    """cos or sin [B, S, D], where the node [B, 1, S, D] is an unsqueeze of it."""
    if not is_call(node, _aten.unsqueeze.default) or node.args[1] % 4 != 1 or not b.has(node.args[0]):
        return None
    found: Value = b.value_of(node.args[0])
    return found


def _widened(b: Builder, angle: Value) -> Value:
    """[B, S, D] as [B, S, 1, D]."""
    key = ("before heads", angle.name)
    if key not in b.memo:
        wide = b.op("Unsqueeze", angle, b.ints([2]))
        b.memo[key] = Value(wide.name, wide.dtype, (*angle.dims[:2], 1, angle.dims[2]))
    found: Value = b.memo[key]
    return found


EMIT: dict[str, Emit] = {"qfx.cached_attention.default": cached_attention}
