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


# Times the size of the files, and of the activations. The goal is 1.15. Runs miss it:
# - w4a16: ONNX Runtime packs weights with more beside them than the file has, and keeps scales in float32, zero points
#   and rows of the table, too (the benchmark says how much of each). 1.45 was measured. Without packing the peak is
#   twice as high, for a weight is unpacked at each call, and decoding is 50 times slower.
# - w8a8: the tied table lies in the file once, and in memory as packed columns beside the rows that were read. 1.155
#   was measured; in a file that held it twice the same 129 MB were 0.95.
# - Export: the traced graph of so small a model is as large as most of its file (40 of 54 MB), and what the C library
#   keeps of free memory varies. 1.0 to 1.21 was measured.
MOST = {("w4a16", "export"): 1.25, ("w4a16", "run"): 1.5, ("w8a8", "export"): 1.15, ("w8a8", "run"): 1.2}


@pytest.mark.slow
def test_export_and_run_stay_near_the_size_of_the_files(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, str(Path(memory.__file__)), "--model", "llama-0.1b", "--json", str(numbers)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(numbers.read_text(encoding="utf-8"))
    assert [(row["recipe"], row["stage"]) for row in rows] == list(MOST)
    assert all(row["ratio"] < MOST[row["recipe"], row["stage"]] for row in rows), rows
    assert all(0 <= row["bytes"]["mapped"] < 0.2 * row["bytes"]["grown"] for row in rows if row["stage"] == "run"), rows


@pytest.mark.slow
def test_an_encoder_is_measured_too(tmp_path: Path) -> None:
    (first, second) = memory.measured("tiny-bert", "w8a8")
    assert first["stage"] == "export" and second["stage"] == "run" and first["bytes"]["files"] > 10_000
    assert second["bytes"]["activations"] == memory.activations("tiny-bert")
