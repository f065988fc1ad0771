"""Which values [M, K] of a graph are the positions of its inputs in one row, [B * T, K], or rows picked from these."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qfx.graph import op_name, val

_RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "squeeze", "unsqueeze"}
_BY_ROW = {"linear", "grouped_linear", "rms_norm", "layer_norm", "clone", "contiguous", "to", "_to_copy", "dropout"}
_COLUMNS = {"slice": 1, "split": 2, "split_with_sizes": 2, "chunk": 2}  # parts of an axis, and where that stands


@dataclass(frozen=True)
class Rows:
    """like: an input [B, T, ..], the positions of which rows are. picks: indices [..], by one after the other of which
    the rows are picked from all B * T in order; none where they are these."""

    like: fx.Node
    picks: tuple[fx.Node, ...] = ()


def rows_of(node: fx.Node) -> Rows | None:
    """What a value [M, K] of a graph is where it is made row by row of a value [B, T, ..] whose first axes, put
    together, are an input's; else None.

    So are the tokens [B * T, K] that mixtures of experts and GPT-2 multiply, and, picked, what each expert reads; rows
    of a transposed [T, B, K] are not. Nor is a sum of rows that are picked in two ways: one may be of padding, and the
    other not.
    """
    todo: list[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]] = [(node, node, ())]
    seen, found = set[tuple[fx.Node, tuple[fx.Node, ...]]](), set[Rows]()
    while todo:
        at, whole, picks = todo.pop()
        if (at, picks) in seen or not _rows_like(at, whole):
            continue
        seen.add((at, picks))
        if op_name(at) in _RESHAPES:
            source, like = _unshaped(at)
            if like is not None:
                found.add(Rows(like, picks))
            else:
                todo.append((source, whole, picks))
        elif (picked := _picked(at)) is not None:
            source, index = picked
            todo.append((source, source, (index, *picks)))
        elif (parted := _parts_of(at)) is not None:
            todo.append((parted, whole, picks))
        elif op_name(at) in _BY_ROW:
            todo.append((at.all_input_nodes[0], whole, picks))
        elif torch.Tag.pointwise in getattr(at.target, "tags", ()):
            todo.extend((source, whole, picks) for source in at.all_input_nodes)
    return found.pop() if len(found) == 1 else None


def _unshaped(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """What a value [M, K] is a reshape of, and the input whose positions these are; None where it has other axes."""
    source = node
    while op_name(source) in _RESHAPES and (source is node or val(source).dim() != 2):
        source = source.all_input_nodes[0]
        if (like := _input_like(source, val(node).shape[0])) is not None:
            return source, like
    return source, None


def _rows_like(node: fx.Node, other: fx.Node) -> bool:
    mine, its = val(node), val(other)
    both = isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.dim() == its.dim() == 2
    return node.op == "call_function" and both and statically_known_true(mine.shape[0] == its.shape[0])


def _input_like(node: fx.Node, rows: Any) -> fx.Node | None:
    """The input that begins with [B, T] as a value [B, T, ..] with B * T = rows does."""
    value = val(node)
    if value.dim() < 3 or not statically_known_true(value.shape[0] * value.shape[1] == rows):
        return None
    inputs = (n for n in node.graph.nodes if n.op == "placeholder" and isinstance(val(n), Tensor) and val(n).dim() > 1)
    same = (n for n in inputs if all(statically_known_true(val(n).shape[axis] == value.shape[axis]) for axis in (0, 1)))
    return next(same, None)


def _picked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x [.., K], index [M]) of x[index]."""
    if op_name(node) == "index":
        source, indices = node.args[:2]
        index = indices[0] if isinstance(indices, list | tuple) and len(indices) == 1 else None
    elif op_name(node) == "index_select" and node.args[1] == 0:
        source, index = node.args[0], node.args[2]
    else:
        return None
    alone = isinstance(source, fx.Node) and isinstance(index, fx.Node) and val(index).dim() == 1
    return (source, index) if alone else None  # type: ignore[return-value]


def _parts_of(node: fx.Node) -> fx.Node | None:
    """The value of which a node has some columns of each row."""
    if node.target is operator.getitem:
        parts = node.args[0]
        assert isinstance(parts, fx.Node)
        node = parts
    elif op_name(node) != "slice":
        return None
    at = _COLUMNS.get(op_name(node))
    if at is None or node.kwargs or len(node.args) <= at or node.args[at] not in (1, -1):
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None
