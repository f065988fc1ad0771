"""Spelled-out attention becomes aten.scaled_dot_product_attention, or qfx::attention where that cannot say it.

    %transpose: f32[2,4,16,7] = aten.transpose.int(%k, 2, 3)
    %matmul: f32[2,4,7,7] = aten.matmul(%q, %transpose)
    %mul: f32[2,4,7,7] = aten.mul.Tensor(%matmul, 0.25)
    %add: f32[2,4,7,7] = aten.add.Tensor(%mul, %mask)
    %softmax: f32[2,4,7,7] = aten.softmax.int(%add, -1, f32)
    %matmul_1: f32[2,4,7,16] = aten.matmul(%softmax, %v)
    ->
    %scaled_dot_product_attention: f32[2,4,7,16] = aten.scaled_dot_product_attention(%q, %k, %v, %mask)

`_scores.py` says what is recognized between the two products. Heads of k and v that are repeated to match those of q
are taken before the repetition (enable_gqa), also where the model already calls scaled_dot_product_attention. Scores
that anything else reads (returned attention weights) are left alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

import qfx.ops.floats  # noqa: F401  (registers the ops)
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes._build import SPELLED_OUT, call, matched, replace, size
from qfx.passes._scores import PRODUCTS, Scores, scores_of
from qfx.passes.linear import is_parameter, is_transpose

aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default


def attention(gm: fx.GraphModule) -> bool:
    """Put one attention node for softmax(q k^T * scale + mask) v; un-repeat grouped heads of k and v."""
    count = 0
    for node in list(gm.graph.nodes):
        if is_call(node, _SDPA):
            new = _grouped(gm, node)
        elif is_call(node, *PRODUCTS):
            new = _spelled_out(gm, node)
        else:
            continue
        if new is not None:
            replace(node, new)
            count += 1
    return matched(gm, "attention", count)


def _spelled_out(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    weights, v = node.args[:2]
    scores = None if is_parameter(v) else scores_of(weights)
    return None if scores is None else _attend(gm, node, scores, v)


def _attend(gm: fx.GraphModule, node: fx.Node, scores: Scores, v: Any) -> fx.Node | None:
    """The attention node in place of the product with v."""
    node.meta[SPELLED_OUT] = True  # what takes its place inherits that
    q, k, scale = _unscaled(gm, node, scores)
    v = m.skip_upcasts(v) if m.dtype(m.skip_upcasts(v)) == m.dtype(m.skip_upcasts(q)) else v
    if m.dtype(v) == m.dtype(m.skip_upcasts(q)) == m.dtype(m.skip_upcasts(k)):
        q, k = m.skip_upcasts(q), m.skip_upcasts(k)
    if not m.dtype(q) == m.dtype(k) == m.dtype(v) == m.dtype(node):
        return None
    if scores.apart is not None:
        q, k, v = (_with_heads(gm, t, scores, node) for t in (q, k, v))
    if not 3 <= m.rank(q) == m.rank(k) == m.rank(v):
        return None
    mask = _mask(gm, node, scores, q)
    if scores.softcap or scores.sinks is not None or not (mask is None or m.dtype(mask) == m.dtype(q)):
        if m.rank(q) != 4:
            return None
        k, v, _ = _shared_heads(q, k, v)
        args = (q, k, v, mask, scores.sinks, scale, False, scores.softcap)
        new = call(gm, torch.ops.qfx.attention.default, *args, like=node)
    else:
        new = _sdpa(gm, node, q, k, v, mask, scale)
    if scores.apart is not None:
        new = call(gm, aten.reshape.default, new, [-1, *_tail(gm, new, node)], like=node)
    return new


def _unscaled(gm: fx.GraphModule, node: fx.Node, scores: Scores) -> tuple[Any, Any, float]:
    """(q, k, scale): constant factors of q and k^T join the scale."""
    scale = scores.scale
    sides = []
    for side in (scores.q, scores.kt):
        times = m.scaled(side) if isinstance(side, fx.Node) else None
        if times is not None and m.dtype(times[0]) == m.dtype(side):
            side, scale = times[0], scale * times[1]  # noqa: PLW2901
        sides.append(side)
    q, kt = sides
    k = kt.args[0] if is_transpose(kt) else call(gm, aten.transpose.int, kt, -2, -1, like=node)
    times = m.scaled(k)
    if times is not None and m.dtype(times[0]) == m.dtype(k):
        k, scale = times[0], scale * times[1]
    return q, k, scale


def _with_heads(gm: fx.GraphModule, node: Any, scores: Scores, like: fx.Node) -> Any:
    """[B * H, S, D] as [B, H, S, D]: what was flattened, or a new reshape."""
    inner = m.skip(node, *m.RESHAPES)
    if m.rank(inner) == 4 and m.same_sizes(m.shape(inner)[2:], m.shape(node)[1:]):
        return inner
    return call(gm, aten.reshape.default, node, [-1, _heads(gm, scores, like), *_tail(gm, node, like)], like=like)


def _tail(gm: fx.GraphModule, node: fx.Node, like: fx.Node) -> list[Any]:
    """The last two sizes."""
    return [size(gm, node, dim, like=like) for dim in (-2, -1)]


def _heads(gm: fx.GraphModule, scores: Scores, like: fx.Node) -> Any:
    """The number of heads, from the scores after they were put apart."""
    return size(gm, scores.apart, 1, like=like)


def _mask(gm: fx.GraphModule, node: fx.Node, scores: Scores, q: fx.Node) -> Any:
    """One additive mask of all terms and fills, in the dtype of q where nothing is lost by that; None without any."""
    parts = []
    for term, factor in scores.terms:
        part = _apart(gm, term, scores, node)
        parts.append(part if factor == 1.0 else call(gm, aten.mul.Tensor, part, factor, like=node))
    for where, keeps, value in scores.fills:
        parts.append(_fill_as_term(gm, node, (_apart(gm, where, scores, node), keeps, value), q))
    if not parts:
        return None
    mask, *others = parts
    for part in others:
        mask = call(gm, aten.add.Tensor, mask, part, like=node)
    if m.dtype(mask) != m.dtype(q) and not _is_wider(m.dtype(mask), m.dtype(q)):
        mask = call(gm, aten._to_copy.default, mask, dtype=m.dtype(q), like=node)
    return mask


def _apart(gm: fx.GraphModule, term: Any, scores: Scores, like: fx.Node) -> Any:
    """A mask [B * H, S, T] as [B, H, S, T] where heads were flattened; masks that broadcast to it stay."""
    flat = scores.apart is not None and m.rank(term) == 3 and not m.same_size(m.shape(term)[0], 1)
    if not flat or m.same_size(m.shape(term)[0], m.shape(scores.apart)[1]):
        return term
    return call(gm, aten.reshape.default, term, [-1, _heads(gm, scores, like), *_tail(gm, term, like)], like=like)


def _is_wider(one: torch.dtype | None, other: torch.dtype | None) -> bool:
    assert one is not None and other is not None
    return one.is_floating_point and torch.finfo(one).bits > torch.finfo(other).bits


def _fill_as_term(gm: fx.GraphModule, node: fx.Node, fill: tuple[Any, bool, float], q: fx.Node) -> fx.Node:
    where, keeps, value = fill
    device, dtype = q.meta["val"].device, m.dtype(q)
    zero = call(gm, aten.full.default, [], 0.0, dtype=dtype, device=device, like=node)
    if keeps:
        return call(gm, aten.where.ScalarOther, where, zero, value, like=node)
    return call(gm, aten.where.ScalarSelf, where, value, zero, like=node)


def _sdpa(gm: fx.GraphModule, node: fx.Node, q: Any, k: Any, v: Any, mask: Any, scale: float | None) -> fx.Node:
    k, v, grouped = _shared_heads(q, k, v)
    kwargs: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    if not _is_usual(scale, q):
        kwargs["scale"] = scale
    return call(gm, _SDPA, q, k, v, *(() if mask is None else (mask,)), like=node, **kwargs)


def _is_usual(scale: float | None, q: Any) -> bool:
    """Is it the scale that scaled_dot_product_attention takes by itself, 1 / sqrt(D)?"""
    width = m.shape(q)[-1]
    return scale is None or (isinstance(width, int) and math.isclose(scale, width**-0.5, rel_tol=1e-7))


def _grouped(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The same call with un-repeated heads and without a scale that is the usual one; None where nothing changes."""
    given = m.arguments(node)
    q = given["query"]
    k, v, grouped = _shared_heads(q, given["key"], given["value"])
    usual = given["scale"] is not None and _is_usual(given["scale"], q)
    if given["enable_gqa"] or not (grouped or usual):
        return None
    kwargs: dict[str, Any] = {"enable_gqa": True} if grouped else {}
    if not usual and given["scale"] is not None:
        kwargs["scale"] = given["scale"]
    return call(gm, _SDPA, q, k, v, *node.args[3:], like=node, **kwargs)


