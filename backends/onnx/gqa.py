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
from qfx.backends.onnx.values import Value, dims_of
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
        angles = [_before_heads(b, n) for n in node.args[1:3]]
        if all(a is not None for a in angles):
            split = b.value_of(node.args[0].args[0])
            turned = rope(b, split, angles[0], angles[1], bool(node.args[3]))  # type: ignore[arg-type]
            return b.reshape(Value(turned.name, turned.dtype, split.dims), flat)
    if _is_swap(node):
        split_node = node.args[0]
        if is_call(split_node, _aten.reshape.default) and b.has(split_node.args[0]):
            source = b.value_of(split_node.args[0])
            if source.dims == flat:
                found: Value = source
                return found
        return b.reshape(b.value_of(split_node), flat)
    turned = b.op("Transpose", value, perm=[0, 2, 1, 3])
    return b.reshape(Value(turned.name, turned.dtype, (batch, length, heads, size)), flat)


def _is_swap(node: Any) -> bool:
    """A transpose of heads and tokens."""
    return isinstance(node, fx.Node) and is_call(node, _aten.transpose.int) and {a % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _before_heads(b: Builder, node: Any) -> Value | None:
    """cos or sin [B, 1, S, D] as [B, S, 1, D], where it is an unsqueeze of [B, S, D]."""
    if not is_call(node, _aten.unsqueeze.default) or node.args[1] % 4 != 1 or not b.has(node.args[0]):
        return None
    source = b.value_of(node.args[0])
    key = ("before heads", source.name)
    if key not in b.memo:
        turned = b.op("Unsqueeze", source, b.ints([2]))
        b.memo[key] = Value(turned.name, turned.dtype, (*source.dims[:2], 1, source.dims[2]))
    found: Value = b.memo[key]
    return found


EMIT: dict[str, Emit] = {"qfx.cached_attention.default": cached_attention}
