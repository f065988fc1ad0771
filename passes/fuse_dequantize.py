"""A packed parameter that a module dequantizes and uses as a weight becomes one qfx:: op.

    %dequantize: f32[8,4] = qfx.dequantize(@table.weight_w_codes, @table.weight_w_scale, None, i8/ch, 4, f32)
    %embedding: f32[2,4] = aten.embedding(%dequantize, %ids)
    ->
    %embedding: f32[2,4] = qfx.embedding(%ids, @table.weight_w_codes, @table.weight_w_scale, None, i8/ch, 4, f32)

Where the parameter is used otherwise, or lies transposed, dequantize stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx import graph
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace


def fuse_dequantize(gm: fx.GraphModule) -> bool:
    """Fuse dequantize into the linear, embedding or grouped linear that reads it, through transposes that cancel out.

    The input stays in float: a parameter knows no format for it. Says whether there was one.
    """
    count = 0
    for node in list(gm.graph.nodes):
        name = graph.schema_name(node) if node.op == "call_function" else ""
        at = {"aten::linear": 1, "qfx::grouped_linear": 1, "aten::embedding": 0}.get(name)
        source = _source(node.args[at]) if at is not None else None
        if source is None:
            continue
        codes, scale, zero, fmt, last = source.args[:5]
        value = node.meta["val"]
        with gm.graph.inserting_before(node):
            if name == "aten::embedding":
                args: tuple[Any, ...] = (node.args[1], codes, scale, zero, fmt, last, value.dtype)
                new = call(gm, torch.ops.qfx.embedding.default, *args, like=node)
            elif name == "aten::linear":
                bias = node.args[2] if len(node.args) > 2 else None
                args = (node.args[0], codes, scale, zero, bias, None, None, None, "", fmt)
                new = call(gm, torch.ops.qfx.linear.default, *args, like=node)
            else:
                args = (node.args[0], codes, scale, zero, node.args[2], "", fmt)
                new = call(gm, torch.ops.qfx.grouped_linear_quant.default, *args, like=node)
        replace(node, new)
        count += 1
    return matched(gm, "fuse_dequantize", count)


def _source(operand: Any) -> fx.Node | None:
    """The dequantize behind an operand, where an even number of transposes of the last two axes lies between."""
    swaps = 0
    while isinstance(operand, fx.Node) and operand.op == "call_function":
        if graph.schema_name(operand) == "qfx::dequantize":
            return operand if swaps % 2 == 0 else None
        if not _swaps_last(operand):
            return None
        swaps += 1
        operand = operand.args[0]
    return None


def _swaps_last(node: fx.Node) -> bool:
    name = graph.schema_name(node)
    if name == "aten::t":
        return True
    if name != "aten::transpose":
        return False
    dims = m.rank(node)
    return {d % dims for d in node.args[1:3] if isinstance(d, int)} == {dims - 2, dims - 1}