def _shared_heads(q: Any, k: Any, v: Any) -> tuple[Any, Any, bool]:
    """(k, v, whether several heads of q share one of theirs), before any repetition of heads."""
    if m.rank(q) != 4:
        return k, v, False
    heads = m.shape(q)[1]
    a, b = (_unrepeated(t) if m.same_size(heads, m.shape(t)[1]) else None for t in (k, v))
    if a is not None and b is not None and m.same_size(m.shape(a)[1], m.shape(b)[1]):
        k, v = a, b
    return k, v, not m.same_size(heads, m.shape(k)[1]) and not m.same_size(heads, 1)


def _unrepeated(node: Any) -> Any:
    """[B, G, L, D] where `node` repeats each of its heads n times over [B, G * n, L, D]; None where it does not."""
    if is_call(node, aten.repeat_interleave.self_int) and m.arguments(node)["dim"] in (1, -3) and m.rank(node) == 4:
        return node.args[0]
    if not is_call(node, aten.reshape.default) or m.rank(node) != 4 or not is_call(node.args[0], aten.expand.default):
        return None
    expand = node.args[0]
    unsqueeze = expand.args[0]
    if m.rank(expand) != 5 or not is_call(unsqueeze, aten.unsqueeze.default) or unsqueeze.args[1] not in (2, -3):
        return None
    inner = unsqueeze.args[0]
    times = m.shape(expand)[2]
    sizes = m.shape(inner)
    if not isinstance(times, int) or not isinstance(sizes[1], int):
        return None
    return inner if m.same_sizes(m.shape(node), (sizes[0], sizes[1] * times, *sizes[2:])) else None
