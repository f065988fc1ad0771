"""Spelled-out rotary position embeddings become qfx::rope.

    %mul: f32[2,4,7,16] = aten.mul.Tensor(%q, %cos)
    %slice_1: f32[2,4,7,8] = aten.slice.Tensor(%q, 3, 0, 8)
    %slice_2: f32[2,4,7,8] = aten.slice.Tensor(%q, 3, 8, end)
    %neg: f32[2,4,7,8] = aten.neg(%slice_2)
    %cat: f32[2,4,7,16] = aten.cat([%neg, %slice_1], -1)
    %mul_1: f32[2,4,7,16] = aten.mul.Tensor(%cat, %sin)
    %add: f32[2,4,7,16] = aten.add.Tensor(%mul, %mul_1)
    ->
    %rope: f32[2,4,7,16] = qfx.rope(%q, %cos, %sin, False)

Recognized: rotation of halves (slice, split or chunk), of neighbours (stack and flatten, as GPT-J), and the form
cat([a * cos - b * sin, b * cos + a * sin]) with half-wide cos and sin (a and b halves, or as DeepSeek even and odd
elements, which are put side by side first). Where only some of a head's elements are
rotated, the slice before and the cat after stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import qfx.ops.floats  # noqa: F401  (registers the ops)
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace

aten = torch.ops.aten


def rope(gm: fx.GraphModule) -> bool:
    """Put qfx::rope(x, cos, sin, interleaved) for x * cos + rotate(x) * sin."""
    count = 0
    for node in list(gm.graph.nodes):
        new = _whole(gm, node) or _by_halves(gm, node)
        if new is not None:
            replace(node, new)
            count += 1
    return matched(gm, "rope", count)


def _whole(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """add(mul(x, cos), mul(rotate(x), sin)), products and sum in any order."""
    if not m.plain_binary(node, *m.ADD):
        return None
    for straight, turned in m.orders(node):
        if not (m.plain_binary(straight, *m.MUL) and m.plain_binary(turned, *m.MUL)):
            continue
        for rotated, sin in m.orders(turned):
            for x, cos in m.orders(straight):
                interleaved = _rotation_of(rotated, x)
                if interleaved is not None and _is_table(cos, x) and _is_table(sin, x):
                    return call(gm, torch.ops.qfx.rope.default, x, cos, sin, interleaved, like=node)
    return None


def _is_table(table: Any, x: Any) -> bool:
    """Does it broadcast to x, with a value for each element of a head?"""
    sizes, full = m.shape(table), m.shape(x)
    if not sizes or len(sizes) > len(full) or not m.same_size(sizes[-1], full[-1]):
        return False
    return all(m.same_size(a, 1) or m.same_size(a, b) for a, b in zip(sizes[::-1], full[::-1], strict=False))


def _rotation_of(node: Any, x: Any) -> bool | None:
    """False where `node` is x with its halves rotated, True where its neighbours are, None for anything else."""
    if not isinstance(x, fx.Node) or not m.same_sizes(m.shape(node), m.shape(x)):
        return None
    if is_call(node, aten.cat.default):
        return False if _rotates(node, x, interleaved=False) else None
    if is_call(node, aten.reshape.default, aten.flatten.using_ints):
        stack = node.args[0]
        return True if is_call(stack, aten.stack.default) and _rotates(stack, x, interleaved=True) else None
    return None


def _rotates(node: fx.Node, x: fx.Node, *, interleaved: bool) -> bool:
    """Is it cat or stack of [-second, first] along the last dimension, of x's halves or its neighbours?"""
    parts: Any = node.args[0]
    dim: Any = node.args[1] if len(node.args) > 1 else 0
    if len(parts) != 2 or not m.is_last(dim, node) or not is_call(parts[0], aten.neg.default):
        return False
    return m.whole(parts[1], parts[0].args[0], interleaved=interleaved) is x


def _by_halves(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """cat([a * cos - b * sin, b * cos + a * sin], -1), a and b the halves of x, or its even and odd elements."""
    if not is_call(node, aten.cat.default):
        return None
    given = m.arguments(node)
    parts: Any = given["tensors"]
    if len(parts) != 2 or not m.is_last(given["dim"], node) or not m.plain_binary(parts[0], *m.SUB):
        return None
    if not m.plain_binary(parts[1], *m.ADD):
        return None
    first, second = parts[0].args
    if not (m.plain_binary(first, *m.MUL) and m.plain_binary(second, *m.MUL)):
        return None
    for a, cos in m.orders(first):
        for b, sin in m.orders(second):
            x = m.whole(a, b)
            turned = x is not None or m.whole(a, b, interleaved=True) is not None
            if turned and _is_sum(parts[1], (b, cos), (a, sin)) and _is_table(cos, a) and _is_table(sin, a):
                x = x or call(gm, aten.cat.default, [a, b], -1, like=node)
                wide = [call(gm, aten.cat.default, [t, t], -1, like=node) for t in (cos, sin)]
                return call(gm, torch.ops.qfx.rope.default, x, *wide, False, like=node)
    return None


def _is_sum(node: fx.Node, one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Is it the sum of these two products, in any order?"""
    terms: Any = node.args
    products = [set(p.args) if m.plain_binary(p, *m.MUL) else set() for p in terms]
    return products in ([set(one), set(other)], [set(other), set(one)])
