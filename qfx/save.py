"""Save a quantized model as a folder and load it again: safetensors and JSON, whole or not at all, checksummed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import explain
from qfx.files import dump_safetensors, read_safetensors, sha256_file, staged
from qfx.mixed import QuantMixed
from qfx.modules import PackedSpec, QuantConv, QuantEmbedding, QuantLinear, quantized_parts
from qfx.rebuild import Saved, rebuild
from qfx.skeleton import CONFIG, GENERATION, skeleton

VERSION = 1
Quantized = QuantLinear | QuantEmbedding | QuantMixed
_JSON, _TENSORS = "qfx.json", "model.safetensors"
_KEYS = {
    "format", "version", "sha256", "files", "class", "dtype", "implementations", "modules", "parameters", "tied",
    "buffers",
}  # fmt: skip


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write `model.safetensors`, `qfx.json` and, for a Hugging Face model, its configs into `folder`.

    Files appear together or not at all. Tensors that are shared are stored once. Raises ValueError for a model that
    qfx did not quantize, OSError where the disk does not take it.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not quantized_parts(model):
        raise ValueError(
            explain(
                "the model holds nothing that qfx quantized", next_step="call qfx.quantize(model, ...) before qfx.save"
            )
        )
    tensors, tied = _state(model)
    config = getattr(model, "config", None)
    fields: dict[str, Any] = {
        "format": "qfx-model", "version": VERSION, "class": _float_class(model).__name__,
        "dtype": _name(_dtype_of(model)), "implementations": _implementations(config), "modules": _modules(model),
        "parameters": _parameters(model), "tied": tied,
        "buffers": {name: _name(b.dtype) for name, b in _passing_buffers(model).items()},
    }  # fmt: skip
    with staged(folder) as stage:
        dump_safetensors(stage(_TENSORS), tensors, {"format": "pt"})
        files = [_TENSORS]
        if config is not None and hasattr(config, "to_json_string"):
            stage(CONFIG).write_text(_config_text(model), encoding="utf-8")
            files.append(CONFIG)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            stage(GENERATION).write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
            files.append(GENERATION)
        fields["files"] = {name: sha256_file(stage(name)) for name in files}
        fields["sha256"] = _digest(fields)
        stage(_JSON).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model of a folder that `save` wrote, in eval mode; its outputs are those of the saved one, bit for bit.

    model: a float model of the same structure, needed where the folder holds no Hugging Face config; its weights are
    replaced. Raises FileNotFoundError for missing files, ValueError for altered, truncated or unknown ones and for a
    model that does not fit, which is then left as it was.
    """
    path = Path(folder)
    fields = _read(path / _JSON)
    for name, sha256 in fields["files"].items():
        if name != _TENSORS:
            _check_file(path / name, sha256)
    tensors = read_safetensors(path / _TENSORS, sha256=str(fields["files"][_TENSORS]))
    tensors |= {name: tensors[source] for name, source in fields["tied"].items()}
    if model is None:
        model = skeleton(path, dtype=getattr(torch, fields["dtype"]), implementations=fields["implementations"])
    elif done := quantized_parts(model):
        raise ValueError(explain("a float model is needed", found=f"{done[0]!r} is quantized already"))
    saved = Saved(fields["modules"], fields["parameters"], fields["buffers"], fields["tied"], tensors)
    return rebuild(model, saved).eval()


def _modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """FQN of each quantized module -> how to make it again; a module under several names is described once."""
    first: dict[int, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantized):
            name = first.setdefault(id(module), fqn)
            found[fqn] = _describe(module) if name == fqn else {"same": name}
    return found


def _describe(module: Quantized) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": type(module).__name__, "shape": list(module.shape), "dtype": _name(module.dtype),
        "sqnr_db": module.sqnr_db,
    }  # fmt: skip
    if isinstance(module, QuantMixed):
        parts = [[str(segment.format), [list(r) for r in segment.ranges]] for segment in module.segments]
        return {**record, "segments": parts, "axis": module.axis, "x": module.x_format}
    record["w"] = module.w_format
    if isinstance(module, QuantEmbedding):
        return {**record, "padding_idx": module.padding_idx}
    record["x"] = module.x_format
    if isinstance(module, QuantConv):
        record |= {
            "kernel_size": list(module.kernel_size), "stride": list(module.stride), "padding": list(module.padding),
            "in_channels": module.in_channels,
        }  # fmt: skip
    return record


def _parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    specs: dict[str, PackedSpec] = {
        f"{fqn}.{name}".lstrip("."): spec
        for fqn, m in model.named_modules()
        for name, spec in getattr(m, "qfx_packed", {}).items()
    }
    return {
        fqn: {**asdict(s), "dtype": _name(s.dtype), "shape": list(s.shape), "view": list(s.view)}
        for fqn, s in specs.items()
    }


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and the names that share another name's tensor."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"the state of {name!r} is no tensor but {type(tensor).__name__}, which cannot be stored")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor.detach().contiguous()
    return stored, tied


def _passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers that no state_dict has: they are made anew, and cast as the model was."""
    return {
        f"{fqn}.{name}".lstrip("."): buffer
        for fqn, m in model.named_modules()
        for name, buffer in m._buffers.items()
        if buffer is not None and name in m._non_persistent_buffers_set and buffer.is_floating_point()
    }


def _dtype_of(model: nn.Module) -> torch.dtype:
    found = [m.dtype for m in model.modules() if isinstance(m, Quantized)]
    found += [p.dtype for p in model.parameters() if p.is_floating_point()]
    return found[0] if found else torch.float32


def _implementations(config: Any) -> dict[str, str]:
    """Which attention and experts a transformers model runs: its config's JSON does not say."""
    found = {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _config_text(model: nn.Module) -> str:
    fields = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
    fields["architectures"] = [_float_class(model).__name__]
    return json.dumps(fields, indent=1) + "\n"


def _float_class(model: nn.Module) -> type:
    return getattr(type(model), "qfx_float_class", type(model))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(fields: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in fields.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()


def _check_file(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="copy the whole folder that qfx.save wrote"))
    if sha256_file(file) != sha256:
        raise ValueError(
            explain(
                f"{file} was altered or is truncated",
                next_step="copy it again; to change it, change the model and save",
            )
        )


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="give a folder that qfx.save wrote"))
    try:
        fields = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            explain(f"{file} is truncated or altered: {error}", next_step="copy it again, or save the model again")
        ) from error
    if not isinstance(fields, dict) or fields.get("format") != "qfx-model":
        raise ValueError(explain(f"{file} is no qfx model", expected="format 'qfx-model'"))
    if fields.get("version") != VERSION:
        raise ValueError(
            explain(
                f"{file} comes from another version of qfx",
                expected=f"version {VERSION}",
                found=fields.get("version"),
                next_step="install the version that wrote it, or quantize and save the model again",
            )
        )
    if fields.get("sha256") != _digest(fields) or set(fields) != _KEYS:
        raise ValueError(explain(f"{file} was altered", next_step="copy it again, or save the model again"))
    return fields
