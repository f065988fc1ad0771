"""Save a quantized model as a folder and load it again: safetensors and JSON, whole or not at all, checksummed."""

from __future__ import annotations

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
from qfx.format import Format
from qfx.modules import PackedSpec, QuantConv, QuantEmbedding, QuantLinear, pack_parameter
from qfx.packing import Packed

VERSION = 1
_JSON, _TENSORS = "qfx.json", "model.safetensors"
_KEYS = {"format", "version", "tensor_sha256", "class", "modules", "parameters", "tied"}
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write `model.safetensors`, `qfx.json` and, for a Hugging Face model, its config into `folder`.

    Files appear together or not at all. Tensors that are shared are stored once. Raises ValueError for a model that
    qfx did not quantize, OSError where the disk does not take it.
    """
    model = getattr(model, "_orig_mod", model)
    modules = {fqn: _describe(m) for fqn, m in model.named_modules() if isinstance(m, QuantLinear | QuantEmbedding)}
    parameters = {
        f"{fqn}.{name}" if fqn else name: {**asdict(spec), "dtype": _name(spec.dtype), "shape": list(spec.shape)}
        for fqn, m in model.named_modules()
        for name, spec in getattr(m, "qfx_packed", {}).items()
    }
    if not modules and not parameters:
        raise ValueError(
            explain("the model holds nothing that qfx quantized", next_step="call qfx.quantize(model, ...) before qfx.save")
        )
    tensors, tied = _state(model)
    fields = {
        "format": "qfx-model", "version": VERSION, "tensor_sha256": "", "class": type(model).__name__,
        "modules": modules, "parameters": parameters, "tied": tied,
    }  # fmt: skip
    config = getattr(model, "config", None)
    with staged(folder) as stage:
        dump_safetensors(stage(_TENSORS), tensors, {"format": "pt"})
        fields["tensor_sha256"] = sha256_file(stage(_TENSORS))
        if config is not None and hasattr(config, "to_json_string"):
            config_text = json.loads(config.to_json_string(use_diff=False))
            config_text["architectures"] = [_float_class(model).__name__]
            stage("config.json").write_text(json.dumps(config_text, indent=1) + "\n", encoding="utf-8")
        stage(_JSON).write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model of a folder that `save` wrote, in eval mode.

    model: a float model of the same structure, needed where the folder holds no Hugging Face config; its weights are
    replaced. Raises FileNotFoundError for missing files, ValueError for altered, truncated or unknown ones.
    """
    path = Path(folder)
    fields = _read(path / _JSON)
    tensors = read_safetensors(path / _TENSORS, sha256=str(fields["tensor_sha256"]))
    tensors |= {name: tensors[source] for name, source in fields["tied"].items()}
    if model is None:
        model = _skeleton(path)
    for fqn, record in fields["modules"].items():
        _put(model, fqn, _rebuild(fqn, record, tensors))
    for fqn, record in fields["parameters"].items():
        _repack(model, fqn, record, tensors)
    _fill(model, tensors)
    return model.eval()


def _describe(module: nn.Module) -> dict[str, Any]:
    assert isinstance(module, QuantLinear | QuantEmbedding)
    record: dict[str, Any] = {
        "kind": type(module).__name__, "w": module.w_format, "shape": list(module.shape), "dtype": _name(module.dtype)
    }  # fmt: skip
    if isinstance(module, QuantEmbedding):
        record["padding_idx"] = module.padding_idx
        return record
    record["x"] = module.x_format
    if isinstance(module, QuantConv):
        record |= {
            "kernel_size": list(module.kernel_size), "stride": list(module.stride), "padding": list(module.padding),
            "in_channels": module.in_channels,
        }  # fmt: skip
    return record


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and the names that share another name's tensor."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor.detach().contiguous()
    return stored, tied


