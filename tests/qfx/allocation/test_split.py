"""Cuts by heads: proposed by scores, measured, chosen together within the budget."""

from __future__ import annotations

from typing import Any

import pytest

from qfx import Format
from qfx.allocation import assign
from qfx.allocation.problem import Assignment, Choice, Problem, Tile
from qfx.allocation.split import Cut, chosen, cuts, split
from qfx.allocation.whole import joined
from qfx.analysis.units import Unit, by_weight

U2, U3, U4 = FORMATS = [Format.parse(text) for text in ("u2/g32/f16", "u3/g32/f16", "u4/g32/f16")]
HEADS = 4


def rows(fqn: str) -> list[Unit]:
    return [Unit(f"{fqn}.q{h}", fqn, "q", "l.0", (8, 64), 0, 8 * h, 8 * h + 8, h, "attn") for h in range(HEADS)]


UNITS = [*rows("a"), *rows("b"), Unit("up", "up", "linear", "l.0", (16, 64))]
START = {unit.name: U3 for unit in UNITS}
SIZE = assign.nbytes(UNITS, START)


def weights(**own: float) -> dict[str, float]:
    return {unit.name: own.get(unit.name.replace(".", "_"), 1.0) for unit in UNITS}


def loss(own: dict[str, float], assignment: Assignment) -> float:
    return sum(value * 4.0 ** -assignment[name].bits for name, value in own.items())


class Fake:
    """Stands for a Measure: the sum of the losses of units."""

    def __init__(self, own: dict[str, float]) -> None:
        self.own, self.anchors, self.seen = own, list[Assignment](), list[Assignment]()

    def anchor(self, assignment: Assignment) -> None:
        self.anchors.append(assignment)

    def kld(self, assignment: Assignment) -> float:
        self.seen.append(assignment)
        return loss(self.own, assignment)


def problems(own: dict[str, float], **constraints: Any) -> tuple[Problem, Problem]:
    """(of heads, of whole weights)"""
    choices = {u.name: [Choice(u.name, f, u.nbytes(f), own[u.name] * 4.0**-f.bits) for f in FORMATS] for u in UNITS}
    heads = Problem(choices, **constraints)
    scores = {u.name: {str(c.format): c.score for c in choices[u.name]} for u in UNITS}
    for fqn, units in by_weight(UNITS).items():
        scores[fqn] = {str(f): sum(scores[u.name][str(f)] for u in units) for f in FORMATS}
    whole = joined(UNITS, {u.name: FORMATS for u in UNITS}, scores, heads)
    assert whole is not None
    return heads, whole


def run(true: dict[str, float], predicted: dict[str, float], evaluations: int = 50, **constraints: Any) -> Any:
    measure: Any = Fake(true)
    heads, whole = problems(predicted, **constraints)
    return split(measure, UNITS, heads, whole, START, SIZE, evaluations=evaluations), measure


UNEVEN = weights(a_q0=100.0, a_q1=0.01, b_q2=100.0, b_q0=0.01)


def test_unlike_heads_get_unlike_formats_in_the_same_bytes() -> None:
    found, measure = run(UNEVEN, UNEVEN)
    best = min(found, key=lambda a: loss(UNEVEN, a))
    assert best["a.q0"] == best["b.q2"] == U4 and best["a.q1"] == best["b.q0"] == U2
    assert loss(UNEVEN, best) < 0.5 * loss(UNEVEN, START)
    assert measure.anchors == [START]
    assert all(assign.nbytes(UNITS, made) <= SIZE for made in found)


def test_what_measures_worse_than_predicted_is_not_chosen() -> None:
    found, _ = run(weights(), UNEVEN)
    assert found == [], "heads are alike: each cut loses"


def test_a_charge_keeps_what_gains_next_to_nothing() -> None:
    small, large = Cut("a", {"a.q0": U4}, 8, 1e-3), Cut("b", {"b.q0": U4}, 8, 1e-2)
    worse = Cut("b", {"b.q0": U2}, -8, -2e-3)
    assert chosen([small, large, worse], 16, 0.0) == [small, large]
    assert chosen([small, large, worse], 16, 2e-3) == [large]
    assert chosen([small, large, worse], 16, 2e-2) == []
    assert chosen([small, large, worse], 8, 0.0) == [large], "no bytes for both"
    assert chosen([small, worse], 0, 0.0) == [], "what pays for the bytes costs more"


def test_bytes_go_from_one_weight_to_another() -> None:
    """All heads of `a` matter more than those of `b`: what cuts of `b` save pays for those of `a`."""
    own = weights(**{f"a_q{h}": 30.0 + h for h in range(HEADS)}, **{f"b_q{h}": 0.1 + 0.01 * h for h in range(HEADS)})
    found, _ = run(own, own)
    sizes = [sum(u.nbytes(made[u.name]) for u in rows(fqn)) for made in found[:1] for fqn in "ab"]
    assert sizes[0] > sum(u.nbytes(U3) for u in rows("a")) > sizes[1]


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_no_more_is_measured_than_asked(evaluations: int) -> None:
    found, measure = run(UNEVEN, UNEVEN, evaluations)
    assert len(measure.seen) == (1 + evaluations if evaluations else 0)
    assert bool(found) == bool(evaluations), "those that promise most come first"


def test_weights_that_are_tied_to_others_stay_whole() -> None:
    tied = [tuple(u.name for u in UNITS[: 2 * HEADS])]
    heads, whole = problems(UNEVEN, ties=tied)
    assert cuts(UNITS, heads, whole, START) == []
    own = [(f"a.q{h}", f"a.q{h + 1}") for h in (0, 2)]
    heads, whole = problems(UNEVEN, ties=own)
    found = [cut for cut in cuts(UNITS, heads, whole, START) if cut.fqn == "a"]
    assert found and all(cut.units["a.q0"] == cut.units["a.q1"] for cut in found)


def test_classes_and_tiles_are_kept() -> None:
    layers = {unit.name: unit.layer for unit in UNITS}
    start = {**START, "up": U4}
    heads, whole = problems(UNEVEN, classes=2, layers=layers)
    found = cuts(UNITS, heads, whole, start)
    assert found and all(fmt in (U3, U4) for cut in found for fmt in cut.units.values())
    heads, whole = problems(UNEVEN, tiles=[Tile(tuple(u.name for u in rows("a")), 2)])
    found = [cut for cut in cuts(UNITS, heads, whole, START) if cut.fqn == "a"]
    assert found and all(list(cut.units.values()).count(U3) % 2 == 0 for cut in found)


def test_bytes_of_a_cut_are_those_stored() -> None:
    heads, whole = problems(UNEVEN)
    for cut in cuts(UNITS, heads, whole, START):
        assert cut.bytes == assign.nbytes(UNITS, START | cut.units) - SIZE
        assert cut.gain == pytest.approx(loss(UNEVEN, START) - loss(UNEVEN, START | cut.units))
