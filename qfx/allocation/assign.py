"""An assignment of formats to units, as annotations of weights: what it stores, and writing it on a graph.

{"q_proj.q0": u4/g32/f16, "q_proj.q1": u4/g32/f16, "q_proj.q2": u3/g32/f16}
->
%linear: f32[2,9,96] = aten.linear(%x, @q_proj.weight)  # w=[u4/g32/f16,u4/g32/f16,u3/g32/f16]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from qfx import annotation, graph
from qfx.allocation.problem import Assignment, Problem
from qfx.analysis.units import Unit, by_weight, shape_of
from qfx.analysis.weights import formats_of as formats_of_weight
from qfx.annotation import Formats
from qfx.format import Format
from qfx.live import segments
from qfx.plan import Plan


def formats_of(units: Iterable[Unit], assignment: Mapping[str, Format]) -> dict[str, Formats]:
    """FQN -> the formats of its units as an annotation says them: one where all are equal."""
    found: dict[str, Formats] = {}
    for fqn, own in by_weight(units).items():
        each = tuple(assignment[unit.name] for unit in own)
        found[fqn] = each[0] if len(set(each)) == 1 else formats_of_weight(own, each)
    return found


def nbytes(units: Iterable[Unit], assignment: Mapping[str, Format]) -> int:
    """Bytes that the weights of the units take in storage; never more than their units take apart."""
    own = by_weight(units)
    found = formats_of([unit for each in own.values() for unit in each], assignment)
    return sum(segments.nbytes(formats, shape_of(own[fqn]), fqn) for fqn, formats in found.items())


def write(
    plan: Plan, formats: Mapping[str, Formats], readers: Mapping[str, Mapping[fx.Node, Sequence[fx.Node]]]
) -> None:
    """Annotate every call that reads the weights, on the graph and in the plan. readers: as of `Weights`."""
    for fqn, own in formats.items():
        for node in (node for nodes in readers[fqn].values() for node in nodes):
            annotation.set(node, "w", own)
            plan.annotations.setdefault(graph.fqn_of(node), {})["w"] = annotation.to_json(own)


def fill(units: Sequence[Unit], problem: Problem, assignment: Assignment, budget: int) -> Assignment:
    """Spend what is left of the budget: neighbours of one format share padding, so that units take less than apart.

    Takes single changes, the most score per byte first, while true bytes and constraints allow.
    """
    chosen, own = dict(assignment), by_weight(units)
    fqns = {unit.name: unit.fqn for unit in units}

    def size(fqn: str, formats: Mapping[str, Format]) -> int:
        return nbytes(own[fqn], formats)

    left = budget - sum(size(fqn, chosen) for fqn in own)
    changes = [
        ((group.score[at] - score) / max(1, count - group.bytes[at]), number, fmt)
        for number, group in enumerate(problem.groups)
        for at in [group.formats.index(chosen[group.units[0]])]
        for fmt, score, count in zip(group.formats, group.score, group.bytes, strict=True)
        if score < group.score[at] and count > group.bytes[at]
    ]
    changed: set[int] = set()
    for _, number, fmt in sorted(changes, key=lambda change: (-change[0], change[1])):
        names = problem.groups[number].units
        tried = chosen | dict.fromkeys(names, fmt)
        touched = dict.fromkeys(fqns[name] for name in names)
        more = sum(size(fqn, tried) - size(fqn, chosen) for fqn in touched)
        if number not in changed and more <= left and not problem.violations(tried):
            chosen, left = tried, left - more
            changed.add(number)
    return chosen
