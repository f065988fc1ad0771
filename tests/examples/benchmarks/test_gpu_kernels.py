"""The benchmark of the GPU's kernels: its checks run in the interpreter, its goals follow from its rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.benchmarks import gpu_cases, gpu_kernels, gpu_peers, gpu_work
from examples.benchmarks.gpu_goals import goals
from qfx.backends.triton import device, launch, timing
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
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
    assert len(found["goals"]) == 20 and "goal: " in console.export_text()
    json.dumps(found)


def test_rows_are_kept_one_by_one_and_no_case_begins_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("examples.benchmarks.gpu_kernels.time.monotonic", lambda: next(clock))
    some = [case for case in gpu_cases.checks(tiny=True) if case.family == "norm"][:4]
    monkeypatch.setattr(gpu_cases, "checks", lambda tiny: some)
    found: dict[str, Any] = {}
    kept: list[int] = []
    keep = lambda: kept.append(len(found["checks"]))  # noqa: E731
    gpu_kernels.run(Console(quiet=True), torch.device(DEVICE), ["norm"], found, check=True, keep=keep, until=3)
    assert kept == [1, 2, 3] and len(found["checks"]) == 3
    assert found["left"] == [f"norm {some[3].title}, {some[3].rows} rows"]


def test_peers_compute_what_they_should() -> None:
    where = torch.device(DEVICE)
    assert gpu_peers.cublas(4, 8, 2, where)[0]().shape == (2, 4)  # type: ignore[attr-defined]
    assert gpu_peers.int_mm(8, 16, 32, where)[0]().shape == (32, 8)  # type: ignore[attr-defined]
    call = gpu_peers.sdpa(1, (4, 2), 3, 5, 8, torch.float32, False, where)[0]
    assert call().shape == (1, 4, 3, 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("causal", [False, True])
def test_forms_of_torchs_attention_compute_the_same(causal: bool) -> None:
    where, found = torch.device(DEVICE), list[Any]()
    for form in ("", "folded") if not causal else ("",):
        torch.manual_seed(0)
        found.append(gpu_peers.sdpa(2, (4, 2), 1, 5, 8, torch.float32, causal, where, form)[0]())
    assert all(torch.allclose(y.reshape(2, 4, 1, 8), found[0]) for y in found)
    with pytest.raises(AssertionError, match="other queries"):
        gpu_peers.sdpa(2, (4, 2), 3, 5, 8, torch.float32, causal, where, "folded")


def test_a_peer_is_measured_once_for_equal_arguments_and_again_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 5.0, 1.0, 7.0, 1.0])
    monkeypatch.setattr(timing, "seconds", lambda calls, **more: next(times))
    case = next(case for case in gpu_cases.checks(tiny=True) if case.family == "weight-only")
    known: dict[Any, float] = {}
    found = []
    for text in ("i8/ch", "u4/g128/f16", "i8/ch"):
        one = gpu_kernels.checked(case, torch.device(DEVICE))
        one["made"].peers = {"torchao": partial(list, text)}
        gpu_kernels.measured(one, case, torch.device(DEVICE), dict.fromkeys(("bandwidth", "bf16", "8 bit"), 1.0), known)
        found.append(one["peers"]["torchao"])
    assert found == [5.0, 7.0, 5.0]


@pytest.mark.parametrize("kv", gpu_cases.CACHES)
def test_bytes_of_a_cache_are_those_of_its_tokens(kv: str) -> None:
    tokens, where = 200, torch.device(DEVICE)
    fmt = cache_formats(kv, 1)[0]
    k = torch.randn(1, 2, tokens, 64, device=where).half()
    memory, spec = allocate(fmt, k[:, :, :0], k[:, :, :0], tokens), spec_of(fmt, k, k, tokens)
    at = torch.zeros((), dtype=torch.long, device=where)
    torch.ops.qfx.cache_append(memory, k, k, at, spec)
    torch.ops.qfx.cache_append(memory, k[:, :, :0], k[:, :, :0], at + tokens, spec)
    stored = int(memory[0])
    assert 0 < stored <= tokens
    floats = (tokens - stored) * 2 * 2 * 64 * 2
    bits = {"i8": 8, "fp8": 8, "i4": 4}[kv]
    codes, found = stored * 2 * 2 * 64 * bits // 8, gpu_work.held(memory, fmt, tokens)
    assert codes + floats < found < 1.3 * codes + floats, "and the scales"
    assert found < sum(t.nbytes for t in memory)


def row(family: str, facts: list[Any], rows: int, share: float, **peers: float) -> dict[str, Any]:
    return {"family": family, "facts": facts, "rows": rows, "share": share, "seconds": 1.0, "peers": peers}


def test_goals_are_the_least_of_their_rows() -> None:
    cublas, int8 = gpu_peers.CUBLAS, ["product", "i8/tok", "i8/ch", 8192, 8192]
    rows = [
        row("weight-only", ["linear", "", "u4/g128/f16", 8192, 8192], 1, 0.75, **{cublas: 3.0}),
        row("weight-only", ["linear", "", "u4/g128/f16", 28672, 8192], 1, 0.6, **{cublas: 3.0}),
        row("weight-only", ["linear", "", "u4/g128/f16", 8192, 8192], 16, 0.5, **{cublas: 2.7}),
        row("w8a8", int8, 4096, 0.7, **{cublas: 1.6}),
        row("w8a8", int8, 8192, 0.6, **{cublas: 1.7}),
        *(
            row("w8a8", ["form", *int8[1:]], m, share, **{cublas: times})
            for m, share, times in ((4096, 0.5, 1.5), (4096, 0.65, 1.8), (8192, 0.61, 1.4), (8192, 0.1, 1.7))
        ),
        row("fp8", ["form not promoted", "f8e4m3/tok", "f8e4m3/ch", 8192, 8192], 4096, 0.9, **{cublas: 2.0}),
        row("prefill", [True], 8192, 0.3, **{"SDPA f16": 1.0}),
        row("decode", ["i8", 8192], 1, 0.7, SDPA=1.0),
        row("decode", ["i4", 8192], 1, 0.1, SDPA=0.5),
        row("decode", ["float", 8192], 1, 0.8, SDPA=0.9, **{"SDPA folded": 3.0}),
    ]
    found: dict[str, Any] = {goal.what: (goal.found, goal.state) for goal in goals(rows)}
    assert found["W4A16 (u4/g128/f16), one row: share of a copy's bandwidth"] == (0.6, "missed")
    assert found["W4A16, one row, 8192x8192: times cuBLAS bf16"] == (3.0, "reached")
    assert found["W4A16 keeps of that, up to 32 rows"] == (pytest.approx(0.9), "reached")
    assert found["INT8 product, 4096 rows and more: share of twice cuBLAS bf16's rate"] == (0.6, "reached")
    assert found["INT8 product, 4096 rows and more: times cuBLAS bf16"] == (1.6, "reached")
    assert found["INT8 product, the best form with descriptors: share of twice cuBLAS bf16's rate"] == (0.61, "reached")
    assert found["INT8 product, the best form with descriptors: times cuBLAS bf16"] == (1.7, "reached")
    assert found["FP8 product, the best form with descriptors: share of twice cuBLAS bf16's rate"] == (
        None,
        "not measured",
    )
    assert found["FP8 product, 4096 rows and more: times cuBLAS bf16"] == (None, "not measured")
    assert found["attention over i8 and fp8 caches: times SDPA bf16"] == (1.0, "reached")
    assert found["attention over float caches of fixed length: times SDPA"] == (0.9, "missed")
    assert found["attention of prompts with int8 q.k: times SDPA f16"] == (1.0, "missed"), "faster is asked"
    assert (
        str(goals(rows)[1]) == "goal: W4A16 (u4/g128/f16), one row: share of a copy's bandwidth >= 0.7: 0.600, missed"
    )
    failed = {**row("w8a8", int8, 4096, 0.7, **{cublas: 1.6}), "failed": "wrong result"}
    again = {goal.what: (goal.found, goal.state) for goal in goals([*rows, failed])}
    assert again["INT8 product, 4096 rows and more: times cuBLAS bf16"] == (0.0, "missed")
    several = {goal.what: goal.found for goal in goals([row("decode", ["i8", 1], 1, 0.7, SDPA=3.0, **{"SDPA b": 2.0})])}
    assert several["attention over i8 and fp8 caches: times SDPA bf16"] == 2.0
    assert len(goals([])) == 20 and {goal.state for goal in goals([])} == {"not measured"}


def test_forms_by_descriptors_are_for_devices_that_have_them() -> None:
    titles = {
        name: [case.title for case in gpu_kernels._here(gpu_cases.timed(), ("w8a8", "fp8"), one)]
        for name, one in (("old", device.A100), ("new", device.H200))
    }
    extra = set(titles["new"]) - set(titles["old"])
    assert extra and all(title.startswith("by descriptors") for title in extra)
    assert any("NOT PROMOTED" in title for title in extra) and set(titles["old"]) < set(titles["new"])


def test_a_form_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    real = launch.launch

    def kept(kernel: Any, *given: Any, **more: Any) -> None:
        started.append(kernel.fn.__name__)
        real(kernel, *given, **more)

    monkeypatch.setattr("qfx.backends.triton.gemm8.launch", kept)
    cases = [case for case in gpu_cases.checks(tiny=True) if case.facts[:1] == ("form",)]
    assert {case.family for case in cases} == {"w8a8", "fp8"}
    for case in cases[:1]:
        assert case.make(torch.device(DEVICE)).error() < 5e-3
    assert started == ["gemm8_described"]


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
