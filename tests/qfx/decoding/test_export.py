"""Folders of models that write: all files or none, and what is told of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qfx
import qfx.onnx
from qfx.backends.onnx import genai
from qfx.decoding import encoder_decoder as pair
from qfx.errors import QfxWarning
from tests.zoo import ZOO


def export(model: nn.Module, folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.export_onnx(model, None, folder, **options)


def test_a_decoder_is_told_by_its_file(tmp_path: Path) -> None:
    model: Any = ZOO["llama"]()[0]
    written = export(model, tmp_path / "m", recipe="w8a8", external_bytes=0)
    assert [file.name for file in written.files] == ["model.onnx", "model.onnx.data"]
    assert written.path == tmp_path / "m" / "model.onnx"
    assert written.nbytes == sum(file.stat().st_size for file in written.files)
    assert written.shared_cache
    layers = model.config.num_hidden_layers
    assert len([name for name in written.inputs if name.startswith("past_key_values.")]) == 2 * layers
    assert written.outputs[0] == "logits" and len(written.outputs) == 1 + 2 * layers


def test_an_encoder_decoder_is_told_by_both_files(tmp_path: Path) -> None:
    written = export(ZOO["bart"]()[0], tmp_path / "m", external_bytes=0)
    assert {file.name for file in written.files} == {
        f"{n}{d}" for n in (pair.ENCODER, pair.DECODER) for d in ("", ".data")
    }
    assert written.path == tmp_path / "m" / pair.DECODER
    assert written.nbytes == sum(file.stat().st_size for file in written.files)
    assert written.shared_cache
    beside = tmp_path / "m" / f"{pair.ENCODER}.data"
    data = beside.read_bytes()
    beside.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"encoder.onnx.data was altered"):
        qfx.onnx.load(tmp_path / "m")


def test_a_folder_holds_the_model_that_was_exported_last(tmp_path: Path) -> None:
    """Nothing of the one before is left that would be taken for it, or that nothing reads."""
    decoder, seq2seq = ZOO["llama"]()[0], ZOO["bart"]()[0]
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    export(decoder, tmp_path / "m", external_bytes=0)
    alone, pairs = {"model.onnx", genai.CONFIG}, {pair.ENCODER, pair.DECODER, pair.DOCUMENT}
    beside = {"notes.txt", "config.json", "generation_config.json"}
    for model, names in ((seq2seq, pairs), (decoder, alone)):
        export(model, tmp_path / "m")
        assert {file.name for file in (tmp_path / "m").iterdir()} == names | beside
        assert qfx.onnx.load(tmp_path / "m").config.model_type == model.config.model_type  # type: ignore[union-attr]


def test_a_folder_is_as_before_where_an_export_fails(tmp_path: Path) -> None:
    export(ZOO["bart"]()[0], tmp_path / "m", external_bytes=0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    model: Any = ZOO["llama"]()[0]
    model.forward = lambda **_: type("Output", (), {"past_key_values": None})()
    with pytest.raises(qfx.UnsupportedError, match="keeps no plain cache"):
        export(model, tmp_path / "m")
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_a_model_without_a_plain_cache(tmp_path: Path) -> None:
    model: Any = ZOO["llama"]()[0]
    model.forward = lambda **_: type("Output", (), {"past_key_values": None})()
    with pytest.raises(qfx.UnsupportedError, match="keeps no plain cache"):
        export(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_folder_that_is_not_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the new model beside the old configuration."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model, other = (ZOO["llama"](seed=seed)[0] for seed in (0, 1))
    export(model, tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.setattr(genai, "write_config", interrupted)
    for folder in ("m", "new"):
        with pytest.raises(KeyboardInterrupt):
            export(other, tmp_path / folder)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise qfx.UnsupportedError("stop")

    model = ZOO["bart"]()[0]
    monkeypatch.setattr(pair, "capture_decoder", stop)
    with pytest.raises(qfx.UnsupportedError, match="stop"):
        export(model, tmp_path / "new" / "m")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / pair.ENCODER).write_text("kept")
    with pytest.raises(qfx.UnsupportedError, match="stop"):
        export(model, tmp_path / "old")
    assert [(p.name, p.read_text()) for p in (tmp_path / "old").iterdir()] == [(pair.ENCODER, "kept")]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_plan_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    plan = qfx.plan(nn.Linear(4, 4), "w8a8-static", [torch.randn(2, 4)])
    with pytest.raises(ValueError, match="the plan was made for another model"):
        export(ZOO[name]()[0], tmp_path / "m", plan=plan, strict=True)
    assert not (tmp_path / "m").exists()
