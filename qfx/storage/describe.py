"""What a saved model says of itself: how each quantized module is made again, and which tensors are to be stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from qfx.format import dtype_name
from qfx.kv.held import caches_of
from qfx.live.attending import specs_of
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantConv, QuantEmbedding, QuantLinear
from qfx.live.parameters import PackedSpec
from qfx.reporting.told import written
from qfx.rewrites.centred import is_centred

Quantized = QuantLinear | QuantEmbedding | QuantMixed
Record = dict[str, Any]


def describe(model: nn.Module, tied: Mapping[str, str]) -> Record:
    """The JSON-able record of a quantized model: class, dtype, implementations, modules, parameters, tied, buffers,
    centred, caches, attention, notes."""
    return {
        "class": float_class(model).__name__, "dtype": dtype_name(_dtype_of(model)),
        "implementations": _implementations(getattr(model, "config", None)), "modules": _modules(model),
        "parameters": _parameters(model), "tied": dict(tied),
        "buffers": {name: dtype_name(b.dtype) for name, b in passing_buffers(model).items()},
        "centred": [name for name, module in model.named_modules() if is_centred(module)],
        "caches": caches_of(model),
        "attention": specs_of(model),
        "notes": written(model),
    }  # fmt: skip


def state(model: nn.Module, first: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to store, and the names that share another name's tensor: name -> the name that is stored.

    first: of shared tensors a name that starts with this is stored, else the first in order. Raises ValueError for a
    state that is no tensor.
    """
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    named = model.state_dict()
    for name in sorted(named, key=lambda name: not name.startswith(first)):
        tensor = named[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"the state of {name!r} is no tensor but {type(tensor).__name__}, which cannot be stored")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key] = name
            stored[name] = tensor.detach().contiguous()
    return {name: stored[name] for name in named if name in stored}, tied


def passing_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers that no state_dict has: they are made anew, and cast as the model was."""
    return {
        f"{fqn}.{name}".lstrip("."): buffer
        for fqn, m in model.named_modules()
        for name, buffer in m._buffers.items()
        if buffer is not None and name in m._non_persistent_buffers_set and buffer.is_floating_point()
    }


def float_class(model: nn.Module) -> type:
    """The class that the model had before a parameter of its own was packed."""
    return getattr(type(model), "qfx_float_class", type(model))


def grouped(named: Mapping[str, Mapping[str, Any]]) -> list[Record]:
    """Descriptions by name, equal ones told once: `{..., "names": [...]}`; `spread` is the way back."""
    groups: dict[str, Record] = {}
    for name, fields in named.items():
        rest = {key: value for key, value in fields.items() if key != "sqnr_db"}
        group = groups.setdefault(json.dumps(rest, sort_keys=True), {**rest, "names": [], "sqnr_db": []})
        group["names"].append(name)
        group["sqnr_db"].append(fields.get("sqnr_db"))
    for group in groups.values():
        if all(value is None for value in group["sqnr_db"]):
            del group["sqnr_db"]
    return list(groups.values())


def spread(groups: Sequence[Mapping[str, Any]], *, sqnr: bool) -> dict[str, Record]:
    """Descriptions by name of what `grouped` gave. sqnr: those of modules have a `sqnr_db`, which may be None."""
    found: dict[str, Record] = {}
    for group in groups:
        fields = {key: value for key, value in group.items() if key not in ("names", "sqnr_db")}
        values = group.get("sqnr_db") or [None] * len(group["names"])
        for name, value in zip(group["names"], values, strict=True):
            found[name] = {**fields, "sqnr_db": value} if sqnr and "same" not in fields else dict(fields)
    return found


def _modules(model: nn.Module) -> dict[str, Record]:
    """FQN of each quantized module -> how to make it again; a module under several names is described once."""
    first: dict[int, str] = {}
    found: dict[str, Record] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantized):
            name = first.setdefault(id(module), fqn)
            found[fqn] = _describe(module) if name == fqn else {"same": name}
    return found


def _describe(module: Quantized) -> Record:
    record: Record = {
        "kind": type(module).__name__, "shape": list(module.shape), "dtype": dtype_name(module.dtype),
        "sqnr_db": module.sqnr_db,
    }  # fmt: skip
    if isinstance(module, QuantMixed):
        parts = [
            [str(s.format), [list(r) for r in s.ranges], *(["float_input"] if s.float_input else [])]
            for s in module.segments
        ]
        return {**record, "segments": parts, "axis": module.axis, "x": module.x_format, **_rotation(module)}
    record["w"] = module.w_format
    if isinstance(module, QuantEmbedding):
        return {**record, "padding_idx": module.padding_idx}
    record |= {"x": module.x_format, **_rotation(module)}
    if isinstance(module, QuantConv):
        record |= {
            "kernel_size": list(module.kernel_size), "stride": list(module.stride), "padding": list(module.padding),
            "in_channels": module.in_channels,
        }  # fmt: skip
    return record


def _rotation(module: QuantLinear | QuantMixed) -> Record:
    return {} if module.rotation is None else {"rotation": list(module.rotation)}


def _parameters(model: nn.Module) -> dict[str, Record]:
    specs: dict[str, PackedSpec] = {
        f"{fqn}.{name}".lstrip("."): spec
        for fqn, m in model.named_modules()
        for name, spec in getattr(m, "qfx_packed", {}).items()
    }
    return {
        fqn: {**asdict(s), "dtype": dtype_name(s.dtype), "shape": list(s.shape), "view": list(s.view)}
        for fqn, s in specs.items()
    }


def _dtype_of(model: nn.Module) -> torch.dtype:
    found = [m.dtype for m in model.modules() if isinstance(m, Quantized)]
    found += [p.dtype for p in model.parameters() if p.is_floating_point()]
    return found[0] if found else torch.float32


def _implementations(config: Any) -> dict[str, Any]:
    """Which attention and experts a transformers model runs: its config's JSON does not say."""
    found = {name: _implementation(config, f"_{name}") for name in ("attn_implementation", "experts_implementation")}
    return {name: value for name, value in found.items() if isinstance(value, str | dict)}


def _implementation(config: Any, name: str) -> Any:
    """A word for the whole model, or one for each part that has a config of its own, as transformers takes them."""
    own = getattr(config, name, None)
    parts = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", ())}
    each = {key: _implementation(part, name) for key, part in parts.items() if part is not None}
    return own if all(value == own for value in each.values()) else {"": own, **each}
