"""Groups that do not divide the columns take bytes for nothing, which the report says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qfx
from qfx.errors import QfxWarning
from qfx.reporting.padding import padding_note
from qfx.reporting.rows import Row


def report(columns: int, fmt: Any, rows: int = 64) -> Any:
    model = nn.Sequential(nn.Linear(columns, rows))
    recipe = qfx.Recipe(name="r", rules=(qfx.Rule(target="linear", w=fmt),))
    return qfx.report(qfx.quantize(model, recipe, [torch.randn(2, columns)]))


def test_columns_that_are_filled_up() -> None:
    (note,) = report(576, "u4/g128").notes
    assert note.reason.startswith("11% more bytes than formats say: 0 in u4/g128; columns are filled")
    assert "(g64, ...)" in note.next_step and note.minor


@pytest.mark.parametrize(("columns", "group"), [(192, 128), (40, 32), (100, 64), (33, 32)])
def test_the_share_is_that_of_the_columns(columns: int, group: int) -> None:
    found = report(columns, f"i4/g{group}/f16")
    (note,) = found.notes
    filled = -(-columns // group) * group
    said = float(note.reason.partition("%")[0]) / 100
    assert abs(said - (filled / columns - 1)) <= 0.006
    (row,) = found.rows
    assert row.bytes_after > row.elements * (4 + 16 / group) / 8


@pytest.mark.parametrize(
    ("columns", "fmt"),
    [(576, "u4/g64"), (128, "u4/g128"), (4000, "u4/g128"), (96, "i8/ch"), (96, "f16"), (96, ["i4/g64", "i8/ch"])],
)
def test_nothing_to_say(columns: int, fmt: Any) -> None:
    assert report(columns, fmt).notes == ()


def test_a_weight_that_another_row_counts_is_left_out() -> None:
    row = Row("a", "linear", "w=u4/g128", elements=64 * 192, bytes_before=1, bytes_after=10**6, shared=True)
    assert padding_note([row]) == []


def test_a_float_row_is_left_out() -> None:
    assert padding_note([Row("a", "linear", "w=u4/g128", elements=64, bytes_after=10**6, as_asked=False)]) == []


def test_several_are_one_note() -> None:
    model = nn.Sequential(nn.Linear(192, 64), nn.Linear(64, 128), nn.Linear(128, 8))
    recipe = qfx.Recipe(name="r", rules=(qfx.Rule(target="linear", w="u4/g128"),))
    (note,) = qfx.report(qfx.quantize(model, recipe, [torch.randn(2, 192)])).notes
    assert "0 in u4/g128 and 1 more" in note.reason, "the third has whole groups"


def test_it_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    report(576, "u4/g128").show()
    assert "11% more bytes" in " ".join(capsys.readouterr().out.split())


def test_compiled_graphs_say_it_too() -> None:
    model = nn.Sequential(nn.Linear(192, 64)).eval()
    recipe: Any = {"name": "r", "rules": [{"target": "linear", "w": "u4/g128"}]}
    fast = torch.compile(model, backend="qfx", options={"recipe": recipe})
    with torch.no_grad(), pytest.warns(QfxWarning, match="MatMulNBits rounds them"):
        fast(torch.randn(2, 192))
    (note,) = [note for note in qfx.report(fast).notes if note.node == "report"]
    assert "33% more bytes" in note.reason
