"""The encoder benchmark runs, small, and what it says comes from that run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from examples.benchmarks import cpu_encoder

SCRIPT = Path(cpu_encoder.__file__)


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], check=True, capture_output=True, text=True).stdout


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="nothing is none of minilm, bert-base, tiny"):
        cpu_encoder.main(model=["minilm", "nothing"])


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers, bars = tmp_path / "numbers.json", tmp_path / "bars.png"
    peers = ("--only", "eager", "--only", "qfx", "--only", "floor", "--only", "torchao int8 per token")
    files = ("--json", str(numbers), "--plot", str(bars), "--folder", str(tmp_path / "kept"))
    said = run("--quick", "--threads", "1", *peers, *files, "--recipe", "w8a8", "--profile")
    found = json.loads(numbers.read_text(encoding="utf-8"))
    rows = {row["peer"]: row for row in found["runs"]["tiny_2x16"]["rows"]}
    assert found["rounds"] == 2 and "1 threads" in found["where"]
    reference, ours, floor = (rows[name] for name in (cpu_encoder.REFERENCE, "qfx w8a8", cpu_encoder.FLOOR))
    others = [row["call_ms"] for row in rows.values() if "call_ms" in row and row not in (ours, floor)]
    assert ours["ratio"] == pytest.approx(ours["call_ms"] / min(others))
    assert reference["cosine"] == pytest.approx(1) and 0.99 < ours["cosine"] < 1
    assert ours["weights_bytes"] < reference["weights_bytes"] / 2
    torchao = rows["torchao int8 per token"]
    assert "call_ms" in torchao or torchao["failed"].startswith("ModuleNotFoundError")
    assert ("failed:" in said) == ("failed" in torchao)
    assert 0 < ours["best_ms"] <= ours["call_ms"]
    assert "where w8a8 spends its time" in said and "MatMulIntegerToFloat" in said
    assert all(part in said for part in ("products", "attention", "GELU", "norms", "quantize, scales, bias"))
    assert "qfx w8a8: " in said and " times as fast as the fastest peer" in said
    busy = found["runs"]["tiny_2x16"]["others_busy"]
    assert "meanwhile" in said and (busy is None or busy >= 0)
    assert bars.stat().st_size > 1000
