"""The benchmark of a cache's memory: bytes are those of the tensors, growth is that of the process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import typer

from examples.benchmarks import kv_memory
from examples.benchmarks.peers.decoding import SHAPES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_bytes_in_float16() -> None:
    """12 layers, keys and values of 4 heads of 64, 2 bytes each."""
    assert kv_memory.half("llama-0.1b", 8192) == 12 * 2 * 4 * 64 * 2 * 8192
    assert all(kv_memory.half(name, 1) > 0 for name in SHAPES)


def test_growth_is_that_of_the_process() -> None:
    held: list[torch.Tensor] = []

    def work() -> None:
        held.append(torch.ones(8 << 20))
        torch.ones(16 << 20).sum()

    found = kv_memory.growth(work)
    assert 0.9 * held[0].nbytes < found["held_bytes"] < 1.5 * held[0].nbytes
    assert found["peak_bytes"] > 2.8 * held[0].nbytes


def test_unknown_caches_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="i9 is none of float16"):
        kv_memory.main(cache=["i9"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the export
def test_rows_of_live_models_and_of_files(tmp_path: Path) -> None:
    tokens = 4096
    live = {row["peer"]: row for row in kv_memory.rows("tiny", "live", ("float16", "i8"), tokens, tmp_path)}
    file = {row["peer"]: row for row in kv_memory.rows("tiny", "file", ("float32", "i4"), tokens, tmp_path)}
    half = kv_memory.half("tiny", tokens)
    assert not [row for row in (*live.values(), *file.values()) if row.get("failed")]
    assert live["live float16"]["cache_bytes"] == half
    assert live["live i8"]["cache_bytes"] < 0.6 * half and file["file i4"]["cache_bytes"] < 0.3 * half
    assert file["file float32"]["cache_bytes"] == 2 * half
    assert all(row["peak_bytes"] > 0 for row in live.values())


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    kv_memory.main("tiny", 1024, ["i8"], "", None, numbers)
    rows = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    assert [row["peer"] for row in rows] == ["live i8", "file i8"]


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (row,) = kv_memory.rows("nothing", "live", ("i8",), 1024, tmp_path)
    assert "nothing" in row["failed"]
