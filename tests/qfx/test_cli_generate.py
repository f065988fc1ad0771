"""`qfx generate`: the file of texts, what can be made with it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from qfx.data import read_texts
from tests.qfx.commands import run, save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), LlamaForCausalLM, LlamaConfig)


def test_a_text_a_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    result = run("generate", folder, "-o", file, "--samples", 5, "--seq-len", 12)
    assert result.exit_code == 0, result.output
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert texts == read_texts(file) and len(texts) == 5
    assert all(word.startswith("w") for text in texts for word in text.split())
    assert all(8 <= len(text.split()) <= 12 for text in texts)
    assert "5 texts of 12 tokens" in result.output and texts[0][:20] in result.output
    again = tmp_path / "again.jsonl"
    assert run("generate", folder, "-o", again, "--samples", 5, "--seq-len", 12).exit_code == 0
    assert again.read_bytes() == file.read_bytes()


def test_a_model_is_calibrated_on_its_text(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    assert run("generate", folder, "-o", file, "--samples", 8, "--seq-len", 32).exit_code == 0
    out = tmp_path / "out"
    result = run("quantize", folder, "-o", out, "--recipe", "w4a16-gptq", "--data", file, "--seq-len", 32)
    assert result.exit_code == 0, result.output
    assert (out / "model.safetensors").is_file()


def test_what_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    result = run("generate", tmp_path / "nowhere", "-o", tmp_path / "own.txt")
    assert result.exit_code == 2 and "a name that ends in .jsonl" in " ".join(result.output.split())
    assert run("generate", tmp_path / "nowhere", "-o", tmp_path / "own.jsonl").exit_code == 2
    assert run("generate", tmp_path, "-o", tmp_path / "own.jsonl", "--samples", 0).exit_code == 2


def test_models_that_cannot_are_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    result = run("generate", folder, "-o", file, "--seq-len", 65)
    assert result.exit_code == 2 and "the model takes 64 tokens" in result.output
    result = run("generate", folder, "-o", file, "--temperature", 0)
    assert result.exit_code == 2 and "temperature must be above 0" in result.output
    bert = save(tmp_path / "bert", BertModel, BertConfig)
    result = run("generate", bert, "-o", file)
    assert result.exit_code == 2 and "does not write text of its own" in " ".join(result.output.split())
    bare = tmp_path / "bare"
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(bare)
    result = run("generate", bare, "-o", file)
    assert result.exit_code == 2 and "has no tokenizer" in " ".join(result.output.split())
    assert not file.exists()
