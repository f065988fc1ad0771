"""`qfx compare MODEL --recipes` from the arguments to the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests.qfx.commands import run, save

WORDS = " ".join(f"w{i * 7 % 59 + 1} w{i * i % 59 + 1} w{i % 5 + 1}" for i in range(400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("model"), LlamaForCausalLM, LlamaConfig)
    (folder / "text.txt").write_text(WORDS, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_matrix_with_plot(model: Path, tmp_path: Path) -> None:
    result = run(
        "compare", model, "--recipes", "w8a8, w8a8-static,none", "--data", model / "text.txt", "--samples", 4,
        "--calibration", 8, "--seq-len", 16, "--repeats", 1,
        "--json", tmp_path / "m.json", "--plot", tmp_path / "m.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "m.json").read_text())
    assert [row["recipe"] for row in found["rows"]] == ["float", "w8a8", "w8a8-static", "none"]
    assert found["shape"] == [4, 16] and found["batches"] == 1
    for row in found["rows"][:3]:
        assert row["memory"] > 50e6 and row["accuracy"]["perplexity"] > 1 and row["latency"]["cold"] > 0
    assert 0 < found["rows"][1]["accuracy"]["kld"] < 0.01
    assert "none: no numbers: unknown preset 'none'" in result.output
    assert "no other recipe is both smaller and nearer: w8a8" in result.output
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3", encoding="utf-8")
    result = run("compare", model, "--recipes", "w8a8", "--data", tmp_path / "short.txt", "--seq-len", 16)
    assert result.exit_code == 2 and "cannot be cut into calibration and evaluation" in result.output


def test_one_form_or_the_other(model: Path) -> None:
    both, neither = run("compare", model, model, "--recipes", "w8a8"), run("compare", model)
    assert both.exit_code == 2 and "--recipes takes one MODEL, found two" in both.output
    assert neither.exit_code == 2 and "expected QUANTIZED and MODEL, found one of them" in neither.output