def _rebuild(fqn: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    given = {leaf: _tensor(tensors, record, fqn, leaf) for leaf in ("w_codes", "w_scale")}
    optional = {leaf: tensors.get(_join(fqn, leaf)) for leaf in ("w_zero", "bias", "x_scale", "x_zero", "smooth")}
    fmt = Format.parse(str(record["w"]))
    packed = Packed(given["w_codes"], given["w_scale"], optional["w_zero"], fmt, tuple(record["shape"]))
    dtype = _DTYPES[record["dtype"]]
    if record["kind"] == "QuantEmbedding":
        return QuantEmbedding(packed, record["padding_idx"], dtype=dtype)
    bias = optional["bias"]
    static = {leaf: optional[leaf] for leaf in ("x_scale", "x_zero", "smooth")}
    formats: dict[str, Any] = {"x_format": record["x"], "dtype": dtype, **static}
    if record["kind"] == "QuantConv":
        return QuantConv(packed, _Conv(record, bias), **formats)
    return QuantLinear(packed, bias, **formats)


class _Conv(nn.Module):
    """What QuantConv asks of the convolution whose place it takes."""

    def __init__(self, record: Mapping[str, Any], bias: Tensor | None) -> None:
        super().__init__()
        self.kernel_size, self.stride = tuple(record["kernel_size"]), tuple(record["stride"])
        self.padding, self.in_channels = tuple(record["padding"]), record["in_channels"]
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def _repack(model: nn.Module, fqn: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    owner, _, name = fqn.rpartition(".")
    module = model.get_submodule(owner)
    parts = [tensors.get(_join(owner, f"{name}_{leaf}")) for leaf in ("w_codes", "w_scale", "w_zero")]
    if parts[0] is None or parts[1] is None or name not in module._parameters:
        raise _misfit(fqn, "no packed tensors or no such parameter")
    spec = PackedSpec(
        record["format"], tuple(record["shape"]), _DTYPES[record["dtype"]], record["transposed"], record["x_format"]
    )
    packed = Packed(parts[0], parts[1], parts[2], Format.parse(spec.format), spec.shape)
    pack_parameter(module, name, packed, transposed=spec.transposed, x_format=spec.x_format)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the model the stored tensors themselves; shared ones stay shared."""
    own = model.state_dict(keep_vars=True)
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise _misfit(", ".join((missing or unknown)[:3]), "missing in the file" if missing else "not in the model")
    model.load_state_dict(tensors, strict=True, assign=True)


def _skeleton(path: Path) -> nn.Module:
    if not (path / "config.json").is_file():
        raise ValueError(
            explain(
                f"{path} holds no config.json, so the model's class is not known",
                next_step="pass a float model of the same structure: qfx.load(folder, model)",
            )
        )
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        raise ValueError(
            explain(
                f"transformers has no class {config.architectures[0]!r}", next_step="pass the model: qfx.load(folder, model)"
            )
        )
    skeleton: nn.Module = kind._from_config(config, dtype=torch.float32)
    return skeleton


def _float_class(model: nn.Module) -> type:
    return getattr(type(model), "qfx_float_class", type(model))


def _put(model: nn.Module, fqn: str, new: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    try:
        setattr(model.get_submodule(parent), name, new)
    except AttributeError:
        raise _misfit(fqn, "the model has no such module") from None


def _tensor(tensors: Mapping[str, Tensor], record: Mapping[str, Any], fqn: str, leaf: str) -> Tensor:
    found = tensors.get(_join(fqn, leaf))
    if found is None:
        raise _misfit(_join(fqn, leaf), "missing in the file")
    return found


def _join(fqn: str, leaf: str) -> str:
    return f"{fqn}.{leaf}" if fqn else leaf


def _misfit(name: str, found: str) -> ValueError:
    return ValueError(
        explain(
            "the saved model does not fit",
            expected=f"a tensor or module {name!r} in the file and in the model",
            found=found,
            next_step="load into the model class that was saved",
        )
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(explain(f"{file} is missing", next_step="give a folder that qfx.save wrote"))
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(explain(f"{file} is truncated or altered: {error}", next_step="save the model again")) from error
    if not isinstance(fields, dict) or fields.get("format") != "qfx-model":
        raise ValueError(explain(f"{file} is no qfx model", expected="format 'qfx-model'"))
    if fields.get("version") != VERSION:
        raise ValueError(
            explain(f"{file} comes from another version", expected=f"version {VERSION}", found=fields.get("version"))
        )
    if unknown := sorted(set(fields) - _KEYS):
        raise ValueError(explain(f"{file} has unknown keys: {', '.join(unknown)}"))
    return fields
