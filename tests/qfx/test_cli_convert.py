"""`qfx convert`: from what qfx wrote and from one checkpoint to another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import qfx
from tests.interop import llama, logits, pack, same
from tests.qfx.commands import run


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    qfx.save(pack(llama(), "i4/g32/f16"), folder)
    inner = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("layout", "method"), [("compressed-tensors", "compressed-tensors"), ("gptq", "gptq"), ("awq", "awq")]
)
def test_a_saved_model_is_converted(saved: Path, tmp_path: Path, layout: str, method: str) -> None:
    result = run("convert", saved, tmp_path / "out", "--to", layout, "--strict")
    assert result.exit_code == 0, result.stderr
    assert "on disk" in result.stdout and (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == method
    assert same(qfx.load(saved), qfx.import_checkpoint(tmp_path / "out"))


def test_from_layout_to_layout_and_back(saved: Path, tmp_path: Path) -> None:
    steps = ["gptq", "awq", "compressed-tensors", "qfx"]
    source = saved
    for layout in steps:
        result = run("convert", source, tmp_path / layout, "--to", layout, "--strict")
        assert result.exit_code == 0, result.stderr
        source = tmp_path / layout
    assert torch.equal(logits(qfx.load(source)), logits(qfx.load(saved)))
    assert (source / "qfx.json").is_file() and (source / "tokenizer.json").is_file()


def test_what_is_refused(saved: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([saved, tmp_path / "out", "--to", "bnb"], "can hold none of the 14 quantized linears"),
        ([tmp_path / "none", tmp_path / "out", "--to", "awq"], "there is no folder"),
        ([saved, saved, "--to", "awq"], "it is the model itself"),
        ([saved, saved / "config.json", "--to", "awq"], "it is a file"),
        ([saved, tmp_path / "out", "--to", "gguf"], "'gguf' is not one of"),
    ):
        result = run("convert", *arguments)
        assert result.exit_code == 2 and message in result.stderr, (message, result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_loss_is_a_warning_or_under_strict_an_error(tmp_path: Path) -> None:
    qfx.save(pack(llama(), "i4/g32"), tmp_path / "saved")
    result = run("convert", tmp_path / "saved", tmp_path / "out", "--to", "gptq")
    assert result.exit_code == 0 and "warning" in result.stderr and "scales are float16" in result.stderr
    result = run("convert", tmp_path / "saved", tmp_path / "strict", "--to", "gptq", "--strict")
    assert result.exit_code == 2 and "strict=True" in result.stderr
