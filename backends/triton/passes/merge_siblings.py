"""Linears that read one input in one way become one, whose result is cut: q, k and v, gate and up.

    %q: f16[2,64] = qfx.linear(%x, @q.w_codes, @q.w_scale, None, None, None, None, None, i8/tok, i8/ch)
    %k: f16[2,32] = qfx.linear(%x, @k.w_codes, @k.w_scale, None, None, None, None, None, i8/tok, i8/ch)
    ->
    %linear: f16[2,96] = qfx.linear(%x, @q.merged_w_codes, @q.merged_w_scale, None, None, ..., i8/tok, i8/ch)
    %q: f16[2,64] = aten.slice.Tensor(%linear, 1, 0, 64)
    %k: f16[2,32] = aten.slice.Tensor(%linear, 1, 64, 96)

Runs on the quantized graph, before weights are packed for their kernels: one kernel has one start, and at few tokens it
fills the chip better. Weights of one format in which every row stands alone are laid one below the other; fixed scales
and smoothing factors have to be equal in value. Integer products stay the same bit for bit; those of floats may be
summed in another order. `computed` of the merged node names those that it computes.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton.passes._nodes import bring_before, note_computed, same
from qfx.format import Format
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import call, matched, plain, take_place

aten = torch.ops.aten
_ALIKE = ("x_scale", "x_zero", "smooth", "x_format", "w_format")
_SEGMENT = re.compile(r"(^|[._])(rows|columns)\d+_codes(_\d+)?$")


def merge_siblings(gm: fx.GraphModule) -> bool:
    """See the module."""
    groups: list[list[fx.Node]] = []
    for node in gm.graph.nodes:
        if not is_call(node, torch.ops.qfx.linear.default) or not _can(gm, node):
            continue
        group = next((g for g in groups if _alike(gm, g[0], node)), None)
        if group is None:
            groups.append([node])
        elif all(m.arguments(other)["w"].target != m.arguments(node)["w"].target for other in group):
            group.append(node)
    count = 0
    for group in groups:
        if len(group) > 1:
            _merge(gm, group)
            count += 1
    return matched(gm, "merge_siblings", count)


def _can(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the weight is a constant matrix, no segment of a larger one, whose rows stand alone."""
    given = m.arguments(node)
    constants = [given[name] for name in ("w", "w_scale", "w_zero", "bias") if given[name] is not None]
    if any(n.op != "get_attr" for n in constants) or not Format.parse(given["w_format"]).by_row:
        return False
    return graph.get_tensor(gm, given["w"].target).dim() == 2 and not _SEGMENT.search(given["w"].target)


def _alike(gm: fx.GraphModule, one: fx.Node, other: fx.Node) -> bool:
    """Do two linears read one input in one way, by weights that can lie one below the other?"""
    a, b = m.arguments(one), m.arguments(other)
    if a["x"] is not b["x"] or not all(same(gm, a[name], b[name]) for name in _ALIKE):
        return False
    return all(_fit(gm, a[name], b[name]) for name in ("w", "w_scale", "w_zero"))


def _fit(gm: fx.GraphModule, one: fx.Node | None, other: fx.Node | None) -> bool:
    if one is None or other is None:
        return one is other
    a, b = (graph.get_tensor(gm, str(n.target)) for n in (one, other))
    return a.dtype == b.dtype and a.shape[1:] == b.shape[1:] and a.dim() == b.dim() and a.device == b.device


def _merge(gm: fx.GraphModule, group: list[fx.Node]) -> None:
    """Put one linear before the first of a group, and its parts in place of all."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first, given = group[0], [m.arguments(node) for node in group]
    bring_before(order, [n for n in (given[0][name] for name in _ALIKE[:3]) if n is not None], first)
    sizes = [graph.get_tensor(gm, one["w"].target).shape[0] for one in given]
    stem = _stem(str(given[0]["w"].target))
    parts = [_held(gm, f"{stem}_{name}", _rows(gm, given, key), first) for name, key in _PARTS]
    bias = _held(gm, f"{stem}_bias", _bias(gm, given, sizes), first)
    rest = [given[0][name] for name in _ALIKE]
    with gm.graph.inserting_before(first):
        whole = call(gm, first.target, given[0]["x"], *parts, bias, *rest, like=first)
    note_computed(whole, *group)
    axis, start = m.rank(whole) - 1, 0
    for node, size in zip(group, sizes, strict=True):
        with gm.graph.inserting_before(node):
            cut = plain(call(gm, aten.slice.Tensor, whole, axis, start, start + size, like=node))
        take_place(node, cut)
        start += size


_PARTS = (("codes", "w"), ("scale", "w_scale"), ("zero", "w_zero"))


def _stem(codes: str) -> str:
    """What the merged tensors are called: `q_proj.w_codes` gives `q_proj.merged_w`."""
    owner, _, leaf = codes.rpartition(".")
    name = re.sub(r"_codes(_\d+)?$", "", leaf)
    own = re.sub(r"(^|_)w$", "", name)
    merged = f"{own}_merged_w" if own else "merged_w"
    return f"{owner}.{merged}" if owner else merged


def _held(gm: fx.GraphModule, name: str, tensor: Tensor | None, before: fx.Node) -> fx.Node | None:
    return None if tensor is None else graph.add_tensor(gm, name, tensor, before)


def _rows(gm: fx.GraphModule, given: list[dict[str, Any]], name: str) -> Tensor | None:
    """The rows of all weights, or of their scales, one below the other; one for all where it has no rows."""
    tensors = [graph.get_tensor(gm, one[name].target).detach() for one in given if one[name] is not None]
    if not tensors or not tensors[0].dim():
        return tensors[0] if tensors else None
    dtype = tensors[0].dtype
    if dtype.itemsize == 1:  # not all of them can be concatenated by themselves
        return torch.cat([t.view(torch.uint8) for t in tensors]).view(dtype)
    return torch.cat(tensors)


def _bias(gm: fx.GraphModule, given: list[dict[str, Any]], sizes: list[int]) -> Tensor | None:
    """The biases of all, zeros where one has none; None where none has any."""
    found = [None if one["bias"] is None else graph.get_tensor(gm, one["bias"].target).detach() for one in given]
    there = [t for t in found if t is not None]
    if not there:
        return None
    return torch.cat([there[0].new_zeros(n) if t is None else t for t, n in zip(found, sizes, strict=True)])
