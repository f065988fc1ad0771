"""Whole weights as a start: their bytes are those stored, their losses those of the whole."""

from __future__ import annotations

from typing import Any

import pytest

from qfx import Format
from qfx.allocation import assign, predict
from qfx.allocation.problem import Choice, Problem
from qfx.allocation.solve import solve
from qfx.allocation.whole import joined, told
from qfx.analysis.measured import Measure
from qfx.analysis.score import Options, score_graph
from qfx.analysis.units import Unit
from qfx.analysis.units import units as find_units
from tests.qfx.analysis.models import prepared

U2, U4, WIDE = FORMATS = [Format.parse(text) for text in ("u2/g32/f16", "u4/g32/f16", "u4/g64/f16")]
OUT = [Unit(f"o.o{h}", "o", "o", "l.0", (8, 32), 1, 32 * h, 32 * h + 32, h, "attn") for h in range(4)]
UP = Unit("up", "up", "linear", "l.0", (16, 64))
UNITS = [*OUT, UP]
CANDIDATES = {unit.name: FORMATS for unit in UNITS}


def found(**scores: float) -> tuple[predict.Scores, Problem]:
    """Scores of units by the last letters of their names, and of the whole o: the sum; and the problem of units."""
    each = {u.name: {str(f): scores.get(u.name[-2:], 1.0) * 4.0**-f.bits for f in FORMATS} for u in UNITS}
    each["o"] = {str(f): sum(each[unit.name][str(f)] for unit in OUT) for f in FORMATS}
    choices = predict.choices(UNITS, CANDIDATES, each)
    return each, Problem(choices, layers={unit.name: unit.layer for unit in UNITS})


def whole_of(**scores: float) -> Problem:
    each, problem = found(**scores)
    whole = joined(UNITS, CANDIDATES, each, problem)
    assert whole is not None
    return whole


def test_bytes_are_those_of_the_whole_weight() -> None:
    whole, (_, problem) = whole_of(), found()
    for fmt in FORMATS:  # the last has groups over two heads
        same = dict.fromkeys((unit.name for unit in UNITS), fmt)
        assert whole.value(same)[0] == assign.nbytes(UNITS, same) < problem.value(same)[0]
        assert whole.value(same)[1] == pytest.approx(problem.value(same)[1])


def test_heads_of_a_weight_are_tied() -> None:
    whole = whole_of(o0=1000.0, o1=0.001)
    for budget in (whole.least, whole.least + 200, 2000):
        made = solve(whole, budget).assignment
        assert len({made[unit.name] for unit in OUT}) == 1


def test_groups_wider_than_a_head_are_choices_of_the_whole() -> None:
    whole = whole_of(o0=10.0)
    narrow = {name: [c for c in row if c.format != WIDE] for name, row in whole.choices.items()}
    budget = whole.value({**dict.fromkeys((u.name for u in OUT), WIDE), "up": U2})[0]
    made = solve(whole, budget).assignment
    assert made["o.o0"] == WIDE
    assert solve(whole, budget).score < solve(Problem(narrow, whole.ties), budget).score


def test_without_heads_there_is_no_other_start() -> None:
    each, problem = found()
    assert joined([UP], CANDIDATES, each, Problem({"up": problem.choices["up"]})) is None


def test_what_is_not_known_of_the_whole_is_told_by_its_heads() -> None:
    """Near to what an analysis of whole weights says, also where groups are wider than heads."""
    gm, flat, captured = prepared()
    texts = tuple(f"{bits}/{group}" for bits in ("u2", "u4") for group in ("g16", "g32"))
    settings: dict[str, Any] = {"formats": texts, "measure": 0, "heads": False, "caches": False}
    both, _ = score_graph(gm, flat, Options(**settings, wholes=True), outputs=captured.outputs, progress=False)
    layers, _ = score_graph(gm, flat, Options(**settings, by="layers"), outputs=captured.outputs, progress=False)
    units = find_units(gm)[0]
    candidates = {unit.name: [Format.parse(text) for text in texts] for unit in units}
    heads = {unit.name: both.score()[unit.name] for unit in units}
    scores = told(Measure(gm, flat, units=units).weights, units, candidates, heads)
    for fqn, row in layers.score().items():
        assert both.score()[fqn] == pytest.approx(row), "scored beside the heads"
        for text, value in row.items():
            wide = fqn.endswith("o_proj") and text.endswith("g32")
            assert scores[fqn][text] == pytest.approx(value, rel=0.25 if wide else 1e-4), (fqn, text)
    assert told(Measure(gm, flat, units=units).weights, units, candidates, both.score()) == both.score()


def test_a_choice_needs_a_score_of_the_whole() -> None:
    each, problem = found()
    some = {**each, "o": {str(U4): 1.0}}
    whole = joined(UNITS, CANDIDATES, some, problem)
    assert whole is not None
    assert [choice.format for choice in whole.choices["o.o1"]] == [U4]
    assert whole.choices["o.o0"][0] == Choice("o.o0", U4, U4.nbytes((8, 128)), 1.0)
