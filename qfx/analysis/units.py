"""Units: the parts of a model that each get one format.

    %linear: f32[2,9,64] = aten.linear(%x, @layers.0.attn.q.weight)       heads of 16, two of them
    ->
    layers.0.attn.q.h0   Q rows [0, 16)        layers.0.attn.q.h1   Q rows [16, 32)

With units="heads": K and V rows of a KV head, Q rows and O columns of a query head, each linear that no attention cuts,
each table. units="layers": each weight is one unit. A weight that several calls read is a unit once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import fx

from qfx import graph
from qfx.analysis.attentions import Attention, Projection, find, projections
from qfx.errors import Note
from qfx.format import Format
from qfx.passes.annotate import kind_of
from qfx.rounding.blocks import layer_of

KINDS = ("q", "k", "v", "o", "linear", "embedding", "lm_head", "experts")


@dataclass(frozen=True)
class Unit:
    """Part of one weight [.., N, K] that has one format.

    name: unique. fqn: the weight, as plans name it. kind: one of KINDS. layer: the outermost `name.<index>`, "" beside
    the layers. axis: 0 where it is rows [start, stop) of N, 1 for columns of K, None for the whole weight. shape: of
    the part. head: of the role's heads in the attention `attention`, None for the whole.
    """

    name: str
    fqn: str
    kind: str
    layer: str
    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0
    stop: int = 0
    head: int | None = None
    attention: str | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def nbytes(self, fmt: Format) -> int:
        """Bytes in storage as a weight of its own: codes, scales and zero points, padding included."""
        return fmt.nbytes(self.shape)


def units(
    gm: fx.GraphModule, *, by: Literal["heads", "layers"] = "heads", skip: Iterable[str] = ()
) -> tuple[list[Unit], list[Attention], list[Note]]:
    """Every weight of a prepared graph, cut by heads where an attention tells them, in the order of first use.

    skip: names of weights that have no unit. Returns also the attentions, and notes about heads that cannot be told or
    cannot be cut into equal parts: their linears are whole.
    """
    attentions, notes = find(gm)
    left = set(skip)
    cut: dict[str, list[tuple[str, Projection, str]]] = {}
    for attention in attentions if by == "heads" else ():
        for role, projection in projections(attention):
            if projection.cuts:
                cut.setdefault(projection.fqn, []).append((role, projection, attention.name))
            else:
                reason = f"the {projection.size} channels do not fall into equal parts of {projection.width}"
                notes.append(Note(projection.fqn, f"it has one format for all heads: {reason}", "nothing", minor=True))
    found: dict[object, list[Unit]] = {}
    for node in gm.graph.nodes:
        kind, weight = kind_of(node), graph.weight_of(node)
        if kind in (None, "attention", "conv") or weight is None or graph.fqn_of(node) in left:
            continue
        held = weight.target
        if held not in found:
            found[held] = _of(node, str(kind), cut.get(graph.fqn_of(node), ()))
    return [unit for each in found.values() for unit in each], attentions, notes


def by_weight(units: Iterable[Unit]) -> dict[str, list[Unit]]:
    """FQN of a weight -> its units, in order."""
    found: dict[str, list[Unit]] = {}
    for unit in units:
        found.setdefault(unit.fqn, []).append(unit)
    return found


def wholes(units: Iterable[Unit]) -> list[Unit]:
    """The whole of each weight that is cut, as one unit that has the weight's name."""
    return [
        Unit(fqn, fqn, "linear", own[0].layer, shape_of(own))
        for fqn, own in by_weight(units).items()
        if own[0].axis is not None
    ]


def shape_of(own: Sequence[Unit]) -> tuple[int, ...]:
    """The shape of the whole weight of which these are the units."""
    axis = own[0].axis
    size = 0 if axis is None else sum(unit.shape[axis] for unit in own)
    return tuple(size if i == axis else n for i, n in enumerate(own[0].shape))


def _of(node: fx.Node, kind: str, cuts: Iterable[tuple[str, Projection, str]]) -> list[Unit]:
    fqn, layer = graph.fqn_of(node), layer_of(node)
    operand = node.args[0 if kind == "embedding" else 1]
    shape = tuple(int(size) for size in graph.val(operand).shape)
    made: dict[int, Unit] = {}
    for role, projection, attention in cuts:
        axis = 1 if role == "o" else 0
        part = (projection.width, shape[1]) if axis == 0 else (shape[0], projection.width)
        for start in projection.starts:
            if start not in made:  # heads of k and v that several query heads read
                number = len([u for u in made.values() if u.kind == role])
                made[start] = Unit(
                    f"{fqn}.{role}{number}", fqn, role, layer, part, axis, start, start + projection.width,
                    number, attention,
                )  # fmt: skip
    if made and sum(unit.stop - unit.start for unit in made.values()) == shape[made[min(made)].axis or 0]:
        return [made[start] for start in sorted(made)]
    whole = "lm_head" if kind == "linear" and not layer and _is_last(node) else kind
    return [Unit(fqn, fqn, whole, layer, shape)]


def _is_last(node: fx.Node) -> bool:
    """A linear behind which no other weight comes."""
    todo, seen = list(node.users), set()
    while todo:
        at = todo.pop()
        if at in seen:
            continue
        seen.add(at)
        if graph.weight_of(at) is not None and kind_of(at) is not None:
            return False
        todo += at.users
    return True
