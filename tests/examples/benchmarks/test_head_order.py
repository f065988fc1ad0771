"""The benchmark of mixes over heads: heads in order are two plain sub-matrices for each projection."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.benchmarks import head_order
from examples.benchmarks.head_order import FORMS, HIGH, LOW, recipe


def test_recipes() -> None:
    uniform = recipe("4 bits", 4, 2, 0.5, 0)
    assert {fmt for rule in uniform.rules for fmt in rule.w or ()} == {LOW} and uniform.rewrites == ()
    plain, ordered = (recipe(form, 8, 4, 0.5, 1) for form in FORMS[2:])
    assert plain.rules == ordered.rules and ordered.rewrites == ("permute-heads",)
    q, k = plain.rules[0].w, plain.rules[1].w
    assert isinstance(q, tuple) and isinstance(k, tuple) and k.count(HIGH) == 2
    assert q == tuple(fmt for fmt in k for _ in range(2)) and plain.rules[3].along == "columns"


@pytest.mark.slow
def test_the_mix_in_order_has_no_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    head_order.main(8, 4, 32, 0.5, prompt=4, rounds=1, threads=1, seed=1, json_file=numbers)
    rows = {row["peer"]: row for row in json.loads(numbers.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == list(FORMS) and "cuts and joins" in capsys.readouterr().out
    low, high, mix, ordered = rows.values()
    assert low["products"] == high["products"] == 4 and low["parts"] == 0
    # two products for each projection; two slices for the columns of o, one join for the rows of each of q, k and v
    assert mix["products"] == ordered["products"] == 8 and ordered["parts"] == 5 < mix["parts"]
    assert ordered["file_products"] == mix["file_products"] == 4 and ordered["file_parts"] < mix["file_parts"]
    assert low["kilobytes"] < ordered["kilobytes"] <= mix["kilobytes"] < high["kilobytes"]
    assert all(row["token"] > 0 and row["prompt"] > 0 for row in rows.values()) and low["token"] == 1.0
