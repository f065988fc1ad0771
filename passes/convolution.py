"""A one-dimensional convolution with overlapping windows becomes a linear over its windows, laid side by side.

    %conv1d: f32[2,8,5] = aten.conv1d(%x, @conv.weight, @conv.bias, [2], [1])       kernel 3, stride 2, padding 1
    ->
    %constant_pad_nd: f32[2,4,12] = aten.constant_pad_nd(%x, [1, 1])
    %slice_1: f32[2,4,5] = aten.slice.Tensor(%constant_pad_nd, 2, 0, -2, 2)          one slice for each tap
    %stack: f32[2,4,5,3] = aten.stack([%slice_1, %slice_2, %slice_3], -1)
    %permute: f32[2,5,4,3] = aten.permute(%stack, [0, 2, 1, 3])
    %reshape: f32[2,5,12] = aten.reshape(%permute, [2, 5, 12])
    %reshape_1: f32[8,12] = aten.reshape(@conv.weight, [8, 12])
    %linear: f32[2,5,8] = aten.linear(%reshape, %reshape_1, @conv.bias)
    %transpose: f32[2,8,5] = aten.transpose.int(%linear, 1, 2)

So the convolutions in front of audio models are quantized like every other linear. The windows take kernel / stride
times the memory of the input, which is why kernels over `LONGEST` taps stay convolutions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx import graph
from qfx.passes import _match as m
from qfx.passes._build import call, matched, replace, size

aten = torch.ops.aten

LONGEST = 16


def convolution(gm: fx.GraphModule) -> bool:
    """Rewrite every ungrouped, undilated aten.conv1d whose weight is a parameter. Says whether there was one."""
    count = 0
    for node in list(gm.graph.nodes):
        if graph.schema_name(node) == "aten::conv1d" and _fits(node):
            with gm.graph.inserting_before(node):
                new = _windows(gm, node)
            replace(node, new)
            count += 1
    return matched(gm, "convolution", count)


def _fits(node: fx.Node) -> bool:
    weight = node.args[1]
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr") or len(graph.val(node.args[0]).shape) != 3:
        return False
    _, _, padding, dilation, groups = _settings(node)
    taps = weight.meta["val"].shape[-1]
    return isinstance(padding, int) and dilation == 1 and groups == 1 and 1 < taps <= LONGEST


def _settings(node: fx.Node) -> tuple[Any, int, Any, int, int]:
    """bias, stride, padding, dilation, groups."""
    given = m.arguments(node)
    stride, padding, dilation = (
        value[0] if isinstance(value, list | tuple) else value
        for value in (given["stride"], given["padding"], given["dilation"])
    )
    return given["bias"], stride, padding, dilation, given["groups"]


def _windows(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    x, weight = node.args[0], node.args[1]
    bias, stride, padding, _, _ = _settings(node)
    assert isinstance(weight, fx.Node)
    out, channels, taps = weight.meta["val"].shape
    if padding:
        x = call(gm, aten.constant_pad_nd.default, x, [padding, padding], like=node)
    last = [2**63 - 1 if i == taps - 1 else i - taps + 1 for i in range(taps)]
    slices = [call(gm, aten.slice.Tensor, x, 2, i, last[i], stride, like=node) for i in range(taps)]
    stacked = call(gm, aten.stack.default, slices, -1, like=node)
    rows = call(gm, aten.permute.default, stacked, [0, 2, 1, 3], like=node)
    sizes = [size(gm, rows, 0, like=node), size(gm, rows, 1, like=node), channels * taps]
    rows = call(gm, aten.reshape.default, rows, sizes, like=node)
    flat = call(gm, aten.reshape.default, weight, [out, channels * taps], like=node)
    args = (rows, flat) if bias is None else (rows, flat, bias)
    linear = call(gm, aten.linear.default, *args, like=node)
    return call(gm, aten.transpose.int, linear, 1, 2, like=node)
