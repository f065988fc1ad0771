"""The benchmark of whole models on a GPU: a tiny one runs in the interpreter, with the results of the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._inductor import config as inductor

from examples.benchmarks import gpu_models
from qfx.live.modules import QuantLinear
from tests.backends.triton.cases import DEVICE

SCRIPT = Path(gpu_models.__file__)
SIZES = gpu_models.Sizes(32, 8, 1, 12, 2)


@pytest.mark.parametrize("phase", ["prefill", pytest.param("decode", marks=pytest.mark.slow)])
def test_a_model_runs_by_the_kernels_and_is_right(phase: str) -> None:
    torch.manual_seed(0)
    first, second = gpu_models.rows_of("tiny", None, [phase], torch.device(DEVICE), SIZES)
    assert first["by"].startswith("torch.compile") and "error" not in first
    assert second["error"] < 5e-2
    assert sum(n for kernel, n in second["kernels"].items() if "(Triton)" in kernel) >= 8
    assert second["ratio"] == first["seconds"] / second["seconds"] and second["goal"] > 1
    console = Console(record=True, width=150)
    gpu_models.show(console, [first, {**second, "ratio": 2.6}])
    text = console.export_text()
    assert f"goal: tiny {phase}" in text and "reached" in text


@pytest.mark.slow
def test_decoding_without_cuda_graphs_has_no_goal() -> None:
    rows = list(gpu_models.rows_of("tiny", None, ["decode", "prefill"], torch.device(DEVICE), SIZES, launched=True))
    assert [row["by"].partition(",")[2] for row in rows] == ["", " no CUDA graphs"] * 2 + ["", ""]
    assert ["goal" in row for row in rows] == [False, False, True, False, False, True]
    assert all("ratio" in row for row in rows if row["by"].startswith("qfx"))


def test_early_launches_stand_beside_the_others() -> None:
    rows = list(gpu_models.rows_of("tiny", None, ["prefill"], torch.device(DEVICE), SIZES, early=True))
    assert [row["by"].partition(",")[2] for row in rows] == ["", " early launches"] * 2
    assert [row["seconds"] / later["seconds"] for row, later in zip(rows[:2], rows[2:], strict=True)] == [
        row["ratio"] for row in rows[2:]
    ]
    assert not inductor.triton.enable_pdl


def test_every_linear_layer_is_packed() -> None:
    where = torch.device(DEVICE)
    model = gpu_models.quantized(gpu_models.made("tiny", 3, where, torch.float32), "w4a16", torch.float32)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == 3 * 7 + 1 and all(layer.w_codes.device.type == DEVICE for layer in layers)
    assert not [m for m in model.modules() if type(m) is torch.nn.Linear]


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr, done.stderr


@pytest.mark.slow
def test_the_script_checks(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT), "--check", "--only", "prefill", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["by"] for row in json.loads(file.read_text())] == ["torch.compile float32", "qfx w8a8"]
