"""The folder of a checkpoint: configs, shards, and files that are cut short or missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qfx.interop.checkpoint import Checkpoint


def made(folder: Path, *, shards: int = 1, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    config.setdefault("quantization_config", {"quant_method": "gptq"})
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"t{i}": torch.full((i + 1, 64), float(i)) for i in range(4)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index: dict[str, str] = {}
    for number in range(shards):
        names = list(tensors)[number::shards]
        save_file({name: tensors[name] for name in names}, folder / f"s{number}.safetensors")
        index |= dict.fromkeys(names, f"s{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_tensors_are_found_in_their_files(shards: int, tmp_path: Path) -> None:
    opened = Checkpoint.open(made(tmp_path, shards=shards))
    assert opened.shapes == {f"t{i}": (i + 1, 64) for i in range(4)}
    assert len(set(opened.files.values())) == shards
    found = opened.tensors(["t3", "t0"])
    assert found.keys() == {"t0", "t3"} and torch.equal(found["t3"], torch.full((4, 64), 3.0))


def test_a_single_file_of_another_name(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-128g.safetensors")
    assert len(Checkpoint.open(tmp_path).files) == 4


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": None, "text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
        ({"quantization_config": None, "compression_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)  # fmt: skip
def test_where_the_config_may_stand(config: dict[str, object], method: str, tmp_path: Path) -> None:
    assert Checkpoint.open(made(tmp_path, **config)).quantization["quant_method"] == method  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_config_of_its_own(name: str, method: str, tmp_path: Path) -> None:
    made(tmp_path, quantization_config=None)
    with pytest.raises(ValueError, match=r"has no quantization_config(.|\n)*qfx.load"):
        Checkpoint.open(tmp_path)
    (tmp_path / name).write_text(json.dumps({"bits": 4}))
    assert Checkpoint.open(tmp_path).quantization == {"quant_method": method, "bits": 4}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_file_cut_short_is_named(shards: int, tmp_path: Path) -> None:
    made(tmp_path, shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated or no safetensors file(.|\n)*copy the file again"):
        Checkpoint.open(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="truncated"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    made(tmp_path, shards=3)
    (tmp_path / "s1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard .*s1.safetensors is missing(.|\n)*3 shards"):
        Checkpoint.open(tmp_path)


def test_an_index_that_does_not_fit_is_told(tmp_path: Path) -> None:
    made(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())["weight_map"]
    for weight_map, message in (
        ({**index, "t9": "s0.safetensors"}, r"s0.safetensors does not hold 't9'"),
        ({**index, "t0": "../s0.safetensors"}, r"names '../s0.safetensors'"),
        ({}, "has no weight_map"),
    ):
        file.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        Checkpoint.open(tmp_path / "nowhere")
    made(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no weights(.|\n)*pickled weights are not read"):
        Checkpoint.open(tmp_path)
    for text, message in (("{", "truncated or no JSON"), ("[]", "is no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Checkpoint.open(tmp_path)
