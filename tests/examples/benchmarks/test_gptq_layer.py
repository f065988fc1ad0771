"""The benchmark of GPTQ runs, and its error is below that of rounding to nearest."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks import gptq_layer


def test_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    gptq_layer.main(128, 4, 64, 1, path)
    numbers = json.loads(path.read_text(encoding="utf-8"))
    assert (numbers["size"], numbers["samples"], numbers["tokens"]) == (128, 4, 64)
    own, nearest = numbers["methods"]["qfx"], numbers["methods"]["nearest"]
    assert own["seconds"] >= own["hessian"] > 0
    assert own["error"] < 0.7 * nearest["error"]
