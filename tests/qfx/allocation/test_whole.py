"""Whole weights as a start: their bytes are those stored, and the better of the two by measurement is taken."""

from __future__ import annotations

from typing import Any

import pytest

from qfx import Format
from qfx.allocation import assign
from qfx.allocation.problem import Choice, Problem
from qfx.allocation.solve import solve
from qfx.allocation.whole import better, joined
from qfx.analysis.units import Unit

U2, U4, WIDE = FORMATS = [Format.parse(text) for text in ("u2/g32/f16", "u4/g32/f16", "u4/g64/f16")]
OUT = [Unit(f"o.o{h}", "o", "o", "l.0", (8, 32), 1, 32 * h, 32 * h + 32, h, "attn") for h in range(3)]
UP = Unit("up", "up", "linear", "l.0", (16, 64))
UNITS = [*OUT, UP]


def choices(**scores: float) -> dict[str, list[Choice]]:
    return {
        u.name: [Choice(u.name, f, u.nbytes(f), scores.get(u.name[-2:], 1.0) * 4.0**-f.bits) for f in FORMATS]
        for u in UNITS
    }


def found(**scores: float) -> tuple[dict[str, list[Choice]], Problem]:
    own = choices(**scores)
    return own, Problem(own, layers={unit.name: unit.layer for unit in UNITS})


class Fake:
    """Stands for a Measure that loses `apart` where heads differ, and `together` where they are alike."""

    def __init__(self, apart: float, together: float) -> None:
        self.apart, self.together, self.count = apart, together, 0

    def kld(self, assignment: dict[str, Format]) -> float:
        self.count += 1
        return self.together if len({assignment[unit.name] for unit in OUT}) == 1 else self.apart


def test_bytes_are_those_of_the_whole_weight() -> None:
    own, problem = found()
    whole = joined(UNITS, own, problem)
    assert whole is not None
    for fmt in (U2, U4):
        same = dict.fromkeys((unit.name for unit in UNITS), fmt)
        assert whole.value(same)[0] == assign.nbytes(UNITS, same) < problem.value(same)[0]
        assert whole.value(same)[1] == pytest.approx(problem.value(same)[1])


def test_heads_of_a_weight_are_tied() -> None:
    own, problem = found(o0=1000.0, o1=0.001)
    whole = joined(UNITS, own, problem)
    assert whole is not None
    for budget in (200, 400, 600, 2000):
        made = solve(whole, max(budget, assign.nbytes(UNITS, dict.fromkeys((u.name for u in UNITS), U2)))).assignment
        assert len({made[unit.name] for unit in OUT}) == 1


def test_groups_wider_than_a_head_are_for_weights_without_heads() -> None:
    own, problem = found()
    whole = joined(UNITS, own, problem)
    assert whole is not None
    assert {choice.format for choice in whole.choices["o.o0"]} == {U2, U4}
    assert {choice.format for choice in whole.choices["up"]} == set(FORMATS)


def test_without_heads_or_formats_there_is_no_other_start() -> None:
    own, problem = found()
    assert joined([UP], {"up": own["up"]}, Problem({"up": own["up"]})) is None
    wide = {name: [c for c in row if c.format == WIDE] for name, row in own.items()}
    assert joined(UNITS, wide, problem) is None


@pytest.mark.parametrize(("apart", "together"), [(1.0, 0.5), (0.5, 1.0)])
def test_the_better_is_taken(apart: float, together: float) -> None:
    own, problem = found(o0=1000.0, o1=0.001, o2=0.001)
    budget = assign.nbytes(UNITS, {**dict.fromkeys((u.name for u in UNITS), U2), "o.o0": U4}) + 8
    solution = solve(problem, budget)
    assert len({solution.assignment[unit.name] for unit in OUT}) == 2, "heads differ"
    measure: Any = Fake(apart, together)
    other, chosen = better(measure, UNITS, own, problem, solution, budget, seconds=1)
    assert measure.count == 2
    assert (other is not problem) == (together < apart)
    assert measure.kld(chosen.assignment) == min(apart, together)
    assert assign.nbytes(UNITS, chosen.assignment) <= budget
