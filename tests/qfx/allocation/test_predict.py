from __future__ import annotations

import pytest
import torch

from qfx import Format
from qfx.allocation import predict
from qfx.analysis.measured import Measure
from qfx.analysis.units import Unit
from tests.qfx.analysis.models import prepared

U2, U3, U4, I8 = FORMATS = [Format.parse(text) for text in ("u2/g16", "u3/g16", "u4/g16", "i8/ch")]


def measure() -> Measure:
    gm, flat, found = prepared()
    return Measure(gm, flat, outputs=found.outputs)


def test_one_measurement_of_each_unit_tells_all_its_formats() -> None:
    """Quadratic in the error: what is predicted is near to what is measured where few bits are not too few."""
    own, done = measure(), []
    candidates = {unit.name: FORMATS for unit in own.units}
    scores = predict.measured(own, candidates, U3, lambda: done.append(1))
    assert own.evaluations == len(own.units) == len(done)
    assert list(scores) == [unit.name for unit in reversed(own.units)]
    for unit in own.units:
        assert scores[unit.name][str(U3)] == pytest.approx(own.single(unit, U3), rel=1e-6)
        ratio = scores[unit.name][str(I8)] / own.single(unit, I8)
        assert 0.3 < ratio < 3, unit.name
        assert scores[unit.name][str(U2)] > scores[unit.name][str(U3)] > scores[unit.name][str(U4)]


def test_a_probe_need_not_be_a_candidate() -> None:
    own = measure()
    scores = predict.measured(own, {unit.name: [U4] for unit in own.units}, U2, lambda: None)
    assert all(list(row) == [str(U4)] and row[str(U4)] > 0 for row in scores.values())


def test_errors_of_a_large_unit_are_told_from_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    own = measure()
    unit = max(own.units, key=lambda unit: unit.elements)
    whole = predict.errors(own.weights, unit, FORMATS)
    weight, rounded = own.weights.part(unit, U4)
    assert whole[U4] == pytest.approx(float((weight - rounded).square().mean()), rel=1e-5)
    monkeypatch.setattr(predict, "_ELEMENTS", unit.elements // 4)
    part = predict.errors(own.weights, unit, FORMATS)
    assert part != whole
    assert all(part[fmt] == pytest.approx(whole[fmt], rel=0.5) for fmt in FORMATS)


def test_a_weight_without_error_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    own = measure()
    unit = own.units[0]
    monkeypatch.setattr(own.weights, "part", lambda *_: (torch.zeros(4, 32), torch.zeros(4, 32)))
    monkeypatch.setattr(own, "units", [unit])
    found = predict.measured(own, {unit.name: FORMATS}, U3, lambda: None)
    assert found == {unit.name: dict.fromkeys(map(str, FORMATS), 0.0)}
    assert own.evaluations == 0


def test_choices_have_bytes_and_scores() -> None:
    unit = Unit("fc", "fc", "linear", "", (4, 32))
    (first, second) = predict.choices([unit], {"fc": [U2, U4]}, {"fc": {"u2/g16": 3.0, "u4/g16": 1.0, "i8": 0.0}})["fc"]
    assert (first.format, first.bytes, first.score) == (U2, U2.nbytes((4, 32)), 3.0)
    assert (second.format, second.bytes, second.score) == (U4, U4.nbytes((4, 32)), 1.0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, r"no score of 'fc'\n[\s\S]*found: none of the unit"),
        ({"fc": {"u2/g16": 1.0}}, r"no score of 'fc' in u4/g16\n[\s\S]*found: u2/g16"),
    ],
)
def test_scores_that_are_missing_are_refused(scores: dict[str, dict[str, float]], message: str) -> None:
    unit = Unit("fc", "fc", "linear", "", (4, 32))
    with pytest.raises(ValueError, match=message):
        predict.choices([unit], {"fc": [U2, U4]}, scores)
