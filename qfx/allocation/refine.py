"""Improve an assignment by measuring the whole model.

Predicted losses of units do not add up where few bits are left, and errors of several units may cancel. So: measure
single changes of the current assignment (those first that the scores expect to pay), choose those changes that
together gain most within the budget, as if gains added up, and measure them; a charge for each change, raised until the
measured loss falls, keeps to so few that this is nearly so. Nothing is drawn by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qfx.allocation.problem import Assignment, Choice, Group, Measured, Problem
from qfx.allocation.solve import price, solve
from qfx.format import Format

_TRIES = 5  # charges in a round
_EACH = 4  # changes of one unit that are measured in a round
_FIRST_CHARGE = 1e-3  # of the loss, where no charge was too much
_GAIN = 1e-3  # a round that gains less is the last


@dataclass(frozen=True)
class Refined:
    """assignment. before, after: measured loss, None where nothing was measured. evaluations: how many were."""

    assignment: Assignment
    before: float | None
    after: float | None
    evaluations: int


def refine(
    measure: Measured, problem: Problem, start: Assignment, budget: int, *, evaluations: int,
    advance: Callable[[], None] = lambda: None,
) -> Refined:  # fmt: skip
    """Change `start` within the budget and the constraints of `problem`; what is measured never gets worse.

    evaluations: how many assignments may be measured, `start` included. advance: called after each.
    """
    search = _Search(measure, problem, budget, evaluations, advance)
    if evaluations < 1:
        return Refined(dict(start), None, None, 0)
    current, best = dict(start), search.loss(start)
    before = best
    rounds = 2 if evaluations < 4 * len(problem.groups) else 3
    for number in range(rounds, 0, -1):
        share = search.left // number - _TRIES
        if share <= 0:
            break
        found = search.improved(current, best, share)
        if found is None:
            break
        gained = 1 - found[1] / best
        current, best = found
        if gained < _GAIN:
            break
    return Refined(current, before, best, evaluations - search.left)


class _Search:
    def __init__(
        self, measure: Measured, problem: Problem, budget: int, evaluations: int, advance: Callable[[], None]
    ) -> None:
        self.measure, self.problem, self.budget = measure, problem, budget
        self.left, self.advance = evaluations, advance

    def loss(self, assignment: Assignment) -> float:
        self.left -= 1
        found = self.measure.kld(assignment)
        self.advance()
        return found

    def improved(self, current: Assignment, loss: float, count: int) -> tuple[Assignment, float] | None:
        """A better assignment and its loss, after `count` single changes were measured; None where none was found."""
        self.measure.anchor(current)
        groups = {group.units[0]: group for group in self.problem.groups}
        gains: dict[str, dict[Format, float]] = {name: {current[name]: 0.0} for name in groups}
        for name, fmt in self._changes(current, count):
            gains[name][fmt] = self.loss(current | dict.fromkeys(groups[name].units, fmt)) - loss
        charge = 0.0
        for _ in range(min(_TRIES, self.left)):
            tried = solve(self._of(groups, gains, current, charge), self.budget, exact=False).assignment
            if tried == current:
                return None
            found = self.loss(tried)
            if found < loss:
                return tried, found
            charge = max(3 * charge, _FIRST_CHARGE * loss)
        return None

    def _changes(self, current: Assignment, count: int) -> list[tuple[str, Format]]:
        """Changes of a group's format, those first that cost the least at the price that a byte has; late layers
        first among those that are chosen, which are measured soonest."""
        dear = price(self.problem, self.budget)
        found: list[tuple[float, int, Format]] = []
        groups = self.problem.groups
        for number, group in enumerate(groups):
            at = group.formats.index(current[group.units[0]])
            cost = (group.score - group.score[at]) + dear * (group.bytes - group.bytes[at])
            order = [i for i in cost.argsort(kind="stable") if i != at][:_EACH]
            found += [(float(cost[i]), number, group.formats[i]) for i in order]
        found.sort(key=lambda change: change[:2])
        chosen = sorted(found[:count], key=lambda change: -change[1])
        return [(groups[number].units[0], fmt) for _, number, fmt in chosen]

    def _of(
        self, groups: dict[str, Group], gains: dict[str, dict[Format, float]], current: Assignment, charge: float
    ) -> Problem:
        """The problem of choosing among measured changes: their gains are the score of a group's first unit."""
        choices = {}
        for name, group in groups.items():
            for unit in group.units:
                size = {choice.format: choice.bytes for choice in self.problem.choices[unit]}
                choices[unit] = [
                    Choice(
                        unit,
                        fmt,
                        size[fmt],
                        (gain + charge * (fmt != current[name])) if unit == name else 0.0,
                    )
                    for fmt, gain in gains[name].items()
                ]
        whole = self.problem
        ties = [group.units for group in groups.values() if len(group.units) > 1]
        return Problem(choices, ties, whole.classes, whole.layers, whole.tiles)
