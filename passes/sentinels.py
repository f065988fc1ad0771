"""Masks of rows that no expert takes go, where a router has no such rows.

    %topk = aten.topk(%probabilities of 4 experts, 2); %ids = its second result, flattened; %sorted = their sort's first
    %past: bool[28,1] = aten.unsqueeze(aten.ge.Scalar(%sorted, 4), -1)
    %masked_fill: f32[28,64] = aten.masked_fill.Scalar(%rows, %past, 0.0)
    %clamp: i64[28] = aten.clamp(%sorted, None, 3)
    ->
    %rows, %sorted

Some releases of transformers write them in every model for the sake of experts that lie on other machines. Numbers
that topk or argmax give are below the size of the dimension that they count, so these change nothing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import matched, replace

aten = torch.ops.aten
_KEEPS = (  # give some of their first argument's elements
    *m.RESHAPES, *m.TRANSPOSES, *m.CASTS, aten.clone.default, aten.contiguous.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.index.Tensor, aten.index_select.default, aten.gather.default,
)  # fmt: skip
_PLACES = (aten.unsqueeze.default, *m.RESHAPES, aten.expand.default)


def sentinels(gm: fx.GraphModule) -> bool:
    """Drop masks and clamps of indices that are in range already."""
    count = 0
    for node in list(gm.graph.nodes):
        if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            useless = _is_false(m.arguments(node)["mask"])
        else:
            useless = is_call(node, aten.clamp.default) and _is_in_range(node)
        if useless and m.same_sizes(m.shape(node.args[0]), m.shape(node)):
            replace(node, node.args[0])
            count += 1
    return matched(gm, "sentinels", count)


def _is_false(mask: Any) -> bool:
    """Is it `ids >= bound` of numbers that are below?"""
    mask = m.skip(mask, *_PLACES)
    if not is_call(mask, aten.ge.Scalar):
        return False
    bound = _bound(mask.args[0])
    return bound is not None and isinstance(mask.args[1], int) and mask.args[1] >= bound


def _is_in_range(clamp: fx.Node) -> bool:
    given = m.arguments(clamp)
    bound, least, most = _bound(given["self"]), given["min"], given["max"]
    low = least is None or (isinstance(least, int) and least <= 0)
    return bound is not None and low and (most is None or (isinstance(most, int) and most >= bound - 1))


def _bound(node: Any) -> int | None:
    """A number that all elements are below, none of them negative; None where it is not known."""
    while is_call(node, *_KEEPS):
        if m.dtype(node) not in (torch.int64, torch.int32):  # fewer bits may wrap
            return None
        node = node.args[0]
    if is_call(node, operator.getitem):
        source, which = node.args
        if is_call(source, aten.sort.default, aten.sort.stable) and which == 0:
            return _bound(m.arguments(source)["self"])
        if is_call(source, aten.topk.default) and which == 1:
            return _counted(source)
        return None
    return _counted(node) if is_call(node, aten.argmax.default) else None


def _counted(node: fx.Node) -> int | None:
    """The size of the dimension that `topk` or `argmax` counts; None where it varies."""
    given = m.arguments(node)
    if given["dim"] is None:
        return None
    size = m.known(m.shape(given["self"])[given["dim"]])
    return size if isinstance(size, int) else None
