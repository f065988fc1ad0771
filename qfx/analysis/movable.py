"""What moves with the heads of an attention, or why their order is fixed.

Between a projection and the attention each call has to treat all heads alike: moves, RoPE, norms, constants. Norms over
all heads, sinks, and what a mask holds for each head (slopes, tables of position biases) have to be parameters that
nothing else reads; they then move along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from qfx import graph
from qfx.analysis.attentions import Attention, Projection, projections
from qfx.graph import is_call
from qfx.passes import _channels as channels
from qfx.passes import _match as m
from qfx.passes import _sites as sites

aten = torch.ops.aten

_NORMS = ("aten::rms_norm", "aten::layer_norm")
_SCALES = (*m.ADD, *m.SUB, *m.MUL, *m.DIV)
_EACH = (  # of the elements of a mask
    *_SCALES, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Scalar,
    aten.neg.default, aten.exp.default,
)  # fmt: skip


@dataclass(frozen=True)
class Along:
    """A tensor with channels of heads: `of` query or KV heads, `width` of each, that of head i from starts[i] on."""

    of: Literal["query", "kv"]
    weight: str
    bias: str | None
    axis: int
    starts: tuple[int, ...]
    width: int


def movable(attention: Attention) -> list[Along] | str:
    """Everything that has to move with the heads of an attention; a reason where their order is fixed."""
    found = dict(projections(attention))
    if missing := [role for role in "qkvo" if role not in found]:
        return f"the heads of {' and '.join(missing)} are not known"
    linears: dict[str, fx.Node] = {}
    between: dict[str, set[fx.Node]] = {}
    for role, value in zip("qkv", attention.node.args, strict=False):
        between[role], linear = _between(value, found[role].fqn)
        if linear is None:
            return f"the way from {found[role].fqn} to {role!r} is not known"
        linears[role] = linear
    linears["o"] = next(n for n in _after(attention.node) if graph.fqn_of(n) == found["o"].fqn and sites.is_linear(n))
    moved: list[Along] = []
    for role, projection in found.items():
        along = _of_linear(role, projection, linears[role], attention)
        if isinstance(along, str):
            return along
        moved.append(along)
    path = set().union(*between.values(), linears.values())
    for along, role in zip(list(moved), "qkv", strict=False):
        further = _treated_alike(along, between[role], linears[role])
        if isinstance(further, str):
            return further
        rows = {start + i for a in moved if a.weight == along.weight for start in a.starts for i in range(a.width)}
        if reader := _foreign(linears[role], rows, between[role], {*path, attention.node}):
            return f"%{reader.name} reads its heads, too"
        moved += further
    if shared := _overlap(moved):
        return f"two roles share channels of {shared}"
    return _with_inputs(moved, attention)


def _of_linear(role: str, projection: Projection, linear: fx.Node, attention: Attention) -> Along | str:
    """The rows (o: columns) of a projection."""
    weight = sites.weight_of(linear)
    if isinstance(weight, str):
        return weight
    if role in "qo":
        return Along("query", weight.weight, weight.bias if role == "q" else None,
                     weight.out if role == "q" else weight.inp, projection.starts, projection.width)  # fmt: skip
    starts = tuple(dict.fromkeys(projection.starts))
    groups = [starts.index(projection.starts[g]) for g in _read_by(attention, projection)]
    if groups != [h * len(starts) // attention.heads for h in range(attention.heads)]:
        return f"the query heads of a head of {role} do not lie together"
    return Along("kv", weight.weight, weight.bias, weight.out, starts, projection.width)


def _read_by(attention: Attention, projection: Projection) -> list[int]:
    """For each query head the head of the projection that it reads."""
    return [h * len(projection.starts) // attention.heads for h in range(attention.heads)]


def _between(value: Any, fqn: str) -> tuple[set[fx.Node], fx.Node | None]:
    """(the nodes on any way from the linear of this name to `value`, the linear)."""
    linear: fx.Node | None = None
    seen: set[fx.Node] = set()
    todo = [value]
    while todo:
        at = todo.pop()
        if at in seen or sites.reads_size(at):
            continue
        if sites.is_linear(at):
            linear = at if graph.fqn_of(at) == fqn else linear
            continue
        seen.add(at)
        todo += at.all_input_nodes
    below = set() if linear is None else _after(linear, within=seen)
    return below, linear


def _after(node: fx.Node, within: set[fx.Node] | None = None) -> set[fx.Node]:
    """The nodes that a node reaches (within a set), up to linears."""
    found: set[fx.Node] = set()
    todo = list(node.users)
    while todo:
        at = todo.pop()
        if at not in found and (within is None or at in within):
            found.add(at)
            todo += [] if sites.is_linear(at) else list(at.users)
    return found


def _treated_alike(along: Along, path: set[fx.Node], linear: fx.Node) -> list[Along] | str:
    """Norms over all heads on the way, which move along; a reason where a call does not treat the heads alike."""
    further: list[Along] = []
    for node in path:
        others = [n for n in node.all_input_nodes if n not in path and n is not linear]
        if channels.moves(node) or (node.target in _SCALES and not others):
            continue
        if is_call(node, aten.cat.default) and not others and m.is_last(m.arguments(node)["dim"], node):
            continue
        size = node.args[1] if graph.schema_name(node) == "qfx::hadamard" else _normed(node)
        alike = graph.schema_name(node) == "qfx::rope" or node.target in _SCALES
        alike = alike or (isinstance(size, int) and m.rank(node) == 4 and along.width % size == 0)
        if alike and all(_same_for_heads(other, node, along) for other in others):
            continue
        norm = _over_all(node, along, linear, others)
        if norm is None:
            return f"%{node.name} does not treat its heads alike"
        further += norm
    return further


def _normed(node: Any) -> int | None:
    """The size of the last axis, where a node is a norm over it."""
    if graph.schema_name(node) not in _NORMS or len(m.arguments(node)["normalized_shape"]) != 1:
        return None
    return int(m.arguments(node)["normalized_shape"][0])


def _same_for_heads(other: fx.Node, node: fx.Node, along: Along) -> bool:
    """Is an operand the same for every head: of one head's width at most, 1 wherever the heads may be?"""
    sizes, own = m.shape(other), m.shape(node)
    if not sizes:
        return True
    if len(own) != 4 or not isinstance(own[-1], int) or own[-1] > along.width:
        return False
    before = zip(sizes[-2::-1], own[-2::-1], strict=False)
    return all(m.known(size) == 1 or m.known(whole) != len(along.starts) for size, whole in before)


