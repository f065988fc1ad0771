"""A cache that grows by concatenation, and the attention over it, become one operator.

    %cat: f32[s0,2,s1+s4,32] = aten.cat([%past_k, %k], -2)
    %cat_1: f32[s0,2,s1+s4,32] = aten.cat([%past_v, %v], -2)
    %sdpa: f32[s0,6,s1,32] = aten.scaled_dot_product_attention(%q, %cat, %cat_1, %mask, enable_gqa=True)
    return [%sdpa, %cat, %cat_1]
    ->
    %cached_attention = qfx.cached_attention(%q, %k, %v, %past_k, %past_v, %mask, None, 0.1767, False, 0.0)
    return [%getitem, %getitem_1, %getitem_2]

The number of cached tokens is no longer read from the cache, whose memory may be longer, but is the length of the
attention mask less the number of new tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qfx.graph import is_call, val
from qfx.ops import floats as float_ops
from qfx.passes import _match as m
from qfx.passes._build import call, matched, size

aten = torch.ops.aten
assert float_ops.cached_attention is not None

_PAST = "qfx_past"


def kv_cache(gm: fx.GraphModule, *, pasts: Sequence[str], total: str, new: str) -> bool:
    """Fuse in place.

    pasts: the placeholders of cached keys and values [B, H, P, D]. total, new: the placeholders of the attention mask
    [B, P + S] and of the new tokens [B, S]. `gm.meta["qfx_past"]` names those pasts that nothing but fused attention
    reads any more.
    """
    inputs = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
    if total not in inputs or new not in inputs:
        return matched(gm, "kv_cache", 0)  # a decoder that reads no mask (FSMT): nothing tells how long the past is
    own = [inputs[name] for name in pasts if name in inputs]
    count = sum(_fuse(gm, node, own) for node in list(gm.graph.nodes) if _is_attention(node))
    gm.graph.eliminate_dead_code()
    for past in own:
        _lengths(gm, past, inputs[total], inputs[new])
    free = [p.name for p in own if all(is_call(u, torch.ops.qfx.cached_attention.default) for u in p.users)]
    gm.meta[_PAST] = {"names": free, "total": total, "new": new}
    gm.recompile()
    return matched(gm, "kv_cache", count)


def shared(gm: fx.GraphModule) -> dict[str, Any]:
    """{"names": pasts that may share their memory with what they grow to, "total", "new"}; {} where none was fused."""
    found: dict[str, Any] = gm.meta.get(_PAST, {})
    return found


def _is_attention(node: fx.Node) -> bool:
    return is_call(node, aten.scaled_dot_product_attention.default, torch.ops.qfx.attention.default)


def _fuse(gm: fx.GraphModule, node: fx.Node, pasts: list[fx.Node]) -> bool:
    given = m.arguments(node)
    q, k, v = (given.get(a, given.get(b)) for a, b in (("q", "query"), ("k", "key"), ("v", "value")))
    assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
    grown = [_grown(one, pasts) for one in (k, v)]
    causal = bool(given.get("causal", given.get("is_causal")))
    if any(g is None for g in grown) or causal or given.get("dropout_p"):
        return False
    (past_k, new_k), (past_v, new_v) = (g for g in grown if g is not None)
    mask = given.get("mask", given.get("attn_mask"))
    scale = given.get("scale")
    width = m.shape(q)[-1]
    if scale is None:
        scale = 1.0 / float(width) ** 0.5
    rest = (mask, given.get("sinks"), float(scale), False, float(given.get("softcap") or 0.0))
    target = torch.ops.qfx.cached_attention.default
    with gm.graph.inserting_before(node):
        fused = call(gm, target, q, new_k, new_v, past_k, past_v, *rest, like=node)
        parts = [call(gm, operator.getitem, fused, i, like=node) for i in range(3)]
    node.replace_all_uses_with(parts[0])
    gm.graph.erase_node(node)
    _take_over(k, parts[1])
    _take_over(v, parts[2])
    return True


def _take_over(cat: fx.Node, present: fx.Node) -> None:
    """What comes after the attention reads its result instead of the concatenation."""
    for user in list(cat.users):
        if user.op == "output":
            user.replace_input_with(cat, present)


def _grown(node: Any, pasts: list[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """(cached, new) of their concatenation along the tokens that nothing but attention and the output reads."""
    if not is_call(node, aten.cat.default):
        return None
    parts, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    if not isinstance(parts, list | tuple) or len(parts) != 2 or dim not in (-2, 2) or m.rank(node) != 4:
        return None
    past, new = parts
    if not isinstance(past, fx.Node) or past not in pasts or not isinstance(new, fx.Node):
        return None
    alone = all(u.op == "output" or _is_attention(u) for u in node.users)
    return (past, new) if alone else None


def _lengths(gm: fx.GraphModule, past: fx.Node, total: fx.Node, new: fx.Node) -> None:
    """Read the sizes of a cache elsewhere: the batch from the new tokens, the cached tokens as total less new."""
    for user in [u for u in past.users if is_call(u, aten.sym_size.int)]:
        axis = user.args[1]
        assert isinstance(axis, int)
        with gm.graph.inserting_before(user):
            if axis % 4 == 0:
                value = size(gm, new, 0, like=user)
            elif axis % 4 == 2:
                value = _cached(gm, user, total, new)
            else:
                continue
        if isinstance(value, fx.Node):
            user.replace_all_uses_with(value)
            gm.graph.erase_node(user)


def _cached(gm: fx.GraphModule, user: fx.Node, total: fx.Node, new: fx.Node) -> fx.Node:
    """total.shape[1] - new.shape[1], which has the value that the size of the cache had in the trace."""
    ends = [gm.graph.call_function(aten.sym_size.int, (t, 1)) for t in (total, new)]
    for end, source in zip(ends, (total, new), strict=True):
        end.meta["val"] = val(source).shape[1]
    length = gm.graph.call_function(operator.sub, tuple(ends))
    length.meta["val"] = val(user)
    return length
