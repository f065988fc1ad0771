"""Products of many rows with the matrices of many experts (mixture of experts) become qfx::grouped_linear.

    %transpose: f32[4,64,96] = aten.transpose.int(@experts.up, -2, -1)
    %y: f32[28,96] = transformers.grouped_mm_fallback(%x, %transpose, %offs)
    ->
    %y: f32[28,96] = qfx.grouped_linear(%x, @experts.up, %offs)

Recognized besides grouped matmuls: a bmm with the parameter itself (as many rows for each expert), and a bmm with the
matrices picked per row (`w[ids]`), whose rows are sorted by expert first and put back afterwards.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import qfx.ops.floats  # noqa: F401  (registers the ops)
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace, size
from qfx.passes.linear import is_parameter, transposed

aten = torch.ops.aten


def experts(gm: fx.GraphModule) -> bool:
    """Put qfx::grouped_linear(x [T, K], w [E, N, K], offs [E]) for products with a 3-D parameter."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_grouped(node):
            new = _from_grouped(gm, node)
        elif node.target in (aten.bmm.default, aten.matmul.default) and m.rank(node) == 3:
            new = _from_picked(gm, node) or _from_equal(gm, node)
        else:
            continue
        if new is not None:
            replace(node, new)
            count += 1
    return matched(gm, "experts", count)


def _is_grouped(node: fx.Node) -> bool:
    target = node.target
    if target is aten._grouped_mm.default:
        given = m.arguments(node)
        return given["offs"] is not None and given["bias"] is None and m.rank(given["self"]) == 2
    return isinstance(target, torch._ops.OpOverload) and target._schema.name == "transformers::grouped_mm_fallback"


def _from_grouped(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    x, w, offs = list(m.arguments(node).values())[:3]
    if not is_parameter(w) or m.rank(w) != 3 or m.dtype(node) != m.dtype(x):
        return None
    return call(gm, torch.ops.qfx.grouped_linear.default, x, transposed(gm, w, node), offs, like=node)


def _from_equal(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """x [E, C, K] @ w [E, K, N]: C rows for each expert."""
    x, w = node.args[:2]
    if not is_parameter(w) or is_parameter(x) or m.rank(x) != 3 or m.rank(w) != 3:
        return None
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    number, k, n = m.shape(w)
    if not m.same_size(m.shape(x)[0], number):
        return None
    rows = size(gm, x, 1, like=node)
    flat = call(gm, aten.reshape.default, x, [-1, k], like=node)
    ends = call(gm, aten.arange.start, 1, number + 1, dtype=torch.int32, device=_device(x), like=node)
    offs = call(gm, aten.mul.Tensor, ends, rows, like=node)
    y = call(gm, torch.ops.qfx.grouped_linear.default, flat, transposed(gm, w, node), offs, like=node)
    return call(gm, aten.reshape.default, y, [number, -1, n], like=node)


def _from_picked(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """w[ids] [T, N, K] @ x [T, K, 1], or x [T, 1, K] @ w[ids] [T, K, N]: one expert's matrix for each row."""
    a, b = node.args[:2]
    left, right = _picked(a), _picked(b)
    if left is not None and m.same_size(m.shape(b)[-1], 1):
        (w, ids), x, shape = left, b, [-1, m.shape(a)[1], 1]
    elif right is not None and m.same_size(m.shape(a)[1], 1):
        (w, ids), x, shape = right, a, [-1, 1, m.shape(b)[2]]
        w = transposed(gm, w, node)
    else:
        return None
    rows = call(gm, aten.reshape.default, x, [-1, m.shape(w)[2]], like=node)
    return call(gm, aten.reshape.default, _routed(gm, rows, w, ids, node), shape, like=node)


def _picked(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(parameter [E, .., ..], ids [T]) of `w[ids]`."""
    if is_call(node, aten.index.Tensor):
        w, indices = node.args
        if not is_parameter(w) or len(indices) != 1:
            return None
        ids = indices[0]
    elif is_call(node, aten.index_select.default) and node.args[1] == 0:
        w, ids = node.args[0], node.args[2]
    else:
        return None
    integers = m.dtype(ids) in (torch.int32, torch.int64)
    return (w, ids) if is_parameter(w) and m.rank(w) == 3 and m.rank(ids) == 1 and integers else None


def _routed(gm: fx.GraphModule, rows: fx.Node, w: fx.Node, ids: fx.Node, like: fx.Node) -> fx.Node:
    """Sort rows by expert, multiply, and put them back. ids are in [0, E)."""
    pair = call(gm, aten.sort.default, ids, like=like)
    by_expert = call(gm, operator.getitem, pair, 0, like=like)
    order = call(gm, operator.getitem, pair, 1, like=like)
    numbers = call(gm, aten.arange.default, m.shape(w)[0], dtype=m.dtype(ids), device=_device(rows), like=like)
    offs = call(gm, aten.searchsorted.Tensor, by_expert, numbers, out_int32=True, right=True, like=like)
    sorted_rows = call(gm, aten.index.Tensor, rows, [order], like=like)
    y = call(gm, torch.ops.qfx.grouped_linear.default, sorted_rows, w, offs, like=like)
    back = call(gm, aten.argsort.default, order, like=like)
    return call(gm, aten.index.Tensor, y, [back], like=like)


def _device(node: fx.Node) -> torch.device:
    device: torch.device = node.meta["val"].device
    return device
