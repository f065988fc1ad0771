"""From whole weights to heads of several formats, where that pays.

    q_proj: u3/g64 throughout  ->  q_proj: [u4/g64,u3/g64,u2/g64]        about as many bytes, other heads

Cuts of each weight that take about its bytes are proposed by the scores of its heads. Each is measured alone; those
that together gain most within the budget are chosen, as if gains added up, and each pays a charge: what is chosen out
of many by a measurement looks better there than it is. Several charges give several assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qfx.allocation import assign
from qfx.allocation.problem import Assignment, Choice, Group, Measured, Problem, Tile
from qfx.allocation.solve import price, relaxed, solve
from qfx.analysis.units import Unit, by_weight

_SHARES = (0.85, 0.92, 0.96, 1.0, 1.04, 1.08, 1.15)  # of the bytes that a weight has
_CHARGES = (0.0, 1e-3, 3e-3)  # of the loss, for each weight that is cut


@dataclass(frozen=True)
class Cut:
    """A weight with other formats. units: formats by unit. bytes: more than before. gain: predicted, then measured."""

    fqn: str
    units: Assignment
    bytes: int
    gain: float


def split(
    measure: Measured, units: Sequence[Unit], problem: Problem, whole: Problem, start: Assignment, budget: int, *,
    evaluations: int, advance: Callable[[], None] = lambda: None,
) -> list[Assignment]:  # fmt: skip
    """Assignments within the budget and the constraints of `problem`, in which some weights of `start` are cut.

    problem: of heads; whole: of whole weights, as `start` is. evaluations: how many cuts may be measured, those first
    that the scores expect to gain most at the price that a byte has. advance: called after each.
    """
    cost = price(whole, budget)
    found = sorted(cuts(units, problem, whole, start), key=lambda cut: cost * cut.bytes - cut.gain)[:evaluations]
    if not found:
        return []
    order = {fqn: number for number, fqn in enumerate(by_weight(units))}
    loss = measure.kld(start)
    measure.anchor(start)
    measured = []
    for cut in sorted(found, key=lambda cut: -order[cut.fqn]):  # late layers first: they run from there on
        measured.append(Cut(cut.fqn, cut.units, cut.bytes, loss - measure.kld(start | cut.units)))
        advance()
    left = budget - assign.nbytes(units, start)
    sets = [chosen(measured, left, charge * loss) for charge in _CHARGES]
    made = [joined(start, own) for own in sets if own]
    return [a for i, a in enumerate(made) if a not in made[:i] and not problem.violations(a)]


def joined(start: Assignment, found: Sequence[Cut]) -> Assignment:
    """`start` with these cuts."""
    return start | {name: fmt for cut in found for name, fmt in cut.units.items()}


def cuts(units: Sequence[Unit], problem: Problem, whole: Problem, start: Assignment) -> list[Cut]:
    """Each weight's best formats of its heads at several sizes, with the gain that scores predict."""
    found = []
    for fqn, own in by_weight(units).items():
        part = _part(own, problem, start)
        if part is None:
            continue
        before = {unit.name: start[unit.name] for unit in own}
        size = assign.nbytes(own, before)
        score = Problem({name: whole.choices[name] for name in before}).value(before)[1]
        seen: list[Assignment] = []
        for share in _SHARES:
            budget = int(share * size)
            try:
                made = assign.fill(own, part, solve(part, budget, seconds=1).assignment, budget)
            except ValueError:  # below what its heads take at least
                continue
            if len(set(made.values())) > 1 and made not in seen:
                seen.append(made)
                found.append(Cut(fqn, made, assign.nbytes(own, made) - size, score - part.value(made)[1]))
    return found


def _part(own: Sequence[Unit], problem: Problem, start: Assignment) -> Problem | None:
    """The problem of one weight's units; None where it is not cut, or tied to another weight.

    Where a layer has a limited number of bits, with those that it has.
    """
    names = {unit.name for unit in own}
    ties = [tie for tie in problem.ties if names & set(tie)]
    if len(own) < 2 or any(not names.issuperset(tie) for tie in ties):
        return None
    choices: Mapping[str, Sequence[Choice]] = {unit.name: problem.choices[unit.name] for unit in own}
    if problem.classes is not None:
        layer = problem.layers.get(own[0].name, "")
        bits = {start[name].bits for name in problem.choices if layer and problem.layers.get(name) == layer}
        choices = {name: [c for c in row if not layer or c.format.bits in bits] for name, row in choices.items()}
    tiles: list[Tile] = [tile for tile in problem.tiles if names & set(tile.units)]
    return Problem(choices, ties, tiles=tiles)


def chosen(measured: Sequence[Cut], left: int, charge: float) -> list[Cut]:
    """At most one cut of each weight: those of the largest sum of gains less charges that take `left` bytes more."""
    of: dict[str, list[Cut]] = {}
    for cut in measured:
        of.setdefault(cut.fqn, []).append(cut)
    least = {fqn: min(0, *(cut.bytes for cut in own)) for fqn, own in of.items()}
    groups = [
        Group(
            (fqn,), (), np.array([0, *(cut.bytes for cut in own)]) - least[fqn],
            np.array([0.0, *(charge - cut.gain for cut in own)]),
        )
        for fqn, own in of.items()
    ]  # fmt: skip
    picked = relaxed(groups, left - sum(least.values()))[0]
    return [own[at - 1] for own, at in zip(of.values(), picked, strict=True) if at]
