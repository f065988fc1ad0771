"""The benchmark of the analysis runs, and its table says what it costs beside the passes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.benchmarks import analysis_cost

pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")


@pytest.mark.slow
def test_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    analysis_cost.main(192, 1, 4, 16, 1, 0, 1, path)
    numbers = json.loads(path.read_text(encoding="utf-8"))
    passes, analysis = numbers["rows"]
    assert passes["times"] == 1 and passes["seconds"] > 0
    assert analysis["peer"] == "analysis, no measurements"
    assert analysis["times"] == pytest.approx(analysis["seconds"] / passes["seconds"])
    assert "4 x 16 tokens" in numbers["title"]
