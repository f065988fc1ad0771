"""RoPE on rows [B, S, H*D], before they are viewed by heads: its tables are those that the model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.backends.onnx.attention import rope
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.values import Dim, Value
from qfx.graph import is_call

_aten = torch.ops.aten


def flat_rows(b: Builder, split: fx.Node, flat: tuple[Dim, ...]) -> Value:
    """[B, S, H, D] as [B, S, H*D], which it may be a view of."""
    if is_call(split, _aten.reshape.default) and isinstance(split.args[0], fx.Node) and b.has(split.args[0]):
        source: Value = b.value_of(split.args[0])
        if source.shape == flat:
            return source
    return b.reshape(b.value_of(split), flat)


def turned(b: Builder, node: fx.Node, flat: tuple[Dim, ...]) -> Value | None:
    """qfx::rope [B, H, S, D] as rows [B, S, H*D]: one kernel where its angles are by halves, else spelled out."""
    swap, cos, sin, interleaved = node.args[:4]
    assert isinstance(swap, fx.Node)
    split = swap.args[0]
    assert isinstance(split, fx.Node)
    tables = halves(b, node, flat[:2])
    if tables is not None:
        y = b.op("RotaryEmbedding", flat_rows(b, split, flat), places(b, flat), *tables, domain=MICROSOFT)
        return Value(y.name, y.dtype, flat)
    angles = [before_heads(b, n) for n in (cos, sin)]
    if any(a is None for a in angles):
        return None
    wide = [_widened(b, a) for a in angles if a is not None]
    source = b.value_of(split)
    y = rope(b, source, wide[0], wide[1], bool(interleaved))
    return b.reshape(Value(y.name, y.dtype, source.dims), flat)


def halves(b: Builder, node: fx.Node, tokens: tuple[Dim, ...]) -> list[Value] | None:
    """cos and sin of a qfx::rope as tables [B*S, D/2]; None where they have no two equal halves."""
    cos, sin, interleaved = node.args[1:4]
    if interleaved or not (has_equal_halves(cos) and has_equal_halves(sin)):
        return None
    angles = [before_heads(b, n) for n in (cos, sin)]
    width = node.meta["val"].shape[-1]
    if any(a is None or a.dims[:2] != tokens for a in angles):
        return None
    return [table(b, a, width) for a in angles if a is not None]


def places(b: Builder, flat: tuple[Dim, ...]) -> Value:
    """int64 [B, S]: which row of the tables belongs to a token; every token has its own."""
    key = ("places", flat[:2])
    if key not in b.memo:
        zero, one = b.scalar(0, torch.int64), b.scalar(1, torch.int64)
        rows = b.op("Range", zero, b.scalar(flat[0] * flat[1], torch.int64), one)
        b.memo[key] = b.reshape(Value(rows.name, torch.int64, (flat[0] * flat[1],)), flat[:2])
    found: Value = b.memo[key]
    return found


def table(b: Builder, angle: Value, width: int) -> Value:
    """cos or sin [B, S, D] as a table [B*S, D/2]."""
    key = ("table", angle.name)
    if key not in b.memo:
        half = b.op("Slice", angle, b.ints([0]), b.ints([width // 2]), b.ints([2]))
        rows = angle.dims[0] * angle.dims[1]
        b.memo[key] = b.reshape(Value(half.name, half.dtype, (*angle.dims[:2], width // 2)), (rows, width // 2))
    found: Value = b.memo[key]
    return found


def has_equal_halves(node: Any) -> bool:
    """Is it made element by element of a concatenation of a tensor with itself?"""
    while is_call(node, *_BY_ELEMENT):
        node = node.args[0]
    if not is_call(node, _aten.cat.default):
        return False
    parts = node.args[0]
    return isinstance(parts, list | tuple) and len(parts) == 2 and parts[0] is parts[1] and node.args[1] in (-1, 2)


_BY_ELEMENT = (_aten.unsqueeze.default, _aten.cos.default, _aten.sin.default, _aten._to_copy.default, _aten.mul.Scalar)


def is_swap(node: Any) -> bool:
    """A transpose of heads and tokens."""
    return isinstance(node, fx.Node) and is_call(node, _aten.transpose.int) and {a % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[operator]


def before_heads(b: Builder, node: Any) -> Value | None:
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
