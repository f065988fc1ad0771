"""Heads of equal formats side by side, so that a mix of formats is a few plain sub-matrices (see `permute_heads`).

    q_proj: w=[i8,i4,i8,i4]    k_proj, v_proj: w=[i8,i4,i8,i4]    o_proj: w=columns[i8,i4,i8,i4]
    ->
    q_proj: w=[i8,i8,i4,i4]    k_proj, v_proj: w=[i8,i8,i4,i4]    o_proj: w=columns[i8,i8,i4,i4]

Annotations of nodes and plan move with the weights. To be called before scales are calibrated and weights are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from qfx import annotation, graph
from qfx.analysis.attentions import Attention, Projection, find, projections
from qfx.analysis.movable import movable
from qfx.annotation import Columns, Formats, Outliers, each
from qfx.errors import Note
from qfx.format import Format
from qfx.live.segments import along, pieces, segments
from qfx.passes import _sites as sites
from qfx.passes.permute_heads import Moved, Site
from qfx.plan import Plan
from qfx.rewrites.head_order import Key, order_heads
from qfx.rewrites.rotations import apply_site

Orders = Mapping[str, Sequence[int]]  # role -> the head that comes to each place


def permute(gm: fx.GraphModule, plan: Plan, *, minor: bool = False) -> list[Note]:
    """Order the heads of each attention of a prepared, annotated graph by their formats, and record it in `plan`.

    Where no order gives fewer pieces nothing changes. Returns a note for each attention whose order is fixed, `minor`
    where nobody asked for one by name.
    """
    nodes: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and annotation.get(node):
            nodes.setdefault(graph.fqn_of(node), []).append(node)
    notes = []
    for attention in find(gm)[0]:
        orders = _orders(attention, nodes)
        if orders is None:
            continue
        found = movable(attention)
        if isinstance(found, str):
            step = "nothing: heads of one format are computed in several pieces"
            reason = f"its heads of equal formats cannot be put side by side: {found}"
            told = sites.note(attention.node, reason, step)
            notes.append(Note(told.node, told.reason, told.next_step, told.where, minor=minor))
            continue
        order = {"query": orders["q"], "kv": orders["k"]}
        moved = [Moved(a.weight, a.bias, a.axis, a.starts, a.width, tuple(order[a.of])) for a in found]
        still = [list(part.order) == list(range(len(part.order))) for part in moved]
        parts = tuple(part for part, stays in zip(moved, still, strict=True) if not stays)
        apply_site(gm, plan, Site(attention.name, parts))
        _annotate(plan, attention, nodes, orders)
    return notes


def _orders(attention: Attention, nodes: Mapping[str, Sequence[fx.Node]]) -> Orders | None:
    """The order of each role's heads; None where it would not help."""
    found = dict(projections(attention))
    own = annotation.get(attention.node)
    count = len(dict.fromkeys(found["k"].starts)) if "k" in found else attention.kv_heads
    keys = {role: _keys(projection, role, _format(nodes, projection)) for role, projection in found.items()}
    keys |= {f"attention {role}": [(one,) for one in each(f)] for role, f in own.items() if isinstance(f, tuple)}
    query = _zipped([k for role, k in keys.items() if role[-1] in "qop"], attention.heads)
    kv = _zipped([k for role, k in keys.items() if role[-1] in "kv"], count)
    if query is None or kv is None:
        return None
    heads, groups = order_heads(query, kv)
    orders = {"q": heads, "o": heads, "p": heads, "k": groups, "v": groups}
    before, after = _pieces(found, nodes, {}), _pieces(found, nodes, orders)
    return orders if after < before else None


def _zipped(keys: Iterable[Sequence[Key]], count: int) -> list[Key] | None:
    """One key of all roles for each head; None where a role has another number of heads."""
    given = list(keys)
    if any(len(one) != count for one in given):
        return None
    return [tuple(part for one in given for part in one[head]) for head in range(count)]


