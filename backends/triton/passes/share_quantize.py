"""Linears that round the same input to the same format read the same codes.

    %quantize_dynamic = qfx_triton.quantize_dynamic(%x, None, i8/tok)
    %gemm8 = qfx_triton.gemm8(%quantize_dynamic[0], ..., q)
    %quantize_dynamic_1 = qfx_triton.quantize_dynamic(%x, None, i8/tok)
    %gemm8_1 = qfx_triton.gemm8(%quantize_dynamic_1[0], ..., k)
    ->
    %quantize_dynamic = qfx_triton.quantize_dynamic(%x, None, i8/tok)
    %gemm8 = qfx_triton.gemm8(%quantize_dynamic[0], ..., q)
    %gemm8_1 = qfx_triton.gemm8(%quantize_dynamic[0], ..., k)

Smoothing factors, fixed scales and zero points are the same where their values are. The numbers stay the same.
"""

from __future__ import annotations

import operator

from torch import fx

from qfx.backends.triton.passes._nodes import Quantize, same
from qfx.graph import is_call
from qfx.passes._build import matched


def share_quantize(gm: fx.GraphModule) -> bool:
    """See the module."""
    kept: dict[tuple[object, ...], list[Quantize]] = {}
    count = 0
    for node in list(gm.graph.nodes):
        found = Quantize.of(node)
        if found is None:
            continue
        others = kept.setdefault((node.target, found.x, found.format), [])
        first = next((other for other in others if _alike(gm, other, found)), None)
        if first is None:
            others.append(found)
            continue
        node.replace_all_uses_with(first.node)
        gm.graph.erase_node(node)
        _one_of_each(gm, first.node)
        count += 1
    return matched(gm, "share_quantize", count)


def _alike(gm: fx.GraphModule, one: Quantize, other: Quantize) -> bool:
    pairs = ((one.smooth, other.smooth), (one.scale, other.scale), (one.zero, other.zero))
    return all(same(gm, a, b) for a, b in pairs)


def _one_of_each(gm: fx.GraphModule, node: fx.Node) -> None:
    """One getitem for each result of a node."""
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    first: dict[object, fx.Node] = {}
    for user in sorted(node.users, key=order.__getitem__):
        if is_call(user, operator.getitem) and first.setdefault(user.args[1], user) is not user:
            user.replace_all_uses_with(first[user.args[1]])
            gm.graph.erase_node(user)
