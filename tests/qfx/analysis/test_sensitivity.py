from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qfx import Sensitivity
from qfx.analysis.head_types import Head
from qfx.analysis.units import Unit

TEXTS = ("u2/g32", "u3/g32", "u4/g32", "u4/g64", "i8/ch")


def units(count: int = 4) -> tuple[Unit, ...]:
    cut = [Unit(f"a.q{i}", "a", "q", "layers.0", (8, 16), 0, 8 * i, 8 * i + 8, i, "att") for i in range(count)]
    return (*cut, Unit("up", "up", "linear", "layers.0", (16, 16)), Unit("c.cache_k0", "c", "cache_k", "", (8,)))


def made(**fields: Any) -> Sensitivity:
    scores = {u.name: {t: (i + 1.0) * 4.0**-n for n, t in enumerate(TEXTS)} for i, u in enumerate(units())}
    return Sensitivity(
        units=units(), formats=TEXTS, scores={"quant-fisher": scores},
        heads=(Head("att", "layers.0", 0, 0, "mixed", 0.5),), provenance={"model": "M"}, notes=("q: a note",), **fields,
    )  # fmt: skip


def test_without_measurements_scores_are_what_there_is() -> None:
    found = made()
    assert found.methods == ("quant-fisher",)
    assert found.calibrated() == found.score() == found.score("quant-fisher")


def test_measurements_bring_a_kind_and_its_bits_to_scale() -> None:
    """Twice as much at 2 bits, half at 4: between them as much, beyond as at the nearest; other kinds by all."""
    score = made().score()
    measured = {
        f"a.q{i}": {"u2/g32": 2 * score[f"a.q{i}"]["u2/g32"], "u4/g32": score[f"a.q{i}"]["u4/g32"] / 2} for i in (0, 1)
    }
    found = made(measured=measured).calibrated()
    for name, factor in (("a.q0", 1), ("a.q3", 1), ("up", 1)):
        assert found[name]["u2/g32"] == pytest.approx(2 * factor * score[name]["u2/g32"])
        assert found[name]["u3/g32"] == pytest.approx(score[name]["u3/g32"])
        assert found[name]["u4/g32"] == pytest.approx(score[name]["u4/g32"] / 2)
        assert found[name]["i8/ch"] == pytest.approx(score[name]["i8/ch"] / 2)


def test_a_measured_unit_keeps_its_own_value() -> None:
    found = made(measured={"a.q0": {"u2/g32": 7.0}, "a.q1": {"u2/g32": 1.0}})
    assert found.calibrated()["a.q0"]["u2/g32"] == 7 and found.calibrated()["a.q1"]["u2/g32"] == 1


def test_more_bits_of_the_same_groups_lose_no_more() -> None:
    """A measurement below the next format's prediction pulls that down; other groups are left alone."""
    score = made().score()
    found = made(measured={"a.q0": {"u2/g32": score["a.q0"]["u2/g32"] / 1000}}).calibrated()["a.q0"]
    assert found["u2/g32"] >= found["u3/g32"] >= found["u4/g32"]
    odd = dataclasses.replace(made(), scores={"m": {"up": {"u2/g32": 1.0, "u3/g32": 3.0, "u4/g64": 5.0}}})
    assert odd.calibrated()["up"] == {"u2/g32": 1.0, "u3/g32": 1.0, "u4/g64": 5.0}


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = made(measured={"a.q0": {"u2/g32": math.inf}})
    found.save(tmp_path / "s.json")
    again = Sensitivity.load(tmp_path / "s.json")
    assert again.to_json() == found.to_json()
    assert again.units == found.units and again.heads == found.heads and again.scores == found.scores
    assert again.measured["a.q0"]["u2/g32"] == math.inf
    assert json.loads(found.to_json())["measured"]["a.q0"]["u2/g32"] is None, "JSON has no infinity"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "qfx-plan"}, "holds no sensitivity"),
        ({"version": 9}, "has another version.*\n.*expected: 1\n.*found: 9"),
        ({"score": {}}, "unknown key 'score' in .*, did you mean 'scores'"),
        ({"formats": ["u4/g"]}, "cannot be read: ValueError: bad format"),
        ({"units": [{"name": "a"}]}, "cannot be read: KeyError"),
        ({"heads": [{"nose": 1}]}, "cannot be read: TypeError"),
        ({"scores": {"m": {"up": {"u4/g32": "much"}}}}, "cannot be read: ValueError"),
        ({"measured": [1]}, "cannot be read: AttributeError"),
    ],
)
def test_other_files_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps(json.loads(made().to_json()) | change))
    with pytest.raises(ValueError, match=message):
        Sensitivity.load(file)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(ValueError, match="truncated or no JSON"):
        Sensitivity.load(tmp_path / "s.json")
    with pytest.raises(FileNotFoundError):
        Sensitivity.load(tmp_path / "gone.json")
    with pytest.raises(ValueError, match="holds no sensitivity"):
        Sensitivity.from_json([])


def test_priors_of_units_come_from_the_types_of_their_heads() -> None:
    """A key head has the most of what its two query heads have."""
    types = ("positional", "semantic", "mixed", "positional")
    heads = tuple(Head("att", "layers.0", i, i // 2, kind) for i, kind in enumerate(types))
    keys = tuple(Unit(f"k.k{i}", "k", "k", "layers.0", (8, 16), 0, 8 * i, 8 * i + 8, i, "att") for i in (0, 1))
    found = dataclasses.replace(made(), heads=heads, units=(*units(), *keys))
    assert found.prior("qa") == {"a.q0": 4, "a.q1": 8, "a.q2": 6, "a.q3": 4, "k.k0": 8, "k.k1": 6}
    assert set(found.prior("classification").values()) == {8}
    with pytest.raises(ValueError, match="no table of bits for the task 'chat'"):
        found.prior("chat")


def test_a_method_without_scores() -> None:
    with pytest.raises(ValueError, match="no scores of 'tacq'(?s:.*)analyze with method='tacq'"):
        made().score("tacq")


@pytest.mark.parametrize("width", [80, 160])
def test_shown_to_people(width: int) -> None:
    out = io.StringIO()
    made(measured={f"a.q{i}": {"u4/g32": 1.0 + i} for i in range(3)}).show(Console(file=out, width=width), rows=2)
    text = out.getvalue()
    assert "2 of 5 units" in text and "key-value cache" in text and "measured and calibrated" in text
    assert "1 mixed" in text and "0.50" in text and "note q: a note" in text
    assert "Types of heads are no measure" in text and "predicted against measured" in text
    assert max(map(len, text.splitlines())) <= width
    heading = next(line for line in text.splitlines() if line.startswith("unit"))
    shown = {name for name in TEXTS if name in heading}
    assert shown == (set(TEXTS) if width == 160 else {"u2/g32", "u4/g32", "i8/ch"})
