"""Heat maps: every unit has its cell, and what a cell shows is the unit's value."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install qfx[pictures]")

from qfx.analysis.units import Unit
from qfx.format import Format
from qfx.pictures import canvas, grids
from tests.qfx.pictures import some


def shown(axis: object) -> np.ndarray:
    return np.ma.filled(axis.images[0].get_array(), np.nan)  # type: ignore[attr-defined]


def test_every_unit_has_one_cell() -> None:
    layers, panels = grids.grid(some.units())
    assert layers == ["layers.0", "layers.1", grids.BESIDE]
    assert [(panel.title, panel.columns) for panel in panels] == [
        ("q", ("0", "1", "2")), ("k", ("0",)), (grids.OTHERS, ("table", "up")),
    ]  # fmt: skip
    names = [name for panel in panels for name in panel.cells.values()]
    assert sorted(names) == sorted(unit.name for unit in some.units())
    assert panels[0].cells[1, 2] == "layers.1.q_proj.q2"
    assert panels[2].cells[2, 0] == "table"


def test_two_weights_of_one_short_name_in_a_row_keep_their_own_cells() -> None:
    """`encoder.fc` and `decoder.fc` of one layer."""
    own = [Unit(f"l.0.{part}.fc", f"l.0.{part}.fc", "linear", "l.0", (4, 4)) for part in ("a", "b")]
    _, (panel,) = grids.grid(own)
    assert sorted(panel.cells.values()) == ["l.0.a.fc", "l.0.b.fc"]
    assert panel.columns == ("a.fc", "b.fc")


def test_cells_show_values() -> None:
    found = {unit.name: 1e-3 * (i + 1) for i, unit in enumerate(some.units())}
    made = grids.values(some.units(), found, title="t", label="loss")
    q, k, others, bar = made.axes
    assert shown(q).shape == (3, 3) and shown(k).shape == (3, 1) and shown(others).shape == (3, 2)
    names = [unit.name for unit in some.units()]
    assert shown(q)[0, 1] == pytest.approx(1e-3 * (names.index("layers.0.q_proj.q1") + 1))
    assert np.isnan(shown(q)[2]).all() and shown(others)[2, 0] == pytest.approx(1e-3)
    assert bar.get_ylabel() == "loss"


def test_what_is_nothing_or_infinite_stays_empty() -> None:
    found = dict.fromkeys((unit.name for unit in some.units()), 1e-3) | {"table": 0.0, "layers.0.up": float("inf")}
    others = grids.values(some.units(), found, title="t", label="loss").axes[2]
    assert np.isnan(shown(others)[2, 0]) and np.isnan(shown(others)[0, 1]) and shown(others)[1, 1] == 1e-3
    canvas.png(grids.values(some.units(), {}, title="t", label="loss"))


def test_formats_are_written_into_the_cells() -> None:
    formats = {unit.name: Format.parse("u3/g32") for unit in some.units()} | {"layers.1.up": Format.parse("i8/ch")}
    others = grids.bits(some.units(), formats, title="t").axes[2]
    assert shown(others)[1, 1] == 8 and shown(others)[0, 1] == 3
    assert sorted(text.get_text() for text in others.texts) == ["i8\nch", "u3\ng32", "u3\ng32"]


def test_a_large_model_has_no_words_in_its_cells() -> None:
    unit = some.units()[1]
    many = [replace(unit, name=f"u{i}.{h}", layer=f"layers.{i}", head=h) for i in range(40) for h in range(40)]
    made = grids.bits(many, {u.name: Format.parse("u4/g32") for u in many}, title="t")
    assert not len(made.axes[0].texts) and len(made.axes[0].get_yticks()) <= 40
    assert max(made.get_size_inches()) <= 22


def test_types_of_heads_and_their_letters() -> None:
    axis = grids.types(some.heads(), title="t").axes[0]
    assert shown(axis).shape == (2, 3, 3)
    assert np.array_equal(shown(axis)[0], shown(axis)[1]) and len(np.unique(shown(axis)[0], axis=0)) == 3
    assert sorted(text.get_text() for text in axis.texts) == ["s", "s", "s", "s", "sp", "sp"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["positional", "semantic", "mixed"]
