"""Which values [M, K] of a graph are the positions of its inputs in one row, [B * T, K]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qfx.graph import op_name, val

_RESHAPES = {"reshape", "view", "_unsafe_view", "flatten"}
_BY_ROW = {"linear", "rms_norm", "layer_norm", "clone", "contiguous", "to", "_to_copy", "dropout"}


def flattened(node: fx.Node) -> bool:
    """Whether a value [M, K] of a graph is made row by row of a value whose first axes, put together, are an input's.

    So are the tokens [B * T, K] that mixtures of experts and GPT-2 multiply; rows of a transposed [T, B, K] are not.
    """
    todo, seen = [node], set[fx.Node]()
    while todo:
        at = todo.pop()
        if at in seen or not _rows_like(at, node):
            continue
        seen.add(at)
        if op_name(at) in _RESHAPES:
            source = at.args[0]
            assert isinstance(source, fx.Node)
            if _begins_like_an_input(source, val(node).shape[0]):
                return True
            todo.append(source)
        elif op_name(at) in _BY_ROW:
            todo.append(at.all_input_nodes[0])
        elif torch.Tag.pointwise in getattr(at.target, "tags", ()):
            todo.extend(at.all_input_nodes)
    return False


def _rows_like(node: fx.Node, other: fx.Node) -> bool:
    mine, its = val(node), val(other)
    both = isinstance(mine, Tensor) and isinstance(its, Tensor) and mine.dim() == its.dim() == 2
    return node.op == "call_function" and both and statically_known_true(mine.shape[0] == its.shape[0])


def _begins_like_an_input(node: fx.Node, rows: Any) -> bool:
    """Whether a value is [B, T, ..] as an input is, with B * T = rows."""
    value = val(node)
    if value.dim() < 3 or not statically_known_true(value.shape[0] * value.shape[1] == rows):
        return False
    inputs = (val(n) for n in node.graph.nodes if n.op == "placeholder")
    shapes = (v.shape for v in inputs if isinstance(v, Tensor) and v.dim() > 1)
    return any(all(statically_known_true(a == b) for a, b in zip(s[:2], value.shape, strict=False)) for s in shapes)
