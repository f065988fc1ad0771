"""Experts between a router and a sum, with packed weights, become one operator.

    %sort = aten.sort(%ids flattened); %order = its second result
    %rows: f32[2*s0,64] = aten.index.Tensor(%x, [%order // 2])
    %up: f32[2*s0,192] = qfx.grouped_linear_quant(%rows, @up_w_codes, @up_w_scale, None, %offs, , i4/g32)
    %gate, %value = aten.split.Tensor(%up, 96, -1)
    %hidden: f32[2*s0,96] = aten.mul.Tensor(aten.silu(%gate), %value)
    %down: f32[2*s0,64] = qfx.grouped_linear_quant(%hidden, @down_w_codes, @down_w_scale, None, %offs, , i4/g32)
    %y: f32[s0,64] = aten.sum.dim_IntList(%down * %weights, put back in the order of the ids, [1])
    ->
    %y: f32[s0,64] = qfx.moe(%x, %ids, %weights, @up_w_codes, .., None, @down_w_codes, .., False, 1.0, 0.0, inf, ..)

Biases per expert, and gates with limits whose halves are interleaved, are recognized too. For a backend with such a
kernel: it runs on a quantized graph, and only where `fits` says so.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.graph import fqn_of, is_call
from qfx.ops import floats as float_ops
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace

aten = torch.ops.aten
assert float_ops.moe is not None

Fits = Callable[[fx.Node, fx.Node, fx.Node], bool]
PARTS = "qfx_parts"  # in node.meta: (name, FQN) of the products that a qfx::moe stands for


@dataclass(frozen=True)
class _Sorted:
    """ids [T, k] sorted by expert: experts and places [T * k]."""

    ids: fx.Node
    experts: fx.Node
    order: fx.Node


def moe(gm: fx.GraphModule, *, fits: Fits) -> bool:
    """Fuse in place where `fits(up, down, weights)`: two qfx::grouped_linear_quant, and what their result is times."""
    count = 0
    for node in list(gm.graph.nodes):
        found = _arguments(node, fits) if is_call(node, aten.sum.dim_IntList) else None
        if found is None:
            continue
        args, products = found
        with gm.graph.inserting_before(node):
            new = call(gm, torch.ops.qfx.moe.default, *args, like=products[0])
        new.meta[PARTS] = [(one.name, fqn_of(one)) for one in products]
        replace(node, new)
        count += 1
    return matched(gm, "moe", count)


def _arguments(total: fx.Node, fits: Fits) -> tuple[tuple[Any, ...], tuple[fx.Node, fx.Node]] | None:
    """What qfx::moe takes in place of a sum over the experts of each token, and the two products."""
    given = m.arguments(total)
    y = given["self"]
    if list(given["dim"] or []) not in ([1], [-2]) or given["keepdim"] or not is_call(y, *m.RESHAPES):
        return None
    back = y.args[0]
    inverse = _one_index(back)
    weighted = m.operand(back.args[0], lambda n: is_call(n, aten.unsqueeze.default), *m.MUL) if inverse else None
    if weighted is None:
        return None
    factor, product = weighted
    places = _one_index(factor.args[0])
    by_id = _sorted(places)
    if by_id is None or not _is_inverse(inverse, by_id.order):
        return None
    down, down_bias = _product(product, by_id)
    gate = _gate(down.args[0]) if down is not None else None
    up, up_bias = _product(gate[0], by_id) if gate is not None else (None, None)
    if down is None or up is None or gate is None or down.args[4] is not up.args[4]:
        return None
    weights, x = m.skip(factor.args[0].args[0], *m.RESHAPES), _rows(up.args[0], by_id)
    same = m.same_sizes(m.shape(weights), m.shape(by_id.ids)) and m.dtype(total) == m.dtype(x)
    if x is None or not same or not _is_end(up.args[4], by_id, m.shape(up.args[1])[0]) or not fits(up, down, weights):
        return None
    args = (x, by_id.ids, weights, *up.args[1:4], up_bias, *down.args[1:4], down_bias, *gate[1], up.args[6])
    return (*args, down.args[6]), (up, down)


def _one_index(node: Any) -> Any:
    """i of `tensor[i]`."""
    return node.args[1][0] if is_call(node, aten.index.Tensor) and len(node.args[1]) == 1 else None


def _sorted(order: Any) -> _Sorted | None:
    """The sort of flattened ids [T, k] behind its second result."""
    if not is_call(order, operator.getitem) or order.args[1] != 1 or not is_call(order.args[0], aten.sort.default):
        return None
    pair = order.args[0]
    ids = pair.args[0].args[0] if is_call(pair.args[0], *m.RESHAPES) else None
    if ids is None or m.rank(ids) != 2 or m.rank(order) != 1 or m.arguments(pair)["descending"]:
        return None
    experts = next((u for u in pair.users if is_call(u, operator.getitem) and u.args[1] == 0), None)
    return None if experts is None else _Sorted(ids, experts, order)


def _is_inverse(node: Any, order: fx.Node) -> bool:
    """Does it put back what was sorted?"""
    if is_call(node, aten.argsort.default):
        return node.args[0] is order
    if not is_call(node, aten.index_put.default) or len(node.args) > 3:
        return False
    into, places, values = node.args
    counts = is_call(values, aten.arange.default) and m.same_size(values.args[0], m.shape(order)[0])
    return list(places) == [order] and is_call(into, aten.empty_like.default) and counts


def _product(node: Any, by_id: _Sorted) -> tuple[Any, fx.Node | None]:
    """(weight-only product, bias [E, N] or None)."""
    bias = None
    if m.plain_binary(node, aten.add.Tensor):
        found = m.operand(node, lambda n: _one_index(n) is by_id.experts, aten.add.Tensor)
        if found is None:
            return None, None
        bias, node = found[0].args[0], found[1]
    if not is_call(node, torch.ops.qfx.grouped_linear_quant.default) or node.args[5]:
        return None, None
    return node, bias


def _gate(node: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """(what gate and value come from, (interleaved, alpha, beta, limit)) of a gated hidden state."""
    silu = m.operand(node, lambda n: is_call(n, aten.silu.default), *m.MUL)
    if silu is not None:
        both = m.whole(silu[0].args[0], silu[1])
        return None if both is None else (both, (False, 1.0, 0.0, math.inf))
    quick = m.operand(node, lambda n: is_call(n, torch.ops.qfx.quick_gelu.default), *m.MUL)
    shifted = m.with_constant(quick[1], *m.ADD) if quick is not None else None
    if quick is None or shifted is None:
        return None
    (gate, low, top), (value, least, most) = _clamped(quick[0].args[0]), _clamped(shifted[0])
    both = m.whole(gate, value, interleaved=True)
    alike = low is None and top is not None and most == top and least == -top
    if both is None or not alike:
        return None
    return both, (True, 1.702, shifted[1], float(top))


def _clamped(node: Any) -> tuple[Any, Any, Any]:
    """(tensor, min, max) of a clamp."""
    if not is_call(node, aten.clamp.default):
        return None, None, None
    given = m.arguments(node)
    return given["self"], given["min"], given["max"]


def _rows(node: Any, by_id: _Sorted) -> Any:
    """x of `x[order // k]`."""
    index = _one_index(node)
    if not is_call(index, aten.floor_divide.default) or index.args[0] is not by_id.order:
        return None
    return node.args[0] if index.args[1] == m.shape(by_id.ids)[1] else None


def _is_end(offs: Any, by_id: _Sorted, count: int) -> bool:
    """Does it say where the rows of each of `count` experts end?"""
    if not is_call(offs, aten.cumsum.default) or not is_call(offs.args[0], aten.histc.default):
        return False
    given = m.arguments(offs.args[0])
    bins = (given["bins"], given["min"], given["max"]) == (count, 0, count - 1)
    return m.skip(given["self"], *m.CASTS) is by_id.experts and bins
