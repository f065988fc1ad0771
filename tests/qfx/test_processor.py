"""What is known of the processor: as torch says, and what follows for integer sums."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from qfx import processor

X86: dict[str, Any] = {"architecture": "x86_64", "avx2": True, "avx512_vnni": False, "avx_vnni": False}


@pytest.mark.parametrize(
    ("found", "saturates"),
    [
        (X86, True),
        (X86 | {"avx512_f": True, "avx512_bw": True}, True),
        (X86 | {"avx512_vnni": True}, False),
        (X86 | {"avx_vnni": True}, False),
        ({"architecture": "x86_64"}, True),
        ({"architecture": "arm64", "dot": True}, False),
        ({"architecture": "arm64"}, False),
        ({"architecture": "aarch64", "neon": True}, False),
        ({}, False),
    ],
)
def test_x86_without_vnni_saturates(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], saturates: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert processor.saturates() == saturates


def test_instruction_sets_are_names_of_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_logical_cores": 4, "l1d_cache_size": 32768, "cpu_name": "any"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: X86 | sizes)
    assert processor.instruction_sets() == ["x86_64", "avx2"], "no sizes, no names, nothing that is lacking"


@pytest.mark.skipif(sys.platform != "linux", reason="compared with what Linux tells")
def test_it_is_what_the_system_tells() -> None:
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    sets = set(processor.instruction_sets())
    for ours, theirs in (("avx2", "avx2"), ("avx512_f", "avx512f"), ("avx512_vnni", "avx512_vnni"), ("fma3", "fma")):
        assert (ours in sets) == (theirs in flags)


def test_each_keeps_the_order_in_threads() -> None:
    met = threading.Barrier(2, timeout=10)

    def square(value: int) -> int:
        met.wait()  # for another thread
        return value * value

    assert processor.each(square, range(20), 2) == [v * v for v in range(20)]


@pytest.mark.parametrize(("values", "threads"), [([3], 8), ([], 8), ([2, 3], 1)])
def test_each_of_little_needs_no_thread(values: list[int], threads: int) -> None:
    def square(value: int) -> int:
        assert threading.current_thread() is threading.main_thread()
        return value * value

    assert processor.each(square, values, threads) == [v * v for v in values]