def _format(nodes: Mapping[str, Sequence[fx.Node]], projection: Projection) -> Formats | None:
    return next((annotation.get(node).get("w") for node in nodes.get(projection.fqn, ())), None)


def _cut(formats: Formats | None, role: str) -> bool:
    """Do several formats cut the weight along the heads of this role?"""
    several = isinstance(formats, tuple | Columns) and len(each(formats)) > 1
    return several and formats is not None and along(formats) == (role == "o")


def _keys(projection: Projection, role: str, formats: Formats | None) -> list[Key]:
    """What the channels of each head are, in granules of a fixed number of channels."""
    starts = list(dict.fromkeys(projection.starts))
    if formats is None or not _cut(formats, role):
        return [()] * len(starts)
    granules, size = _granules(formats, projection)
    return [tuple(map(str, granules[start // size : (start + projection.width) // size])) for start in starts]


def _granules(formats: Formats, projection: Projection) -> tuple[list[Format], int]:
    """The formats as a list so fine that each head is whole entries, and the channels of an entry."""
    listed = each(formats)
    size = math.gcd(projection.size // len(listed), projection.width, *projection.starts)
    times = projection.size // len(listed) // size
    return [fmt for fmt in listed for _ in range(times)], size


def _permuted(formats: Formats, role: str, projection: Projection, order: Sequence[int]) -> Formats:
    """The formats of a weight whose heads are put in another order."""
    starts = list(dict.fromkeys(projection.starts))
    if isinstance(formats, Outliers) and role == "o":
        moved = Moved(projection.fqn, None, 1, tuple(starts), projection.width, tuple(order))
        index = moved.index(projection.size)
        held = set(formats.columns)
        return Outliers(formats.rest, formats.kept, tuple(i for i, old in enumerate(index.tolist()) if old in held))
    if not _cut(formats, role):
        return formats
    granules, size = _granules(formats, projection)
    moved = Moved(projection.fqn, None, 0, tuple(s // size for s in starts), projection.width // size, tuple(order))
    new = tuple(granules[i] for i in moved.index(len(granules)).tolist())
    return Columns(new) if isinstance(formats, Columns) else new


def _pieces(found: Mapping[str, Projection], nodes: Mapping[str, Sequence[fx.Node]], orders: Orders) -> int:
    """How many kernels and pieces the projections are, after these orders."""
    total = 0
    changed: dict[str, Formats] = {}
    for role, projection in found.items():
        formats = changed.get(projection.fqn) or _format(nodes, projection)
        if formats is not None and role in orders:
            formats = _permuted(formats, role, projection, orders[role])
        if formats is not None:
            changed[projection.fqn] = formats
    for projection in {p.fqn: p for p in found.values()}.values():
        if isinstance(formats := changed.get(projection.fqn), tuple | Columns):
            cut = segments(formats, [projection.size] * 2, projection.fqn)
            total += len(cut) + len(pieces(cut))
    return total


def _annotate(plan: Plan, attention: Attention, nodes: Mapping[str, Sequence[fx.Node]], orders: Orders) -> None:
    """Move the formats of the projections and of the attention's own roles, on the nodes and in the plan."""
    for role, projection in projections(attention):
        formats = _format(nodes, projection)
        if formats is not None:
            _write(plan, nodes[projection.fqn], "w", _permuted(formats, role, projection, orders[role]))
    for role, own in annotation.get(attention.node).items():
        if isinstance(own, tuple) and len(own) == len(orders[role]):
            _write(plan, [attention.node], role, tuple(own[head] for head in orders[role]))


def _write(plan: Plan, nodes: Iterable[fx.Node], role: str, formats: Formats) -> None:
    for node in nodes:
        annotation.set(node, role, formats)
        held: dict[str, Any] = plan.annotations.get(graph.fqn_of(node), {})
        if role in held:
            held[role] = annotation.to_json(formats)
