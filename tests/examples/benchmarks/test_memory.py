"""The memory benchmark runs, small, and what it says comes from that run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.benchmarks import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_growth_is_that_of_the_work() -> None:
    held: list[torch.Tensor] = []
    assert memory.grown(lambda: held.append(torch.ones(16 << 20))) > 0.95 * held[0].nbytes

    def for_a_while() -> None:
        torch.ones(16 << 20).sum()

    assert memory.grown(for_a_while) > 0.95 * held[0].nbytes, "the peak counts, not the end"
    assert memory.grown(lambda: None) < 0.1 * held[0].nbytes


def test_files_are_those_of_the_model(tmp_path: Path) -> None:
    for name, size in (("model.onnx", 3), ("model.onnx.data", 5), ("config.json", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    assert memory.size_of(tmp_path) == 8


@pytest.mark.parametrize("name", [name for name in memory.MODELS if not memory.is_encoder(name)])
def test_activations_hold_logits_and_cache(name: str) -> None:
    layers, hidden, _, heads, kv_heads, rows = memory.MODELS[name]
    assert memory.activations(name) > 4 * (rows + 2 * layers * kv_heads * (hidden // heads) * memory.PROMPT)


@pytest.mark.slow
def test_export_and_run_stay_near_the_size_of_the_files(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(Path(memory.__file__)), "--model", "llama-0.1b", "--json", str(numbers)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    assert [(r["recipe"], r["stage"]) for r in rows] == [(r, s) for r in ("w4a16", "w8a8") for s in ("export", "run")]
    assert all(row["ratio"] < 1.15 for row in rows), rows


@pytest.mark.slow
def test_an_encoder_is_measured_too(tmp_path: Path) -> None:
    (first, second) = memory.measured("tiny-bert", "w8a8")
    assert first["stage"] == "export" and second["stage"] == "run" and first["bytes"]["files"] > 10_000
    assert second["bytes"]["activations"] == memory.activations("tiny-bert")
