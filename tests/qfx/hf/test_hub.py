"""Models of transformers by folder or hub name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import enable_progress_bar, is_progress_bar_enabled

from qfx.errors import QfxWarning
from qfx.hf import hub

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def _bert(folder: Path) -> BertModel:
    model = BertModel(BertConfig(**SMALL)).half()
    model.save_pretrained(folder)
    return model


def test_a_folder_gives_the_class_its_config_names_in_float32(tmp_path: Path) -> None:
    saved = _bert(tmp_path)
    enable_progress_bar()  # an example that ran before in this process may have turned it off
    loaded = hub.load(tmp_path)
    assert type(loaded.model) is BertModel and not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    weight = "embeddings.word_embeddings.weight"
    assert torch.equal(loaded.model.get_parameter(weight), saved.get_parameter(weight).float())
    assert loaded.tokenizer is None
    assert loaded.folder == tmp_path
    assert not loaded.is_causal_lm
    assert is_progress_bar_enabled(), "what transformers shows is as it was"


def test_a_language_model_is_known_as_one(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    assert hub.load(str(tmp_path)).is_causal_lm


def test_weights_that_are_not_there_are_told(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [BertForMaskedLM.__name__]}))
    with pytest.warns(QfxWarning, match=r"weights of BertForMaskedLM .* hold random numbers: cls\.predictions"):
        hub.load(tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"no model folder\n  expected: config.json and weights\n  found: notes.txt"):
        hub.load(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt is a file"):
        hub.load(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="there is no folder"):
        hub.load(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the config of .* cannot be read"):
        hub.load(tmp_path)


def test_a_config_of_wrong_types_is_refused(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": []}))
    with pytest.raises(ValueError, match=r"the config of .* cannot be read: .*hidden_size.*expected int, got list"):
        hub.load(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"version": "1.p"}'])
def test_a_tokenizer_that_cannot_be_read_is_told(text: str, tmp_path: Path) -> None:
    _bert(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"the tokenizer of .* cannot be read: "):
        hub.load(tmp_path)


def test_weights_that_are_cut_short_or_of_another_model_are_refused(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(ValueError, match=r"the weights in .* are not those of BertModel, which its config.json names"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file \(\d+ bytes\)"):
        hub.load(tmp_path)


def test_an_unknown_class_is_refused(tmp_path: Path) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["OwnModel"]}))
    with pytest.raises(ValueError, match=r"has no class 'OwnModel'(.|\n)*qfx\.quantize"):
        hub.load(tmp_path)


def test_a_hub_name_without_network_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[bool] = []

    def no_network(name: str, *, local_files_only: bool = False, allow_patterns: list[str]) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(ValueError, match=r"'org/name' is no folder here, is not in the cache(.|\n)*next step"):
        hub.resolve("org/name")
    assert asked == [True, False], "the cache is asked before the network"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert hub.resolve("org/name") == tmp_path


def test_bytes_on_disk_counts_weights(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, size in (("a.safetensors", 7), ("config.json", 100), ("deep/b.bin", 5)):
        (tmp_path / name).write_bytes(bytes(size))
    assert hub.bytes_on_disk(tmp_path) == 12


@pytest.mark.parametrize(
    ("method", "step"),
    [("gptq", "qfx convert .* --to qfx"), ("bitsandbytes", "qfx convert"), ("torchao", "give the float model$")],
)
def test_what_another_library_quantized_is_refused(tmp_path: Path, method: str, step: str) -> None:
    _bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"is quantized already, by {method}\n  next step: .*{step}"):
        hub.load(tmp_path)