def _over_all(node: fx.Node, along: Along, linear: fx.Node, others: Sequence[fx.Node]) -> list[Along] | None:
    """What a norm, gain or shift over all channels of the projection has for each of them, in the order of the rows."""
    whole = len(along.starts) * along.width
    own: Any = next(n for n in node.all_input_nodes if n not in others)
    numbers = channels.numbered(linear, (-1,))
    assert numbers is not None
    found, _ = channels.flow(linear, numbers)
    while own not in found and _normed(own) == whole:
        own = own.args[0]
    ordered = channels.along(found.get(own), -1) == list(range(whole))
    if not ordered or _normed(node) not in (None, whole) or not (node.target in _SCALES or _normed(node)):
        return None
    parts = [m.skip_casts(other) for other in others]
    if any(part.op != "get_attr" or m.shape(part) != (whole,) or sites.other_user(part, {node}) for part in parts):
        return None
    return [Along(along.of, str(part.target), None, 0, along.starts, along.width) for part in parts]


def _foreign(linear: fx.Node, rows: set[int], path: set[fx.Node], own: set[fx.Node]) -> fx.Node | None:
    """Who but `own` reads the channels `rows` of a linear, there or on their path to the attention."""
    numbers = channels.numbered(linear, (-1,))
    assert numbers is not None  # the projection was found by them
    found, ends = channels.flow(linear, numbers)
    readers = [user for user, at in ends if rows & channels.numbers_in(found[at])]
    readers += [user for node in path - set(found) for user in node.users]
    return next((user for user in readers if user not in own and not sites.reads_size(user)), None)


def _overlap(moved: Iterable[Along]) -> str | None:
    """The weight of which two roles take the same channels."""
    taken: dict[tuple[str, int], set[int]] = {}
    for along in moved:
        own = {start + i for start in along.starts for i in range(along.width)}
        before = taken.setdefault((along.weight, along.axis), set())
        if before & own:
            return along.weight
        before |= own
    return None


def _with_inputs(moved: list[Along], attention: Attention) -> list[Along] | str:
    """With what the attention's other inputs hold for each query head."""
    node = attention.node
    given = [(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"), -3, "mask")]
    if graph.schema_name(node) == "qfx::attention":
        given.append((node.args[4], -1, "sinks"))
    for value, axis, what in given:
        trail: set[fx.Node] = set()
        found = _per_head(value, axis, attention.heads, trail) if isinstance(value, fx.Node) else []
        if isinstance(found, str):
            return f"its {what} differs by head, {found}"
        for source, at in dict.fromkeys(found):
            gets = [n for n in node.graph.nodes if n.op == "get_attr" and n.target == source]
            for user in (user for n in (*trail, *gets) for user in n.users):
                if user not in trail and user is not node and not sites.reads_size(user):
                    return f"its {what} differs by head, by {source}, which %{user.name} reads, too"
            moved.append(Along("query", source, None, at, tuple(range(attention.heads)), 1))
    return moved


def _per_head(value: fx.Node, axis: int, heads: int, trail: set[fx.Node]) -> list[tuple[str, int]] | str:
    """(FQN, axis) of the parameters that hold something for each head along `axis` (negative) of a value.

    Every node with such an axis is put on the trail. A reason where there is one that is computed otherwise.
    """
    sizes = m.shape(value)
    if heads == 1 or len(sizes) < -axis or m.known(sizes[axis]) == 1:
        return []
    trail.add(value)
    if value.op == "get_attr":
        made = str(value.target).startswith("lifted_tensor")
        return "a constant made in the forward" if made else [(str(value.target), len(sizes) + axis)]
    above = _above(value, axis, heads)
    if above is None:
        return f"computed by %{value.name}"
    found: list[tuple[str, int]] = []
    for node, at in above:
        further = _per_head(node, at, heads, trail)
        if isinstance(further, str):
            return further
        found += further
    return found


def _above(value: fx.Node, axis: int, heads: int) -> list[tuple[Any, int]] | None:
    """The values that a call reads, and the axis of each that comes to `axis` of its result; None: not known."""
    if is_call(value, aten.full.default, aten.zeros.default, aten.ones.default):
        return []
    if is_call(value, *_EACH, *m.CASTS, *m.SAME_VALUE):
        return [(n, axis) for n in value.all_input_nodes]
    if channels.moves(value):
        return _axis_before(value, axis, heads)
    if axis == -1 and (is_call(value, aten.embedding.default) or sites.keeps_channels(value)):
        return [(value.args[0], -1)]
    return None


def _axis_before(node: fx.Node, axis: int, heads: int) -> list[tuple[Any, int]] | None:
    """Which axis of its input a call that moves values puts on `axis`."""
    source = node.args[0]
    for at in range(-m.rank(source), 0):
        numbers = channels.numbered(source, (at,)) if isinstance(source, fx.Node) else None
        carried = None if numbers is None else channels.moved(node, numbers)
        if channels.along(carried, axis) == list(range(heads)):
            return [(source, at)]
    return None
