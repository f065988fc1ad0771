"""The benchmark of memory of models on disk runs, small, and what it says comes from that run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.benchmarks import stream_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_the_sampler_sees_what_comes_and_goes() -> None:
    before, sampler = stream_memory.now(), stream_memory.Sampler()
    sampler.start()
    held = torch.ones(16 << 20)
    time.sleep(0.2)
    size = held.nbytes
    del held
    sampler.done = True
    sampler.join()
    assert sampler.peaks["anonymous"] - before[0] > 0.95 * size
    assert sampler.peaks["files"] - before[1] < 0.5 * size
    assert sampler.peaks["both"] <= sampler.peaks["anonymous"] + sampler.peaks["files"]


def test_batches_hold_all_samples() -> None:
    found = stream_memory.batches(6, 5, 20)
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(4, 5), (2, 5)]
    assert int(torch.cat([batch["input_ids"] for batch in found]).max()) < 20


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    sizes = ["--layers", "2", "--hidden", "256", "--vocabulary", "1000", "--samples", "4", "--length", "32"]
    command = [sys.executable, stream_memory.__file__, *sizes, "--at", str(tmp_path), "--json", str(numbers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(numbers.read_text())
    assert [row["method"] for row in rows] == ["rtn", "gptq"] and "x block" in done.stdout
    for row in rows:
        layer = 2 * (2 * 256 * 256 + 2 * 64 * 256 + 3 * 256 * 704 + 2 * 256)
        table = 2 * 1000 * 256
        assert row["layer"] == row["block"] == layer
        assert row["model"] == 2 * layer + 2 * table + 2 * 256
        assert row["both"] <= row["anonymous"] + row["files"] and row["seconds"] > 0
    assert rows[1]["activations"] == 4 * 32 * 256 * 2 and rows[0]["activations"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"], "models go afterwards"
