"""What is wrong with a folder is said by name, whoever opens it: from_pretrained or qfx.load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import qfx
from qfx.live.parameters import LOADING
from qfx.storage.checkpoint import INDEX
from tests.tiny import CLASSES, build, logits

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
Open = Callable[[Path], Any]
BOTH = pytest.mark.parametrize(
    "open_", [tf.AutoModelForCausalLM.from_pretrained, qfx.load], ids=["from_pretrained", "qfx.load"]
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards that save_pretrained wrote, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    qfx.quantize(build("tied"), "w8a8").save_pretrained(folder, max_shard_size="4KB")  # type: ignore[operator]
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def shard_of(folder: Path, name: str) -> Path:
    index: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / next(file for tensor, file in index.items() if tensor.endswith(name))


def change_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


@BOTH
def test_the_folder_is_good(open_: Open, folder: Path) -> None:
    loaded = open_(folder)
    assert torch.isfinite(logits(loaded)).all()
    assert not any(LOADING in module.__dict__ for module in loaded.modules())


@BOTH
def test_a_missing_shard_is_named(open_: Open, folder: Path) -> None:
    shard = shard_of(folder, "up_proj.w_codes")
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        open_(folder)


@BOTH
def test_a_file_cut_short_is_named(open_: Open, folder: Path) -> None:
    shard = shard_of(folder, "up_proj.w_codes")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or no safetensors file \(\d+ bytes\)"):
        open_(folder)


@BOTH
@pytest.mark.parametrize("name", ["up_proj.w_codes", "up_proj.w_scale", "model.norm.weight"])
def test_an_altered_tensor_is_named(open_: Open, name: str, folder: Path) -> None:
    shard = shard_of(folder, name)
    tensors = load_file(shard)
    key = next(k for k in tensors if k.endswith(name))
    raw = tensors[key].reshape(-1).view(torch.uint8)
    raw[1] = raw[1] ^ 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors in .* were altered: {key}\n(.|\n)*copy the files again"):
        open_(folder)


@BOTH
def test_a_tensor_that_was_taken_out_is_named(open_: Open, folder: Path) -> None:
    shard = shard_of(folder, "up_proj.w_scale")
    tensors = load_file(shard)
    key = next(k for k in tensors if k.endswith("up_proj.w_scale"))
    del tensors[key]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 tensors are not in .*: {key}\n"):
        open_(folder)


@BOTH
def test_another_version_is_told(open_: Open, folder: Path) -> None:
    change_config(folder, lambda fields: fields["quantization_config"].update(version=9, qfx="9.0"))
    with pytest.raises(ValueError, match=r"another version of qfx(.|\n)*version 9, written by qfx 9\.0"):
        open_(folder)


@BOTH
def test_an_unknown_recipe_is_told(open_: Open, folder: Path) -> None:
    change_config(folder, lambda fields: fields["quantization_config"].update(recipe="w8a7"))
    with pytest.raises(ValueError, match=r"unknown preset 'w8a7', did you mean 'w8a8'\?"):
        open_(folder)


@BOTH
def test_an_architecture_of_other_sizes_is_told(open_: Open, folder: Path) -> None:
    change_config(folder, lambda fields: fields.update(intermediate_size=56))
    with pytest.raises(ValueError, match=r"does not fit(.|\n)*(56|up_proj)"):
        open_(folder)


@BOTH
def test_an_architecture_of_fewer_layers_is_told(open_: Open, folder: Path) -> None:
    change_config(folder, lambda fields: fields.update(num_hidden_layers=0))
    with pytest.raises(ValueError, match=r"does not fit(.|\n)*model\.layers\.0\.self_attn\.q_proj"):
        open_(folder)


@pytest.mark.filterwarnings("ignore:You are using a model of type")
def test_another_class_is_told(folder: Path) -> None:
    message = r"the saved model does not fit BertModel(.|\n)*a LlamaForCausalLM(.|\n)*LlamaForCausalLM\.from_pretrained"
    with pytest.raises(ValueError, match=message):
        tf.BertModel.from_pretrained(folder)


def test_a_config_without_the_record_is_told(folder: Path) -> None:
    change_config(folder, lambda fields: fields["quantization_config"].pop("model"))
    with pytest.raises(ValueError, match=r"but not how: quantization_config has no 'model'(.|\n)*save_pretrained"):
        tf.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"qfx\.json is missing, and config\.json has no quantization_config"):
        qfx.load(folder)


def test_a_float_folder_is_no_quantized_one(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no quantization_config of qfx\n  next step: give a folder that"):
        qfx.load(tmp_path)


def test_a_config_that_is_no_json_is_told(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": ')
    with pytest.raises(ValueError, match=r"config\.json is truncated or no JSON"):
        qfx.load(folder)


def test_weights_come_from_files(folder: Path) -> None:
    config = tf.AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="a quantized model is read from its files, found a state_dict"):
        tf.LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


def test_the_disk_is_no_place_for_packed_weights(folder: Path) -> None:
    pytest.importorskip("accelerate")
    with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
        tf.AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"})


def test_files_may_be_spread_anew(folder: Path, tmp_path: Path) -> None:
    wanted = logits(qfx.load(folder))
    tensors = {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(folder / "config.json", one)
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(CLASSES["tied"].from_pretrained(one)), wanted)
    assert torch.equal(logits(qfx.load(one)), wanted)
