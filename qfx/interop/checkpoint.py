"""A folder of `config.json` and safetensors, one file or several with an index: read lazily, checked when opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qfx.errors import explain
from qfx.storage.files import path_of, read_json

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
# What older libraries wrote beside a config.json that says nothing of quantization.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """folder: where it lies. config: of config.json. quantization: its quantization_config.

    files, shapes: tensor -> the file that holds it, its shape.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    files: Mapping[str, Path]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read the configs and the headers of all files, no tensor.

        Raises FileNotFoundError for a missing folder, config or shard, ValueError for a file that is cut short, an
        index that does not fit its shards, and a config without quantization_config.
        """
        path = path_of(folder)
        config = _read_json(path / CONFIG)
        quantization, files = _quantization(path, config), _files(path)
        headers = {file: _header(file) for file in dict.fromkeys(files.values())}
        shapes = {name: headers[file][name] for name, file in files.items()}
        return cls(path, config, quantization, files, shapes)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those tensors, on the CPU; each file is opened once."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name) for name in wanted}
        return found


def _quantization(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    for held in (
        config.get("quantization_config"),
        text.get("quantization_config") if isinstance(text, dict) else None,
    ):
        if isinstance(held, dict):
            return held
    if isinstance(config.get("compression_config"), dict):  # compressed-tensors' first name for it
        return dict(config["compression_config"])
    for name, method in _BESIDE.items():
        if (path / name).is_file():
            return {"quant_method": method, **_read_json(path / name)}
    raise ValueError(
        explain(
            f"{path / CONFIG} has no quantization_config",
            expected="a checkpoint that compressed-tensors, GPTQ, AWQ or bitsandbytes wrote",
            next_step="load a float model by transformers, a model that qfx saved by qfx.load",
        )
    )


def _files(path: Path) -> dict[str, Path]:
    if (path / INDEX).is_file() and not (path / SINGLE).is_file():
        return _indexed(path)
    if not (path / SINGLE).is_file():
        found = sorted(p.name for p in path.glob("*.safetensors"))
        if len(found) == 1:  # gptq_model-4bit-128g.safetensors and the like
            return dict.fromkeys(_header(path / found[0]), path / found[0])
        raise FileNotFoundError(
            explain(
                f"{path} holds no weights",
                expected=f"{SINGLE}, or {INDEX} and its shards",
                found=", ".join(found) or "no safetensors file (pickled weights are not read)",
            )
        )
    return dict.fromkeys(_header(path / SINGLE), path / SINGLE)


def _indexed(path: Path) -> dict[str, Path]:
    index = _read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(explain(f"{path / INDEX} has no weight_map", next_step="copy it again"))
    held: dict[str, dict[str, tuple[int, ...]]] = {}
    for shard in sorted(set(index.values())):
        if shard != Path(shard).name:
            raise ValueError(explain(f"{path / INDEX} names {shard!r}", expected="names of files in the same folder"))
        if not (path / shard).is_file():
            raise FileNotFoundError(
                explain(
                    f"the shard {path / shard} is missing",
                    expected=f"{len(set(index.values()))} shards, as {INDEX} lists them",
                    next_step="copy the whole checkpoint",
                )
            )
        held[shard] = _header(path / shard)
    for name, shard in index.items():
        if name not in held[shard]:
            raise ValueError(
                explain(
                    f"{path / shard} does not hold {name!r}, which {INDEX} promises",
                    next_step="copy the index and the shards again, all of one checkpoint",
                )
            )
    return {name: path / shard for name, shard in index.items()}


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, from the head of the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            explain(
                f"{file} is truncated or no safetensors file ({file.stat().st_size} bytes): {error}",
                next_step="copy the file again",
            )
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="give the folder of a checkpoint"))
    return read_json(file, "copy it again")
