"""The measured profile of this CPU: a short one; and that what it measures is what it says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from qfx.allocation import profile
from qfx.allocation.devices import load
from qfx.allocation.profile import Effort, _least, measure
from tests.qfx.commands import run

QUICK = Effort(width=128, rows=(1, 32), sizes=(1 << 16, 1 << 22), seconds=0.005)


def test_least_of_several_in_turn() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    short, long = _least([lambda: work("a", 0.001), lambda: work("b", 0.004)], 0.001)
    assert 0.001 <= short < long and long >= 0.004
    assert order[:6] == ["a", "b", "a", "b", "a", "b"] and len(order) == 12, "once before, then five times"


@pytest.mark.slow
def test_a_quick_profile(tmp_path: Path) -> None:
    before = (torch.get_num_threads(), torch.random.get_rng_state())
    told: list[str] = []
    found = measure(threads=1, effort=QUICK, told=told.append)
    assert torch.get_num_threads() == before[0] and torch.equal(torch.random.get_rng_state(), before[1])
    assert set(found.rates) == {"f32", "w2", "w4", "w8", "w8a8", "bf16", "attention"}
    assert [rows for rows, _ in found.rates["w4"]] == [1, 32]
    assert all(1e6 < rate < 1e15 for curve in found.rates.values() for _, rate in curve)
    assert all(1e7 < speed < 1e13 for _, speed in found.bandwidth)
    assert 0 <= found.overhead < 1e-3 and found.memory > 1e8
    assert found.measured and found.facts["threads"] == 1 and found.name.endswith("1 thread")
    assert told[0] == "memory bandwidth" and len(told) == 9
    found.save(tmp_path / "cpu.json")
    assert load(tmp_path / "cpu.json") == found


@pytest.mark.parametrize("threads", [0, -1, True, 1.5])
def test_threads_are_checked(threads: Any) -> None:
    with pytest.raises(ValueError, match="threads must be 1 or more, found"):
        measure(threads=threads)


def test_effort_is_checked() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of 128, found 100"):
        Effort(width=100)
    bads: list[dict[str, Any]] = [{"rows": ()}, {"sizes": (0,)}, {"seconds": 0.0}]
    for bad in bads:
        with pytest.raises(ValueError, match="are positive and not empty"):
            Effort(**bad)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.qfx.allocation.test_devices import CPU

    asked: list[object] = []

    def measured(**how: object) -> object:
        asked.append((how["threads"], how["name"]))
        return CPU

    monkeypatch.setattr("qfx.cli.profile.measure", measured)
    result = run("profile", "-o", tmp_path / "cpu.json", "--threads", 3, "--name", "box")
    assert result.exit_code == 0, result.output
    assert asked == [(3, "box")] and load(tmp_path / "cpu.json") == CPU
    assert "60.0 GB/s" in result.output and "80, 370 Gop/s" in result.output
    refused = run("profile", "-o", tmp_path / "cpu.txt")
    assert refused.exit_code == 2 and "the profile is a .json file" in refused.output


def test_every_kernel_is_a_preset() -> None:
    from qfx.presets import presets

    assert {recipe for recipe in profile.KERNELS.values() if recipe} <= set(presets())
