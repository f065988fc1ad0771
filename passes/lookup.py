"""Rows of a table that a forward picks by an index of its own become an embedding.

    %repeat: i64[s0,s1] = ...arange...
    %index: f32[s0,s1,64] = aten.index.Tensor(@embed_positions.weight, [%repeat])
    ->
    %embedding: f32[s0,s1,64] = aten.embedding(@embed_positions.weight, %repeat)

So Whisper's decoder reads its positions. Only where the index is known to hold no negative number, which would count
from the end, and for a matrix that is called `weight`, as nn.Embedding's is: experts pick rows of their biases, too.
"""

from __future__ import annotations

import torch
from torch import fx

from qfx.graph import is_call, val
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace
from qfx.passes.masks import natural

aten = torch.ops.aten
_INTEGERS = (torch.int32, torch.int64)


def lookup(gm: fx.GraphModule) -> bool:
    """Put aten.embedding for rows of a table, in place."""
    count = 0
    for node in list(gm.graph.nodes):
        if not is_call(node, aten.index.Tensor):
            continue
        table, indices = node.args
        if not isinstance(table, fx.Node) or not _is_table(table):
            continue
        assert isinstance(indices, list | tuple)
        first = indices[0]
        if len(indices) == 1 and isinstance(first, fx.Node) and m.dtype(first) in _INTEGERS and natural(first):
            replace(node, call(gm, aten.embedding.default, table, first, like=node))
            count += 1
    return matched(gm, "lookup", count)


def _is_table(node: fx.Node) -> bool:
    named = node.op == "get_attr" and str(node.target).rpartition(".")[2] == "weight"
    return named and m.rank(node) == 2 and bool(val(node).is_floating_point())
