"""Weight-only linears of one input as one kernel: their weights lie one below the other, and the result is split.

    %q = qfx.linear(%x, w_q), %k = qfx.linear(%x, w_k), %v = qfx.linear(%x, w_v)
    ->
    MatMulNBits(x, [w_q; w_k; w_v]) -> Split

One kernel has one start and rounds its input once. Files only: a session of this process reads the model's own memory,
of which this would be a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.quant_weights import Weight, together
from qfx.backends.onnx.values import Dim, Value
from qfx.format import Format
from qfx.graph import is_call
from qfx.passes._match import arguments

_ALIKE = ("x_scale", "x_zero", "smooth", "x_format", "w_format")


@dataclass(frozen=True)
class Sibling:
    """A linear of the group, its weight [N, K] and bias [N]."""

    node: fx.Node
    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class Part:
    """Which columns of a packed result [.., N] a value is."""

    whole: Value
    start: int
    width: int


def siblings(b: Builder, k: Dim) -> list[Sibling]:
    """The linears, the one being lowered included, that take its input in the same way; [] where it is alone."""
    node = b.node
    if b.runtime != "onnxruntime" or node is None or not is_call(node, torch.ops.qfx.linear.default):
        return []
    own = arguments(node)
    source = own["x"]
    assert isinstance(source, fx.Node)
    alike = [user for user in source.users if is_call(user, torch.ops.qfx.linear.default) and _alike(user, own)]
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    found = [_sibling(b, one, k) for one in sorted(alike, key=order.__getitem__)]
    return found if len(found) > 1 and len({one.weight.name for one in found}) == len(found) else []


def _alike(user: fx.Node, own: dict[str, Any]) -> bool:
    given = arguments(user)
    zeros = (given["w_zero"] is None) == (own["w_zero"] is None)
    return given["x"] is own["x"] and zeros and all(_same(given[name], own[name]) for name in _ALIKE)


def _same(one: Any, other: Any) -> bool:
    """The same text, or the model's same tensor."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        return one is other or (one.op == other.op == "get_attr" and one.target == other.target)
    return bool(one == other)


def _sibling(b: Builder, node: fx.Node, k: Dim) -> Sibling:
    given = arguments(node)
    weight = Weight.of(b, [given[name] for name in ("w", "w_scale", "w_zero")], Format.parse(given["w_format"]), k)
    bias = given["bias"]
    return Sibling(node, weight, None if bias is None else b.tensor(bias).detach())


def stacked_bias(b: Builder, group: list[Sibling]) -> Value | None:
    """f32 [N of all], zeros where one has none; None where none has any."""
    if all(one.bias is None for one in group):
        return None
    made = [torch.zeros(one.weight.n) if one.bias is None else one.bias.float() for one in group]
    names = (f"{one.weight.name} {arguments(one.node)['bias']}" for one in group)
    name = f"{group[0].weight.name}{together(names)}.bias"
    return b.derived(name, torch.float32, (sum(map(len, made)),), lambda: torch.cat(made))


def split(b: Builder, whole: Value, group: list[Sibling]) -> Value:
    """The part of the linear being lowered in the result [.., N of all]; `taken` gives the others theirs."""
    assert b.node is not None
    widths = [one.weight.n for one in group]
    parts = b.ops("Split", whole, b.ints(widths), dtypes=[whole.dtype] * len(group), axis=-1)
    start = 0
    for one, value, width in zip(group, parts, widths, strict=True):
        b.memo["sibling", one.node] = Value(value.name, whole.dtype, (*whole.dims[:-1], width))
        b.memo["part", value.name] = Part(whole, start, width)
        start += width
        if one.node is not b.node:
            b.fused[one.node.name] = b.node.name
    own = taken(b)
    assert own is not None
    return own


def taken(b: Builder) -> Value | None:
    """The result of the linear being lowered, where a sibling's kernel has computed it."""
    found: Value | None = b.memo.get(("sibling", b.node))
    return found


def part(b: Builder, value: Value) -> Part | None:
    """Where a value lies in a packed result; None where it is none of a split."""
    found: Part | None = b.memo.get(("part", value.name))
    return found
