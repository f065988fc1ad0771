"""Save a quantized model as a folder and load it again: safetensors and JSON, whole or not at all, checksummed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import explain, warn
from qfx.hf.attach import METHOD, attach, is_pretrained
from qfx.hf.quantization_config import recipe_of, unwrap, wrap
from qfx.kv.held import is_quantized
from qfx.kv.live import with_caches
from qfx.live.attending import attend
from qfx.live.modules import quantized_parts
from qfx.recipe import Recipe
from qfx.reporting.told import read, remember
from qfx.storage import checkpoint
from qfx.storage.describe import Record, describe, state
from qfx.storage.files import dump_safetensors, path_of, read_json, read_safetensors, sha256_file, sha256_text, staged
from qfx.storage.rebuild import Saved, rebuild
from qfx.storage.skeleton import CONFIG, GENERATION, skeleton

VERSION = 4  # 1: a byte for each zero point, 2: no caches, no attention, 3: no notes
_READ = (1, 2, 3, VERSION)
SHARD = 5_000_000_000  # bytes of a file of weights
_JSON = "qfx.json"
_KEYS = {
    "format", "version", "sha256", "files", "class", "dtype", "implementations", "modules", "parameters", "tied",
    "buffers", "centred", "caches", "attention", "notes",
}  # fmt: skip
# What files of a version have not, nor those of earlier ones.
_LATER: dict[int, dict[str, Any]] = {2: {"caches": {}, "attention": {}}, 3: {"notes": []}}


def save(model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, shard_bytes: int = SHARD) -> None:
    """Write `model.safetensors`, `qfx.json` and, for a Hugging Face model, its configs into `folder`.

    Files appear together or not at all. Tensors that are shared are stored once, and written one after the other: those
    of a model larger than memory (see `qfx.storage.streamed`) are never in it all at once. shard_bytes: weights beyond
    that are spread over `model-00001-of-00002.safetensors`, ... tokenizer: a tokenizer or processor of
    transformers, whose files (the chat template too) go beside them afterwards. transformers' own `from_pretrained`
    reads the folder, too, once qfx is imported. Raises ValueError for a model that qfx did not quantize, OSError where
    the disk does not take it.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not is_quantized(model):
        raise ValueError(
            explain(
                "the model holds nothing that qfx quantized",
                next_step="call qfx.quantize(model, ...) before qfx.save, or qfx.convert(model) after training",
            )
        )
    tensors, tied = state(model, _first(model))
    record = describe(model, tied)
    fields: dict[str, Any] = {"format": "qfx-model", "version": VERSION, **record}
    shards = checkpoint.shards(tensors, shard_bytes)
    with staged(folder) as stage:
        for name, names in shards.items():
            dump_safetensors(stage(name), {key: tensors[key] for key in names}, {"format": "pt"})
        files = list(shards)
        if len(shards) > 1:
            stage(checkpoint.INDEX).write_text(checkpoint.index_text(tensors, shards), encoding="utf-8")
            files.append(checkpoint.INDEX)
        if hasattr(getattr(model, "config", None), "to_json_string"):
            stage(CONFIG).write_text(_config_text(model, record, tensors), encoding="utf-8")
            files.append(CONFIG)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            stage(GENERATION).write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
            files.append(GENERATION)
        fields["files"] = {name: sha256_file(stage(name)) for name in files}
        fields["sha256"] = _digest(fields)
        stage(_JSON).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    _remove_former(Path(folder), files)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model of a folder that `save` or transformers' `save_pretrained` wrote, in eval mode; its outputs are those
    of the saved one, bit for bit.

    model: a float model of the same structure, needed where the folder holds no Hugging Face config; its weights are
    replaced. Raises FileNotFoundError for missing files, ValueError for altered, truncated or unknown ones and for a
    model that does not fit, which is then left as it was. Of transformers' own configs, which may be edited, that is a
    QfxWarning, as long as they are JSON.
    """
    path = path_of(folder)
    recipe: Recipe | None = None
    former = (path / CONFIG).is_file() and checkpoint.by_transformers(path)  # qfx.json, should there be one
    if not former and ((path / _JSON).is_file() or not (path / CONFIG).is_file()):
        fields = _read(path / _JSON)
        for name, sha256 in fields["files"].items():
            if not name.endswith(checkpoint.SUFFIX):
                _check_file(path / name, sha256)
        tensors: dict[str, Tensor] = {}
        for name, sha256 in fields["files"].items():
            if name.endswith(checkpoint.SUFFIX):
                tensors |= read_safetensors(path / name, sha256=str(sha256))
        if CONFIG in fields["files"]:
            recipe = _from_config(path)[0]
    else:
        recipe, found = _from_config(path)
        if found is None:
            raise FileNotFoundError(
                explain(
                    f"{path / _JSON} is missing, and {CONFIG} has no quantization_config of qfx",
                    next_step="give a folder that qfx.save, or save_pretrained of a quantized model, wrote",
                )
            )
        fields, tensors = found, checkpoint.read(checkpoint.files_of(path), found["tensors"])
    tensors |= {name: tensors[source] for name, source in fields["tied"].items() if source in tensors}
    if model is None:
        dtype, names = getattr(torch, fields["dtype"]), fields["implementations"]
        model = skeleton(path, fields["class"], dtype=dtype, implementations=names)
    elif done := quantized_parts(model):
        raise ValueError(explain("a float model is needed", found=f"{done[0]!r} is quantized already"))
    saved = Saved(
        fields["modules"], fields["parameters"], fields["buffers"], fields["tied"], tensors, tuple(fields["centred"])
    )
    live = attend(rebuild(model, saved).eval(), fields["attention"])
    remember(live, read(fields["notes"]))
    return attach(with_caches(live, fields["caches"]), recipe)


def _remove_former(folder: Path, files: list[str]) -> None:
    """Remove the weights of a model that was here before, which transformers would read, or which nothing reads."""
    for path in folder.glob(f"model*{checkpoint.SUFFIX}*"):
        if path.name not in files and checkpoint.NAMES.fullmatch(path.name):
            path.unlink()


def _from_config(path: Path) -> tuple[Recipe | None, Record | None]:
    """What the quantization_config of a folder says; (None, None) where it has none of qfx."""
    fields = read_json(path / CONFIG, "copy it again").get("quantization_config")
    if not isinstance(fields, dict) or fields.get("quant_method") != METHOD:
        return None, None
    return unwrap(fields, f"quantization_config in {path / CONFIG}")


def _first(model: nn.Module) -> str:
    """Of tied tensors the one inside the base model is stored, which AutoModel of the folder reads, too."""
    prefix = getattr(model, "base_model_prefix", "")
    return f"{prefix}." if prefix else ""


def _config_text(model: nn.Module, record: Record, tensors: Mapping[str, Tensor]) -> str:
    fields = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    fields["architectures"] = [record["class"]]
    if is_pretrained(model):
        fields["quantization_config"] = wrap(recipe_of(model), {**record, "tensors": checkpoint.digests(tensors)})
    return json.dumps(fields, indent=1) + "\n"


def _digest(fields: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps({k: v for k, v in fields.items() if k != "sha256"}, sort_keys=True))


def _check_file(file: Path, sha256: str) -> None:
    """People edit the configs of transformers, which is a warning; anything else that was altered is an error."""
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="copy the whole folder that qfx.save wrote"))
    if sha256_file(file) == sha256:
        return
    what = f"{file} was altered or is truncated"
    if file.name not in (CONFIG, GENERATION):
        raise ValueError(explain(what, next_step="copy it again; to change it, change the model and save"))
    read_json(file, "copy it again")
    warn(explain(f"{file} was altered", next_step="nothing, if you changed it; else copy it again"), "")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="give a folder that qfx.save wrote"))
    fields = read_json(file, "copy it again, or save the model again")
    if fields.get("format") != "qfx-model":
        raise ValueError(explain(f"{file} is no qfx model", expected="format 'qfx-model'"))
    if fields.get("version") not in _READ:
        raise ValueError(
            explain(
                f"{file} comes from another version of qfx",
                expected=f"version {VERSION} or earlier",
                found=fields.get("version"),
                next_step="install the version that wrote it, or quantize and save the model again",
            )
        )
    missing = {key: value for last, new in _LATER.items() if fields["version"] <= last for key, value in new.items()}
    if fields.get("sha256") != _digest(fields) or set(fields) | set(missing) != _KEYS:
        raise ValueError(explain(f"{file} was altered", next_step="copy it again, or save the model again"))
    return {**missing, **fields}
