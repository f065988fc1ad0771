"""Attention of few queries to more keys, in float, by a kernel that splits the keys and leaves out what a mask hides.

    %y = aten.scaled_dot_product_attention(%q, %k, %v, %mask, enable_gqa=True)      # q [B, H, 1, D], k [B, G, L, D]
    ->
    %spans = qfx_triton.mask_spans(%mask)
    %y = qfx_triton.float_attention(%q, %k, %v, %mask, %spans, None, 0.125, False, 0.0)

So with a mask, as the steps of decoding have it in a cache of fixed length: for those torch's fastest kernel is not
there, and the one that is repeats the keys of a group. Without a mask torch's is taken. qfx::attention, which has sinks
or a cap, has no kernel of torch's at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton import float_attention as own
from qfx.backends.triton.passes._nodes import are_alike, note_computed
from qfx.backends.triton.weight_only import DTYPES
from qfx.graph import is_call
from qfx.passes._build import call, plain, take_place
from qfx.passes._match import arguments, known, same_size

_aten = torch.ops.aten
_FEWEST = 64  # keys, from which on they are worth to be split
_ORDER = ("q", "k", "v", "mask", "spans", "sinks", "scale", "causal", "softcap")  # of the kernel's op
KERNEL = "float_attention (Triton)"


def few_queries(gm: fx.GraphModule, kernels: dict[str, str]) -> bool:
    """See the module. kernels: by node name, told of what the kernel executes."""
    changed = False
    spans: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        given = _given(node)
        if given is None or not _fits(*(graph.val(given[name]) for name in ("q", "k", "v", "mask"))):
            continue
        with gm.graph.inserting_before(node):
            given["spans"] = _spans(gm, given["mask"], spans, like=node)
            new = plain(call(gm, torch.ops.qfx_triton.float_attention.default, *given.values(), like=node))
        note_computed(new, node)
        take_place(node, new)
        kernels[new.name] = KERNEL
        changed = True
    return changed


def _spans(gm: fx.GraphModule, mask: Any, made: dict[fx.Node, fx.Node], *, like: fx.Node) -> Any:
    """What of the mask is shown, computed once for all layers; None where it has no place of its own for each key."""
    if mask is None or same_size(graph.val(mask).shape[-1], 1):
        return None
    if mask not in made:
        made[mask] = plain(call(gm, torch.ops.qfx_triton.mask_spans.default, mask, like=like))
    return made[mask]


def _given(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of the kernel's op by name, None for another node and where torch's kernel is taken."""
    if is_call(node, torch.ops.qfx.attention.default):
        given = arguments(node)
        return {name: given.get(name) for name in _ORDER}
    if not is_call(node, _aten.scaled_dot_product_attention.default):
        return None
    found = arguments(node)
    q, k, mask = (found[name] for name in ("query", "key", "attn_mask"))
    if mask is None or found["dropout_p"] or found["is_causal"]:
        return None
    if (
        not found["enable_gqa"]
        and graph.val(q).dim() == 4
        and not same_size(graph.val(q).shape[1], graph.val(k).shape[1])
    ):
        return None  # one head is for all: torch repeats it
    scale = found["scale"]
    scale = graph.val(q).shape[-1] ** -0.5 if scale is None else scale
    return {"q": q, "k": k, "v": found["value"], "mask": mask, "spans": None, "sinks": None, "scale": scale,
            "causal": False, "softcap": 0.0}  # fmt: skip


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel takes such operands, and is made for their sizes: those known but batch and keys."""
    if not (q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        return False
    if not are_alike(q, k, v, mask):
        return False
    sizes = [known(s) for s in (*q.shape[1:], k.shape[1], v.shape[3])]
    if not all(isinstance(s, int) for s in sizes):
        return False
    heads, queries, width, groups, v_width = sizes
    if groups == 0 or heads % groups or queries > own.MOST or max(width, v_width) > own.WIDEST:
        return False
    tokens = known(k.shape[2])
    return not isinstance(tokens, int) or tokens >= max(_FEWEST, 2 * queries)
