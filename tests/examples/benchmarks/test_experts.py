"""The benchmark of experts runs and compares two forms that compute the same."""

from __future__ import annotations

import json
from pathlib import Path

from examples.benchmarks import experts


def test_both_forms_are_measured(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    experts.main(4, 2, 32, 64, "i4/g32", "1,5", 1, 2, path)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert [row["tokens"] for row in rows] == [1, 5]
    for row in rows:
        assert all(row[form]["ms"] > 0 and row[form]["sqnr_db"] > 30 for form in ("qmoe", "loop"))
        assert row["qmoe"] != row["loop"]
