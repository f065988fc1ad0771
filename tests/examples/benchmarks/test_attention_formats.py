"""The benchmark of attention formats: an outlier channel of keys costs nothing where they are centred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.benchmarks import attention_formats
from examples.benchmarks.attention_formats import FORMS


@pytest.mark.slow
def test_centred_keys_and_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    attention_formats.main(2, 1, 32, tokens=48, rounds=1, json_file=numbers)
    rows = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    assert [row["peer"] for row in rows] == ["f32", *FORMS[1:]]
    assert "not centred dB" in capsys.readouterr().out
    for row in rows[1:]:
        assert row["random"] > 20 and row["outlier"] > row["random"] - 3
        assert row["prompt"] > 0 and row["token"] > 0
    for row in rows[1:4]:  # integers with a step for each token
        assert row["as_it_is"] < row["outlier"] - 8
    assert rows[0]["prompt"] == rows[0]["token"] == 1.0
