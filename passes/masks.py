"""Boolean masks lose what is always true and what only repeats them.

    %positions: i64[1,1,s1,1] = ...arange...
    %ge: b1[1,1,s1,1] = aten.ge.Scalar(%positions, 0)
    %index: b1[s0,1,1,s1] = aten.index.Tensor(%keep, [%rows, %columns])        rows, columns: all of 0, 1, 2, ...
    %mask: b1[s0,1,s1,s1] = aten.__and__.Tensor(%ge, %index)
    %sdpa = aten.scaled_dot_product_attention(%q, %k, %v, %mask)
    ->
    %unsqueeze: b1[s0,1,1,s1] = aten.unsqueeze(aten.unsqueeze(%keep, 1), 2)
    %sdpa = aten.scaled_dot_product_attention(%q, %k, %v, %unsqueeze)

A mask of padding then is seen to be one: no row of it differs from another, and nothing of size s1 x s1 is computed.
Attention whose mask is true everywhere has none, and where it is a causal one, attention says so instead. What is known
of positions is in `_counted`: transformers looks in them for texts that follow each other in one row, and finds none.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace, size
from qfx.passes._counted import Counted, counted, is_causal

aten = torch.ops.aten

_ANDS = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_VIEWS = (
    *m.RESHAPES,
    *m.TRANSPOSES,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.repeat.default,
)
NATURAL = "qfx_natural"  # the mark of an input in whose integers none is negative, as positions are
_SAME = (aten.alias.default, aten.clone.default, aten.contiguous.default)


def masks(gm: fx.GraphModule) -> bool:
    """Simplify boolean masks in place."""
    changed = 0
    for node in list(gm.graph.nodes):
        if is_call(node, aten.index.Tensor):
            changed += _whole_index(gm, node)
        elif is_call(node, *_ANDS):
            changed += _and(gm, node)
        elif is_call(node, aten.scaled_dot_product_attention.default, torch.ops.qfx.attention.default):
            changed += _narrow_mask(node)
    return matched(gm, "masks", changed)


def _and(gm: fx.GraphModule, node: fx.Node) -> bool:
    """x & true is x, spread to the shape of both."""
    first, second = node.args[:2]
    for true, rest in ((first, second), (second, first)):
        if always_true(true) and isinstance(rest, fx.Node) and _is_bool(rest):
            replace(node, _spread(gm, rest, node))
            return True
    return False


def _spread(gm: fx.GraphModule, source: fx.Node, node: fx.Node) -> fx.Node:
    """`source` in the shape of `node`, which broadcasts it with its other argument."""
    if m.same_sizes(m.shape(source), m.shape(node)):
        return source
    shape = [_size(gm, node, i) for i in range(val(node).dim())]
    return call(gm, aten.expand.default, source, shape, like=node)


def _size(gm: fx.GraphModule, node: fx.Node, dim: int) -> int | fx.Node:
    """A size of an element-wise result, read from the argument that has it."""
    from_end = dim - val(node).dim()
    known = m.shape(node)[dim]
    if isinstance(known, int):
        return known
    owners = [a for a in node.args if isinstance(a, fx.Node) and -from_end <= val(a).dim()]
    owner = next(a for a in owners if m.same_size(val(a).shape[from_end], known))
    return size(gm, owner, val(owner).dim() + from_end, like=node)


def _narrow_mask(node: fx.Node) -> bool:
    """Attention spreads its mask by itself, but for the last axis: kernels on GPUs read rows that lie side by side."""
    mask = node.args[3] if len(node.args) > 3 else None
    if always_true(mask):
        node.update_arg(3, None)
        return True
    if is_causal(mask):
        _says_causal(node)
        return True
    if not isinstance(mask, fx.Node) or not is_call(mask, aten.expand.default):
        return False
    source = mask.args[0]
    assert isinstance(source, fx.Node)
    if val(source).dim() < 2 or not m.same_size(m.shape(source)[-1], m.shape(mask)[-1]):
        return False
    node.update_arg(3, source)
    return True


def _says_causal(node: fx.Node) -> None:
    """Let attention see to causality, for which kernels do half the products, instead of a mask that is no more."""
    given = m.arguments(node)
    if is_call(node, torch.ops.qfx.attention.default):
        node.args, node.kwargs = tuple({**given, "mask": None, "causal": True}.values()), {}
        return
    node.args = (given["query"], given["key"], given["value"], None, given["dropout_p"], True)
    node.kwargs = {name: given[name] for name in ("scale", "enable_gqa") if name in node.kwargs}


def always_true(node: Any) -> bool:
    """Is every element of this boolean tensor True, whatever the inputs?"""
    if not isinstance(node, fx.Node) or not _is_bool(node):
        return False
    if counted(node) == Counted(1, None):
        return True
    if is_call(node, aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    if is_call(node, aten.full.default, aten.full_like.default):
        return node.args[1] in (True, 1)
    if is_call(node, aten.new_full.default):
        return node.args[2] in (True, 1)
    if is_call(node, *_VIEWS, *_SAME):
        return always_true(node.args[0])
    if is_call(node, *_ANDS):
        return always_true(node.args[0]) and always_true(node.args[1])
    if is_call(node, aten.ge.Scalar, aten.gt.Scalar):
        bound = node.args[1]
        strict = is_call(node, aten.gt.Scalar)
        return isinstance(bound, int | float) and (bound < 0 or (bound == 0 and not strict)) and natural(node.args[0])
    return False


def natural(node: Any) -> bool:
    """Is every element an integer of 0 or more?"""
    if isinstance(node, int):
        return node >= 0
    if not isinstance(node, fx.Node):
        return False
    if is_call(node, aten.sym_size.int) or node.meta.get(NATURAL):
        return True
    if is_call(node, aten.arange.default):
        return True
    if is_call(node, aten.arange.start):
        return natural(node.args[0])
    if is_call(node, *_VIEWS, *_SAME):
        return natural(node.args[0])
    if is_call(node, aten.add.Tensor, aten.add.Scalar) and "alpha" not in node.kwargs:
        return natural(node.args[0]) and natural(node.args[1])
    if node.op == "call_function" and node.target is operator.add:
        return natural(node.args[0]) and natural(node.args[1])
    return False


def _whole_index(gm: fx.GraphModule, node: fx.Node) -> bool:
    """x[rows, columns] where each index runs over a whole dimension, each along an axis of its own: x with new axes."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(indices, Sequence)
    if not _is_bool(source) or len(indices) != val(source).dim():
        return False
    rank = val(node).dim()
    places = [_axis(index, val(source).shape[i], rank) for i, index in enumerate(indices)]
    known = [p for p in places if p is not None]
    if len(known) < len(places) or known != sorted(set(known)):
        return False
    found = source
    with gm.graph.inserting_before(node):
        for axis in range(rank):
            if axis not in known:
                found = call(gm, aten.unsqueeze.default, found, axis, like=node)
    replace(node, found)
    return True


def _axis(index: Any, length: Any, rank: int) -> int | None:
    """The axis of the result along which an index counts 0, 1, 2, ... up to `length`; None where it does not."""
    inserted: list[int] = []
    while is_call(index, aten.unsqueeze.default):
        dim = index.args[1]
        assert isinstance(dim, int)
        inserted.append(dim % val(index).dim())
        index = index.args[0]
    if not is_call(index, aten.arange.default):
        return None
    if val(index).dim() != 1 or not m.same_size(val(index).shape[0], length):
        return None
    axis = 0
    for dim in reversed(inserted):
        axis += dim <= axis
    return axis + rank - 1 - len(inserted)


def _is_bool(node: fx.Node) -> bool:
    fake = val(node)
    return isinstance(fake, Tensor) and fake.dtype == torch.bool
