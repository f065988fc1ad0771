"""Matrix products with a parameter become aten.linear (GPT-2's Conv1D, Falcon's `x @ w.T`, spelled-out projections).

    %reshape: f32[14,64] = aten.reshape(%x, [-1, 64])
    %addmm: f32[14,192] = aten.addmm(@c.bias, %reshape, @c.weight)
    %reshape_1: f32[2,7,192] = aten.reshape(%addmm, [2, 7, 192])
    ->
    %t: f32[192,64] = aten.t(@c.weight)
    %linear: f32[2,7,192] = aten.linear(%x, %t, @c.bias)

Recognized: addmm, mm, mv, matmul with a parameter on either side, and bmm, baddbmm with one matrix for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qfx.graph import is_call, schema_name
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace

aten = torch.ops.aten


def linear(gm: fx.GraphModule) -> bool:
    """Put aten.linear(x, w [N, K], b) for products of x with a parameter or a view of one."""
    count = 0
    for node in list(gm.graph.nodes):
        build = _BUILD.get(node.target) if node.op == "call_function" else None
        new = build(gm, node) if build is not None else None
        if new is not None:
            replace(node, new)
            count += 1
    return matched(gm, "linear", count)


def is_parameter(node: Any) -> bool:
    """Is it a parameter (packed ones count: qfx.dequantize), or one seen through transposes and reshapes?"""
    source = m.skip(node, *m.TRANSPOSES, *m.RESHAPES)
    return isinstance(source, fx.Node) and (source.op == "get_attr" or schema_name(source) == "qfx::dequantize")


def transposed(gm: fx.GraphModule, node: fx.Node, like: fx.Node) -> fx.Node:
    """A matrix, or each of several, the other way round: the inner node of a transpose, else a new one."""
    if is_transpose(node):
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    if m.rank(node) > 2:
        return call(gm, aten.transpose.int, node, -2, -1, like=like)
    return call(gm, aten.t.default, node, like=like)


def is_transpose(node: Any) -> bool:
    """Does it swap the last two dimensions and nothing else?"""
    if not is_call(node, *m.TRANSPOSES):
        return False
    rank = m.rank(node)
    if node.target is aten.t.default:
        return rank == 2
    if node.target is aten.transpose.int:
        return {d % rank for d in node.args[1:3]} == {rank - 2, rank - 1}
    return [d % rank for d in node.args[1]] == [*range(rank - 2), rank - 1, rank - 2]


def _product(gm: fx.GraphModule, like: fx.Node, x: fx.Node, w: fx.Node, bias: fx.Node | None = None) -> fx.Node:
    """x [.., K] @ w [K, N] + bias as a linear; a reshape that only flattened x's leading dimensions moves behind it."""
    weight = transposed(gm, w, like)
    source = m.skip(x, *m.RESHAPES) if m.rank(x) == 2 else x
    if m.rank(source) < 2 or not m.same_size(m.shape(source)[-1], m.shape(x)[-1]):
        source = x
    args = (source, weight) if bias is None else (source, weight, bias)
    new = call(gm, aten.linear.default, *args, like=like)
    if source is x:
        return new
    return call(gm, aten.reshape.default, new, [-1, m.shape(new)[-1]], like=like)


def _plus(gm: fx.GraphModule, like: fx.Node, added: Any, x: fx.Node, w: fx.Node) -> fx.Node | None:
    """added + x @ w: a vector of N is the bias, anything else is added after."""
    if not m.is_number(like.kwargs.get("alpha", 1), 1.0) or not m.is_number(like.kwargs.get("beta", 1), 1.0):
        return None
    if m.rank(added) == 1 and m.same_size(m.shape(added)[0], m.shape(w)[-1]):
        return _product(gm, like, x, w, added)
    return call(gm, aten.add.Tensor, _product(gm, like, x, w), added, like=like)


def _addmm(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    added, x, w = node.args
    if not is_parameter(w) or is_parameter(x):
        return None
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    return _plus(gm, node, added, x, w)


def _matmul(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, w = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    if is_parameter(x) == is_parameter(w):
        return None
    if is_parameter(w) and m.rank(w) == 2:
        return _product(gm, node, x, w)
    if is_parameter(x) and m.rank(x) == 2 and m.rank(w) == 1:
        return call(gm, aten.linear.default, w, x, like=node)
    if is_parameter(x) and m.rank(x) == 2:  # w @ x is the transpose of x^T @ w^T
        turned = call(gm, aten.transpose.int, w, -1, -2, like=node)
        product = call(gm, aten.linear.default, turned, x, like=node)
        return call(gm, aten.transpose.int, product, -1, -2, like=node)
    return None


def _bmm(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, batch = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(batch, fx.Node)
    w = None if is_parameter(x) else _one_matrix(gm, batch, node)
    return None if w is None else _product(gm, node, x, w)


def _baddbmm(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    added, x, batch = node.args
    assert isinstance(x, fx.Node) and isinstance(batch, fx.Node)
    w = None if is_parameter(x) else _one_matrix(gm, batch, node)
    return None if w is None else _plus(gm, node, added, x, w)


def _one_matrix(gm: fx.GraphModule, batch: fx.Node, like: fx.Node) -> fx.Node | None:
    """The matrix [K, N] of which every entry of a batch [B, K, N] is a copy; None where they differ."""
    if is_parameter(batch) and m.same_size(m.shape(batch)[0], 1):
        return call(gm, aten.reshape.default, batch, list(m.shape(batch)[1:]), like=like)
    if is_transpose(batch):
        turned = batch.args[0]
        assert isinstance(turned, fx.Node)
        w = _one_matrix(gm, turned, like)
        return None if w is None else transposed(gm, w, like)
    if not is_call(batch, aten.expand.default):
        return None
    inner: Any = batch.args[0]
    if is_call(inner, aten.unsqueeze.default) and inner.args[1] in (0, -3):
        inner = inner.args[0]
    if not is_parameter(inner) or not m.same_sizes(m.shape(inner)[-2:], m.shape(batch)[-2:]):
        return None
    return inner if m.rank(inner) == 2 else _one_matrix(gm, inner, like)


_BUILD: dict[Any, Callable[[fx.GraphModule, fx.Node], fx.Node | None]] = {
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.mv.default: _matmul,
    aten.matmul.default: _matmul,
    aten.bmm.default: _bmm,
    aten.baddbmm.default: _baddbmm,
}
