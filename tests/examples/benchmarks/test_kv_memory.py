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
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    kv_memory.main("tiny", 4096, ["i8"], "", None, numbers)
    live, file = json.loads(numbers.read_text(encoding="utf-8"))["rows"]
    half = kv_memory.half("tiny", 4096)
    assert (live["peer"], file["peer"]) == ("live i8", "file i8")
    assert 0.5 * half <= file["cache_bytes"] < 0.55 * half and 0.5 * half < live["cache_bytes"] < 0.6 * half
    assert min(live["held_bytes"], live["peak_bytes"], file["held_bytes"]) > 0.4 * half


@pytest.mark.slow
def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (row,) = kv_memory.rows("nothing", "live", ("i8",), 1024, tmp_path)
    assert "nothing" in row["failed"]
