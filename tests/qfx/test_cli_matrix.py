"""`qfx compare MODEL --recipes` from the arguments to the files it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.live import Live
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


@pytest.fixture
def one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """A console shows one thing that moves, as rich before 14.1 has it."""
    showing: list[Console] = []
    start, stop = Console.set_live, Console.clear_live

    def started(console: Console, live: Live) -> Any:
        assert console not in showing, "a second display"
        showing.append(console)
        return start(console, live)

    def stopped(console: Console) -> None:
        showing.remove(console)
        stop(console)

    monkeypatch.setattr(Console, "set_live", started)
    monkeypatch.setattr(Console, "clear_live", stopped)


@pytest.mark.usefixtures("one_display")
@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("matrix.compare_recipes", ["compare", "--recipes", "w8a8", "--seq-len", "16", "--samples", "4"]),
        ("advise.advise", ["advise", "--device", "h100", "--seq-len", "16"]),
    ],
)
def test_one_spinner_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch, place: str, arguments: list[str]) -> None:
    def asked(*_: object, told: Callable[[str], None], **__: object) -> None:
        told("at work")
        raise ValueError("this far")

    monkeypatch.setattr(f"qfx.cli.{place}", asked)
    command, *options = arguments
    result = run(command, model, *options, "--data", model / "text.txt")
    assert result.exit_code == 2 and "this far" in result.output, result.output


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3", encoding="utf-8")
    result = run("compare", model, "--recipes", "w8a8", "--data", tmp_path / "short.txt", "--seq-len", 16)
    assert result.exit_code == 2 and "cannot be cut into calibration and evaluation" in result.output


def test_one_form_or_the_other(model: Path) -> None:
    both, neither = run("compare", model, model, "--recipes", "w8a8"), run("compare", model)
    assert both.exit_code == 2 and "--recipes takes one MODEL, found two" in both.output
    assert neither.exit_code == 2 and "expected QUANTIZED and MODEL, found one of them" in neither.output


def test_a_picture_of_an_unknown_kind_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    result = run("compare", model, "--recipes", "w8a8", "--plot", tmp_path / "m.foo")
    assert result.exit_code == 2 and "no picture is written in this format" in result.output, result.output
    assert ".png or .svg" in result.output and "load" not in result.output
