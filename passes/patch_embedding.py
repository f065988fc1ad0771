"""Convolutions whose kernels do not overlap are matrix products over patches (ViT, CLIP, patch embeddings).

    %conv2d: f32[s0,64,4,4] = aten.conv2d(%image, @w, @b, [8, 8])
    ->
    %sym_size: int s0 = aten.sym_size.int(%image, 0)
    %reshape: f32[s0,3,4,8,4,8] = aten.reshape(%image, [%sym_size, 3, 4, 8, 4, 8])
    %permute: f32[s0,4,4,3,8,8] = aten.permute(%reshape, [0, 2, 4, 1, 3, 5])
    %reshape_1: f32[s0,16,192] = aten.reshape(%permute, [%sym_size, 16, 192])
    %reshape_2: f32[64,192] = aten.reshape(@w, [64, 192])
    %linear: f32[s0,16,64] = aten.linear(%reshape_1, %reshape_2, @b)
    %transpose: f32[s0,64,16] = aten.transpose.int(%linear, 1, 2)
    %reshape_3: f32[s0,64,4,4] = aten.reshape(%transpose, [%sym_size, 64, 4, 4])

What is left over at the border where a size is no multiple of the kernel is cut off first.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from qfx.passes import _match as m
from qfx.passes._build import call, matched, on_sizes, replace, size
from qfx.passes.linear import is_parameter

aten = torch.ops.aten

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.convolution.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)


def patch_embedding(gm: fx.GraphModule) -> bool:
    """Rewrite 1-, 2- and 3-dimensional convolutions with stride == kernel, no padding, no dilation and one group."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS and _is_patches(node):
            replace(node, _over_patches(gm, node))
            count += 1
    return matched(gm, "patch_embedding", count)


def _is_patches(node: fx.Node) -> bool:
    given = m.arguments(node)
    x, weight = given["input"], given["weight"]
    kernel = m.shape(weight)[2:]
    return (
        is_parameter(weight)
        and m.rank(x) == m.rank(weight)
        and _each(given["stride"], kernel)
        and (given["padding"] == "valid" or _each(given["padding"], 0))
        and _each(given["dilation"], 1)
        and given["groups"] == 1
        and not given.get("transposed", False)
    )


def _each(value: Any, expected: Any) -> bool:
    """Do these sizes (one for all dimensions, or one each) equal the expected ones?"""
    if isinstance(value, str):
        return False
    values = [value] if isinstance(value, int) else list(value)
    wanted = [expected] if isinstance(expected, int) else list(expected)
    length = max(len(values), len(wanted))
    return values * (length // len(values)) == wanted * (length // len(wanted))


def _over_patches(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    given = m.arguments(node)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    width, channels, *kernel = m.shape(weight)
    batch = size(gm, x, 0, like=node)
    counts: list[Any] = []
    for dim, k in enumerate(kernel, 2):
        count = on_sizes(gm, operator.floordiv, size(gm, x, dim, like=node), k, node)
        x = _cut(gm, x, dim, on_sizes(gm, operator.mul, count, k, node), node)
        counts.append(count)
    dims = len(kernel)
    parts = [part for pair in zip(counts, kernel, strict=True) for part in pair]
    x = call(gm, aten.reshape.default, x, [batch, channels, *parts], like=node)
    order = [0, *(2 + 2 * i for i in range(dims)), 1, *(3 + 2 * i for i in range(dims))]
    x = call(gm, aten.permute.default, x, order, like=node)
    patches = counts[0]
    for count in counts[1:]:
        patches = on_sizes(gm, operator.mul, patches, count, node)
    x = call(gm, aten.reshape.default, x, [batch, patches, channels * math.prod(kernel)], like=node)
    matrix = call(gm, aten.reshape.default, weight, [width, channels * math.prod(kernel)], like=node)
    args = (x, matrix) if bias is None else (x, matrix, bias)
    y = call(gm, aten.linear.default, *args, like=node)
    y = call(gm, aten.transpose.int, y, 1, 2, like=node)
    return call(gm, aten.reshape.default, y, [batch, width, *counts], like=node)


def _cut(gm: fx.GraphModule, x: fx.Node, dim: int, length: Any, like: fx.Node) -> fx.Node:
    if m.same_size(length, m.shape(x)[dim]):
        return x
    return call(gm, aten.slice.Tensor, x, dim, 0, length, like=like)
