from __future__ import annotations

from typing import Any

import pytest

from qfx import Format
from qfx.allocation.problem import Assignment, Choice, Problem
from qfx.allocation.refine import refine
from qfx.allocation.solve import solve

FORMATS = [Format.parse(text) for text in ("u2/g16", "u4/g16", "i8/ch")]
U2 = FORMATS[0]
TRUE = {name: 8.0**i for i, name in enumerate("abcdef")}
WRONG = dict(zip(TRUE, reversed(TRUE.values()), strict=True))


class Fake:
    """Stands for a Measure: the loss of each unit, and of two that are worse together."""

    def __init__(self, weights: dict[str, float] = TRUE, pair: float = 0.0) -> None:
        self.weights, self.pair, self.anchors, self.seen = weights, pair, 0, list[Assignment]()

    def anchor(self, assignment: Assignment) -> None:
        self.anchors += 1

    def kld(self, assignment: Assignment) -> float:
        self.seen.append(dict(assignment))
        total = sum(self.weights[name] * 4.0**-fmt.bits for name, fmt in assignment.items())
        return total + self.pair * (assignment["e"] == assignment["f"] == U2)


def problem(weights: dict[str, float], **constraints: Any) -> Problem:
    """What is predicted by these weights."""
    return Problem(
        {n: [Choice(n, f, 8 * f.bits, w * 4.0**-f.bits) for f in FORMATS] for n, w in weights.items()}, **constraints
    )


def run(measure: Fake, found: Problem, budget: int, evaluations: int) -> Any:
    start = solve(found, budget).assignment
    return refine(measure, found, start, budget, evaluations=evaluations)  # type: ignore[arg-type]


def test_wrong_scores_are_made_good() -> None:
    """Predicted the other way round: measuring finds the optimum of what is true."""
    budget = 6 * 8 * 4
    measure = Fake()
    found = run(measure, problem(WRONG), budget, 60)
    best = solve(problem(TRUE), budget)
    assert found.after == pytest.approx(best.score)
    assert found.after < 0.2 * found.before
    assert problem(TRUE).value(found.assignment)[0] <= budget
    assert found.evaluations == len(measure.seen) <= 60


def test_errors_that_add_up_are_found() -> None:
    """Two weights that lose little alone, and much together."""
    measure = Fake(WRONG, pair=500.0)
    found = run(measure, problem(WRONG), 6 * 8 * 4, 60)
    assert found.after < found.before
    start = measure.seen[0]
    assert start["e"] == start["f"] == U2, "as the scores say"
    assert U2 not in (found.assignment["e"], found.assignment["f"]) or found.assignment["e"] != found.assignment["f"]


def test_it_never_gets_worse_and_is_the_same_each_time() -> None:
    for evaluations in (1, 3, 12, 40):
        first, second = (run(Fake(), problem(TRUE), 150, evaluations) for _ in range(2))
        assert first == second
        assert first.after <= first.before
        assert first.evaluations <= evaluations


def test_without_evaluations_nothing_is_measured() -> None:
    measure = Fake()
    found = run(measure, problem(TRUE), 150, 0)
    assert (found.before, found.after, found.evaluations, measure.seen) == (None, None, 0, [])
    assert found.assignment == solve(problem(TRUE), 150).assignment


def test_constraints_are_kept() -> None:
    own = problem(WRONG, ties=(("a", "b"),), classes=2, layers=dict.fromkeys(TRUE, "layers.0"))
    measure = Fake()
    found = run(measure, own, 6 * 8 * 4, 60)
    assert found.after < found.before
    assert own.violations(found.assignment) == []
    assert all(seen["a"] == seen["b"] for seen in measure.seen)


def test_each_evaluation_is_told() -> None:
    told: list[int] = []
    found = problem(TRUE)
    start = solve(found, 150).assignment
    done = refine(Fake(), found, start, 150, evaluations=30, advance=lambda: told.append(1))  # type: ignore[arg-type]
    assert len(told) == done.evaluations
