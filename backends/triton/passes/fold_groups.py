"""Attention of heads that share keys, in a form for which torch has a fast kernel.

    %y = aten.scaled_dot_product_attention(%q, %k, %v, %mask, enable_gqa=True)      # q [B, H, 1, D], k [B, G, L, D]
    ->
    %rows = aten.reshape(%q, [B, G, H / G, D])
    %all = aten.scaled_dot_product_attention(%rows, %k, %v, %mask)
    %y = aten.reshape(%all, [B, H, 1, Dv])

With one query the heads of a group are rows of one product, so that keys are read once. With more queries and a mask
keys and values are repeated instead (torch's kernels that take groups take no mask, and its fallback is slow).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx import graph
from qfx.graph import is_call
from qfx.passes._build import call, size, take_place
from qfx.passes._match import arguments

_aten = torch.ops.aten
_sdpa = _aten.scaled_dot_product_attention.default


def fold_groups(gm: fx.GraphModule) -> bool:
    """See the module."""
    changed = False
    for node in list(gm.graph.nodes):
        if is_call(node, _sdpa) and arguments(node)["enable_gqa"]:
            changed |= _folded(gm, node)
    return changed


def _folded(gm: fx.GraphModule, node: fx.Node) -> bool:
    given = arguments(node)
    q, k = (graph.val(given[name]) for name in ("query", "key"))
    heads, groups = q.shape[1], k.shape[1]
    if not (isinstance(heads, int) and isinstance(groups, int)) or q.dim() != 4:
        return False
    mask = None if given["attn_mask"] is None else graph.val(given["attn_mask"])
    by_head = mask is not None and mask.dim() > 2 and mask.shape[-3] != 1
    with gm.graph.inserting_before(node):
        if q.shape[2] == 1 and not given["is_causal"] and not by_head:
            new = _as_rows(gm, node, given, groups, heads // groups)
        elif mask is not None and heads != groups:
            new = _repeated(gm, node, given, heads // groups)
        else:
            return False
    take_place(node, new)
    return True


def _as_rows(gm: fx.GraphModule, node: fx.Node, given: dict[str, Any], groups: int, share: int) -> fx.Node:
    batch = size(gm, given["query"], 0, like=node)
    width, v_width = (graph.val(given[name]).shape[-1] for name in ("query", "value"))
    rows = call(gm, _aten.reshape.default, given["query"], [batch, groups, share, width], like=node)
    y = _attention(gm, node, {**given, "query": rows})
    return call(gm, _aten.reshape.default, y, [batch, groups * share, 1, v_width], like=node)


def _repeated(gm: fx.GraphModule, node: fx.Node, given: dict[str, Any], share: int) -> fx.Node:
    many = {
        name: call(gm, _aten.repeat_interleave.self_int, given[name], share, 1, like=node) for name in ("key", "value")
    }
    return _attention(gm, node, {**given, **many})


def _attention(gm: fx.GraphModule, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return call(gm, _sdpa, *(given[name] for name in names), scale=given["scale"], like=node)
