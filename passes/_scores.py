"""What stands between the two products of a spelled-out attention, read from the softmax upwards.

Recognized: one scale, masks and biases that are added or filled in, a soft cap (tanh), sinks (one more column), casts,
the subtraction of the maximum, heads that are flattened into the batch.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes.linear import is_parameter

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
_FILLS = (aten.masked_fill.Scalar, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.self)
_HIDDEN = -1e30  # a fill value at or below this leaves nothing of a score


@dataclass
class Scores:
    """What stands before the softmax: q and k^T, and what happens to their product, from the softmax upwards."""

    q: Any = None
    kt: Any = None
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Any = None
    apart: Any = None  # the scores with heads as a dimension, where q and k have them flattened into the batch
    terms: list[tuple[Any, float]] = field(default_factory=list)  # added: (tensor, factor)
    fills: list[tuple[Any, bool, float]] = field(default_factory=list)  # filled in: (where, keeps, value)


def scores_of(weights: Any) -> Scores | None:
    """What leads to the weights that a product with values reads; None where that is no attention."""
    softmax, has_slice, was_flat = _softmax_of(weights)
    if softmax is None:
        return None
    scores = Scores()
    if not _read(_above(softmax, scores), scores) or (scores.sinks is not None) != has_slice:
        return None
    if (scores.apart is not None) != was_flat or is_parameter(scores.kt) or is_parameter(scores.q):
        return None
    return scores


def _softmax_of(weights: Any) -> tuple[fx.Node | None, bool, bool]:
    """(softmax, whether its last column is cut off, whether heads are flattened after it); None where it differs."""
    has_slice = was_flat = False
    node: Any = weights
    while isinstance(node, fx.Node) and m.only_user(node) is not None:
        if is_call(node, aten.softmax.int):
            return (node, has_slice, was_flat) if m.is_last(m.arguments(node)["dim"], node) else (None, False, False)
        if is_call(node, aten.slice.Tensor) and _drops_last(node) and not has_slice:
            has_slice = True
        elif is_call(node, aten.reshape.default) and m.rank(node) == 3 and m.rank(node.args[0]) == 4:
            was_flat = True
        elif not is_call(node, *m.CASTS):
            break
        node = node.args[0]
    return None, False, False


def _drops_last(node: fx.Node) -> bool:
    """Does a slice take all but the last column?"""
    given = m.arguments(node)
    end = given["end"]
    wanted = m.shape(given["self"])[-1] - 1
    cut = end == -1 or m.same_size(end, wanted) or m.same_size(m.shape(node)[-1], wanted)
    return cut and given["start"] in (0, None) and given["step"] == 1 and m.is_last(given["dim"], node)


def _above(softmax: fx.Node, scores: Scores) -> Any:
    """The scores that a softmax reads, without casts, without the subtraction of their maximum, without sinks."""
    node: Any = m.skip_upcasts(softmax.args[0])
    if m.plain_binary(node, *m.SUB) and _is_maximum(node.args[1], node.args[0]):
        node = m.skip_upcasts(node.args[0])
    if is_call(node, aten.cat.default):
        given = m.arguments(node)
        parts = given["tensors"]
        if len(parts) == 2 and m.is_last(given["dim"], node):
            node, scores.sinks = m.skip_upcasts(parts[0]), _per_head(parts[1], m.shape(node))
    return node


def _is_maximum(node: Any, of: Any) -> bool:
    """Is it the maximum over the last dimension, kept as a dimension?"""
    if is_call(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]
    if not is_call(node, aten.max.dim, aten.amax.default):
        return False
    given = m.arguments(node)
    dim = given["dim"]
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return given["self"] is of and given["keepdim"] is True and isinstance(dim, int) and m.is_last(dim, of)


def _per_head(node: Any, sizes: tuple[Any, ...]) -> Any:
    """The vector [H] behind a column [B, H, S, 1] of equal values per head; None where it is something else."""
    if len(sizes) != 4 or not m.same_size(m.shape(node)[-1], 1):
        return None
    node = m.skip_upcasts(node)
    source = m.skip(node, aten.expand.default)
    if m.shape(source) != (1, sizes[1], 1, 1) and m.shape(source) != (sizes[1], 1, 1):
        return None
    vector = m.skip(source, *m.RESHAPES, aten.unsqueeze.default)
    return vector if m.shape(vector) == (sizes[1],) else None


def _read(node: Any, scores: Scores) -> bool:
    """Walk up from the softmax to the product of q and k and note what happens on the way. False: not attention."""
    while isinstance(node, fx.Node) and _is_private(node):
        if is_call(node, *PRODUCTS) and m.rank(node) >= 3:
            scores.q, scores.kt = node.args[:2]
            return True
        if is_call(node, aten.baddbmm.default):
            return _read_baddbmm(node, scores)
        if m.plain_binary(node, *m.ADD):
            return not scores.softcap and _read_sum(node, scores)
        step = _step(node, scores)
        if step is None:
            return False
        node = m.skip_upcasts(step)
    return False


def _step(node: fx.Node, scores: Scores) -> Any:
    """One operation of one input: notes it and returns the input; None where it has no place here."""
    times = m.scaled(node)
    if times is not None and is_call(times[0], aten.tanh.default):
        return _read_softcap(times[0], times[1], scores)
    if times is not None:
        scores.scale *= times[1]
        return times[0]
    if node.target in _FILLS and not scores.softcap and scores.scale == 1.0:
        return _read_fill(node, scores)
    if not is_call(node, aten.reshape.default) or m.rank(node) != 4:
        return None
    if not m.same_sizes(m.shape(node)[2:], m.shape(node.args[0])[1:]):
        return None  # heads were flattened, but not into the batch
    scores.apart = node
    return node.args[0]


def _is_private(node: fx.Node) -> bool:
    """Does nothing but the next step read this node? (The scores' own maximum may.)"""
    users = [u for u in node.users if not (is_call(u, aten.max.dim, aten.amax.default) and len(node.users) == 2)]
    return len(users) == 1 and users[0].op == "call_function"


def _read_sum(node: fx.Node, scores: Scores) -> bool:
    """scores + mask, in any order: follow the operand that leads to a product."""
    for inner, term in m.orders(node):
        if not isinstance(inner, fx.Node) or not isinstance(term, fx.Node):
            continue
        if not m.same_sizes(m.shape(inner), m.shape(node)):
            continue
        before = (scores.scale, scores.softcap, scores.apart, len(scores.terms), len(scores.fills))
        scores.terms.append((term, scores.scale))
        if _read(m.skip_upcasts(inner), scores):
            return True
        scores.scale, scores.softcap, scores.apart = before[:3]
        del scores.terms[before[3] :], scores.fills[before[4] :]
    return False


def _read_baddbmm(node: fx.Node, scores: Scores) -> bool:
    given = m.arguments(node)
    alpha, beta = m.number(given["alpha"]), m.number(given["beta"])
    if alpha is None or beta is None or scores.softcap:
        return False
    if beta:
        scores.terms.append((given["self"], scores.scale * beta))
    scores.scale *= alpha
    scores.q, scores.kt = given["batch1"], given["batch2"]
    return True


def _read_softcap(tanh: fx.Node, cap: float, scores: Scores) -> Any:
    """cap * tanh(scores / cap)."""
    inner = m.scaled(tanh.args[0])
    if scores.scale != 1.0 or scores.softcap or inner is None or not _is_private(tanh):
        return None
    if not math.isclose(inner[1] * cap, 1.0, rel_tol=1e-6) or cap <= 0:
        return None
    scores.softcap = cap
    return inner[0]


def _read_fill(node: fx.Node, scores: Scores) -> Any:
    """masked_fill(scores, where, low) or where(keep, scores, low)."""
    first, second, third = node.args[:3]
    if node.target is aten.masked_fill.Scalar:
        inner, where, value, keeps = first, second, m.number(third), False
    elif m.number(third) is not None:
        inner, where, value, keeps = second, first, m.number(third), True
    else:
        inner, where, value, keeps = third, first, m.number(second), False
    if value is None or value > _HIDDEN or not m.same_sizes(m.shape(inner), m.shape(node)):
        return None
    scores.fills.append((where, keeps, value))
    return inner
