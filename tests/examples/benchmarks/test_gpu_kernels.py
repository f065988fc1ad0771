"""The benchmark of the GPU's kernels: its checks run in the interpreter, its goals follow from its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.benchmarks import gpu_cases, gpu_kernels, gpu_peers
from examples.benchmarks.gpu_goals import goals
from qfx.backends.triton import device, timing
from tests.backends.triton.cases import DEVICE

SCRIPT = Path(gpu_kernels.__file__)


@pytest.mark.parametrize("family", gpu_kernels.FAMILIES)
def test_every_kernel_is_right(family: str) -> None:
    found: dict[str, Any] = {}
    gpu_kernels.run(Console(quiet=True), torch.device(DEVICE), [family], found, check=True)
    assert found["checks"] and not [row for row in found["checks"] if "failed" in row]
    assert all(row["error"] < 5e-3 for row in found["checks"])


def test_a_wrong_result_and_a_failure_are_told() -> None:
    case = gpu_cases.checks(tiny=True)[0]
    made = case.make(torch.device(DEVICE))
    expected = made.expected()
    made.expected = lambda: [1.1 * expected[0]]
    row = gpu_kernels.checked(gpu_cases.Case("f", "t", 1, lambda where: made), torch.device(DEVICE))
    assert row["failed"].startswith("wrong result: relative error 9.")

    def fail(where: torch.device) -> Any:
        raise ValueError("no kernel\nmore")

    row = gpu_kernels.checked(gpu_cases.Case("f", "t", 1, fail), torch.device(DEVICE))
    assert row["failed"] == "ValueError: no kernel"


def test_a_case_is_timed_beside_its_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 6.0])
    monkeypatch.setattr(timing, "seconds", lambda calls, **more: next(times))
    case = next(case for case in gpu_cases.checks(tiny=True) if case.family == "w8a8" and case.rows == 20)
    row = gpu_kernels.checked(case, torch.device(DEVICE))
    row["made"].peers = {"good": list, "bad": lambda: 1 / 0}
    limit = {"bandwidth": 1e9, "bf16": 1e12, "8 bit": float(row["made"].products)}
    gpu_kernels.measured(row, case, torch.device(DEVICE), limit, {})
    assert row["share"] == 0.5 and row["peers"] == {"good": 6.0}
    assert row["without"] == {"bad": "ZeroDivisionError: division by zero"}
    gpu_kernels.show(Console(quiet=True), [row], "table")


def test_a_whole_run_has_limits_rows_and_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(calls: Any, **more: Any) -> float:
        return float(calls[0]() is not None)

    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(gpu_kernels, "SIDE", 16)
    monkeypatch.setattr(gpu_kernels, "COPIED", 64)
    some = [case for case in gpu_cases.checks(tiny=True) if case.family == "w8a8"]
    monkeypatch.setattr(gpu_cases, "checks", lambda tiny: some[:1])
    monkeypatch.setattr(gpu_cases, "timed", lambda: some)
    console = Console(record=True, width=170)
    found: dict[str, Any] = {}
    gpu_kernels.run(console, torch.device(DEVICE), ["w8a8"], found, check=False)
    assert found["limits"] == {"bandwidth": 128.0, "bf16": 2.0 * 16**3, "8 bit": 4.0 * 16**3}
    assert len(found["rows"]) == len(some) > 1 and all(row["seconds"] == 1.0 for row in found["rows"])
    assert all(row["peers"][gpu_peers.CUBLAS] == 1.0 for row in found["rows"])
    assert len(found["goals"]) == 15 and "goal: " in console.export_text()
    json.dumps(found)


def test_peers_compute_what_they_should() -> None:
    where = torch.device(DEVICE)
    assert gpu_peers.cublas(4, 8, 2, where)[0]().shape == (2, 4)  # type: ignore[attr-defined]
    assert gpu_peers.int_mm(8, 16, 32, where)[0]().shape == (32, 8)  # type: ignore[attr-defined]
    call = gpu_peers.sdpa(1, (4, 2), 3, 5, 8, torch.float32, False, where)[0]
    assert call().shape == (1, 4, 3, 8)  # type: ignore[attr-defined]


def row(family: str, facts: list[Any], rows: int, share: float, **peers: float) -> dict[str, Any]:
    return {"family": family, "facts": facts, "rows": rows, "share": share, "seconds": 1.0, "peers": peers}


def test_goals_are_the_least_of_their_rows() -> None:
    cublas, int8 = gpu_peers.CUBLAS, ["product", "i8/tok", "i8/ch", 8192, 8192]
    rows = [
        row("weight-only", ["linear", "", "u4/g128", 8192, 8192], 1, 0.75, **{cublas: 3.0}),
        row("weight-only", ["linear", "", "u4/g128", 28672, 8192], 1, 0.6, **{cublas: 3.0}),
        row("weight-only", ["linear", "", "u4/g128", 8192, 8192], 16, 0.5, **{cublas: 2.7}),
        row("w8a8", int8, 4096, 0.7, **{cublas: 1.6}),
        row("w8a8", int8, 8192, 0.6, **{cublas: 1.7}),
        row("prefill", [True], 8192, 0.3, **{"SDPA f16": 1.0}),
        row("decode", ["i8", 8192], 1, 0.7, SDPA=1.0),
        row("decode", ["i4", 8192], 1, 0.1, SDPA=0.5),
    ]
    found: dict[str, Any] = {goal.what: (goal.found, goal.state) for goal in goals(rows)}
    assert found["W4A16 (u4/g128), one row: share of the memory's bandwidth"] == (0.6, "missed")
    assert found["W4A16, one row, 8192x8192: times cuBLAS bf16"] == (3.0, "reached")
    assert found["W4A16 keeps of that, up to 32 rows"] == (pytest.approx(0.9), "reached")
    assert found["INT8 product, 4096 rows and more: share of the peak"] == (0.6, "reached")
    assert found["INT8 product, 4096 rows and more: times cuBLAS bf16"] == (1.6, "reached")
    assert found["FP8 product, 4096 rows and more: times cuBLAS bf16"] == (None, "not measured")
    assert found["attention over i8 and fp8 caches: times SDPA bf16"] == (1.0, "reached")
    assert found["attention of prompts with int8 q.k: times SDPA f16"] == (1.0, "missed"), "faster is asked"
    assert (
        str(goals(rows)[1]) == "goal: W4A16 (u4/g128), one row: share of the memory's bandwidth >= 0.7: 0.600, missed"
    )
    assert len(goals([])) == 15 and {goal.state for goal in goals([])} == {"not measured"}


def test_every_goal_has_cases() -> None:
    made = [
        {**row(c.family, list(c.facts), c.rows, 1.0), "peers": dict.fromkeys((*_names(), "SDPA f16"), 9.0)}
        for c in gpu_cases.timed()
    ]
    assert {goal.state for goal in goals(made)} == {"reached"}


def _names() -> tuple[str, ...]:
    return gpu_peers.CUBLAS, gpu_peers.SDPA


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--check"]], ids=str)
def test_without_a_gpu_it_says_so(more: list[str]) -> None:
    environment, command = {**os.environ, "TRITON_INTERPRET": "0"}, [sys.executable, str(SCRIPT), *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("this needs an NVIDIA GPU") and "TRITON_INTERPRET=1 with --check" in done.stderr


@pytest.mark.slow
def test_the_script_checks(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    command = [sys.executable, str(SCRIPT), "--check", "--only", "norm", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["device"] == device.find(torch.device(DEVICE)).name
