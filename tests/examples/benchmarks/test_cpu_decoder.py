"""The decoder benchmark runs, small, and what it says comes from that run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from examples.benchmarks import cpu_decoder
from examples.benchmarks.peers import qfx_decoder
from examples.benchmarks.peers.decoding import DecoderJob
from qfx.errors import QfxWarning

SCRIPT = Path(cpu_decoder.__file__)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(typer.BadParameter, match="nothing is none of"):
        cpu_decoder.main(model=["nothing"])


def test_the_checkpoint_is_the_same_for_all(tmp_path: Path) -> None:
    job = DecoderJob("tiny", 4, 4, 8, 1, str(tmp_path))
    first = (job.checkpoint() / "model.safetensors").read_bytes()
    other = DecoderJob("tiny", 4, 4, 8, 1, str(tmp_path / "other"))
    assert (other.checkpoint() / "model.safetensors").read_bytes() == first
    assert (job.checkpoint() / "tokenizer.json").exists()
    assert job.tokens(8) == other.tokens(8) and job.context == 8


def test_the_trained_model_reads_text(tmp_path: Path) -> None:
    job = DecoderJob("tiny_lm", 4, 4, 64, 1, str(tmp_path))
    tokens = job.tokens(64)
    assert len(tokens) == 64 and len(set(tokens)) > 20


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    sizes = ("--quick", "--alone", "--threads", "1")
    peers = ("--only", "eager", "--only", "qfx", "--only", "Q8_0", "--recipe", "w8a16")
    command = [
        sys.executable,
        str(SCRIPT),
        *sizes,
        *peers,
        "--json",
        str(numbers),
        "--plot",
        str(tmp_path / "bars.png"),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = {row["peer"]: row for row in json.loads(numbers.read_text(encoding="utf-8"))["runs"]["tiny"]["rows"]}
    assert list(rows) == [
        cpu_decoder.REFERENCE,
        "torch eager bfloat16",
        "llama.cpp Q8_0",
        "qfx w8a16",
        "qfx w8a16 genai",
    ]
    reference, ours = rows[cpu_decoder.REFERENCE], rows["qfx w8a16"]
    assert reference["kld"] == pytest.approx(0, abs=1e-9) and reference["top1"] == 1
    assert 0 <= ours["kld"] < 1e-3 and ours["weights_bytes"] < reference["weights_bytes"]
    fastest = max(row["decode_per_s"] for name, row in rows.items() if "qfx" not in name and "failed" not in row)
    assert ours["decode_ratio"] == pytest.approx(ours["decode_per_s"] / fastest)
    assert rows["qfx w8a16 genai"]["kld"] == pytest.approx(ours["kld"], abs=1e-6)
    llama = rows["llama.cpp Q8_0"]
    assert llama.get("failed", "").startswith("ModuleNotFoundError") or llama["kld"] < 1e-3
    assert "qfx w8a16: decode " in said and "qfx w8a16 genai: decode " in said and "meanwhile" in said


@pytest.mark.slow
def test_prompts_by_integers_are_a_folder_of_their_own(tmp_path: Path) -> None:
    job = DecoderJob("tiny", 32, 2, 40, 1, str(tmp_path))
    with pytest.warns(QfxWarning, match="MatMulNBits rounds them to 8 bits"):
        plain, integers = (qfx_decoder.build(job, option) for option in ("w4a16", "w4a16 prefill"))
    assert integers.size > plain.size, "the weights lie there twice"
    assert plain.outputs is not None and integers.outputs is not None
    one, other = plain.outputs()[0], integers.outputs()[0]
    assert (one != other).any() and abs(one - other).max() < 0.1 * abs(one).max()
