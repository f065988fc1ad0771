"""A saved model put together: quantized modules and packed parameters in a float model of the same structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import explain
from qfx.format import Format
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantConv, QuantEmbedding, QuantLinear, take_place, tell_shared, without_fast_paths
from qfx.live.parameters import PackedSpec, pack_parameter
from qfx.live.permuted import QuantPermuted
from qfx.live.segments import Segment, stem_of
from qfx.packing import Packed
from qfx.rewrites.centred import can_be_centred, centred

_PACKED = ("w_codes", "w_scale", "w_zero")
_LEAF = re.compile(r"(w|rows\d+|columns\d+)_(codes|scale|zero)$")


@dataclass(frozen=True)
class Saved:
    """modules, parameters: FQN -> how to make the quantized one again. buffers: FQN -> dtype of those not stored.

    tied: name -> the name whose tensor it shares. tensors: every name -> its tensor. centred: FQNs of norms whose
    input has no mean.
    """

    modules: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, Any]]
    buffers: Mapping[str, str]
    tied: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    centred: tuple[str, ...] = ()


def rebuild(model: nn.Module, saved: Saved) -> nn.Module:
    """Fill `model` and return it (or what stands in its place where it is itself a bare linear layer).

    Raises ValueError, before anything is changed, where model and tensors do not fit.
    """
    _check_fit(model, saved)
    return _filled(put(model, saved), saved)


def put(model: nn.Module, saved: Saved) -> nn.Module:
    """Put the quantized modules and packed parameters in the places of the float ones; other tensors stay as they are.

    Returns the model, or what stands in its place. The tensors may be on the meta device, to be filled later.
    """
    made = {fqn: _module(fqn, record, saved.tensors) for fqn, record in saved.modules.items() if "same" not in record}
    for fqn, record in saved.modules.items():
        new = made[record.get("same", fqn)]
        if not fqn:
            return take_place(new, model)
        parent, _, name = fqn.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(old := owner._modules[name], nn.Module):
            take_place(new, old)
        setattr(owner, name, new)
    for fqn in saved.centred:
        centred(model.get_submodule(fqn))
    for fqn, record in saved.parameters.items():
        _pack(model, fqn, record, saved.tensors)
    return model


def _check_fit(model: nn.Module, saved: Saved) -> None:
    """Every tensor of the file has its place in the model, with its shape, and the other way round."""
    _check_modules(model, saved)
    own = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    for fqn in saved.parameters:
        if own.pop(fqn, None) is None:
            raise _misfit(fqn, "no such parameter in the model")
    own = {name: shape for name, shape in own.items() if name.rpartition(".")[0] not in saved.modules}
    packed = {f"{fqn}_{leaf}" for fqn in saved.parameters for leaf in _PACKED}
    rest = {n: t for n, t in saved.tensors.items() if n.rpartition(".")[0] not in saved.modules and n not in packed}
    for name in [*own, *rest]:
        if name not in rest:
            raise _misfit(name, "missing in the file")
        if name not in own:
            raise _misfit(name, "not in the model")
        if own[name] != rest[name].shape:
            raise _misfit(name, f"shape {list(rest[name].shape)} in the file, {list(own[name])} in the model")


def _check_modules(model: nn.Module, saved: Saved) -> None:
    """Every quantized part of the file has a float one of its size and kind in the model."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn in (*saved.modules, *saved.centred):
        if fqn not in modules:
            raise _misfit(fqn, "no such module in the model")
        if fqn in saved.centred and not can_be_centred(modules[fqn]):
            raise _misfit(fqn, f"a {type(modules[fqn]).__name__} instead of an nn.LayerNorm")
    for fqn, record in (*saved.modules.items(), *saved.parameters.items()):
        if (shape := other_shape(model, fqn, record)) is not None:
            raise _misfit(fqn, f"shape {record['shape']} in the file, {list(shape)} in the model")


def other_shape(model: nn.Module, fqn: str, record: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the float weight in whose place a module or parameter shall stand, where it has another size."""
    owner, _, leaf = fqn.rpartition(".")
    weight = model.get_submodule(owner)._parameters.get(leaf) if leaf else None
    if weight is None and "kind" in record:
        weight = model.get_submodule(fqn)._parameters.get("weight")
    if weight is None or weight.numel() == torch.Size(record["shape"]).numel():
        return None
    return tuple(weight.shape)


def _module(fqn: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    if record["kind"] == "QuantMixed":
        return _mixed(fqn, record, tensors)
    leaves = (*_PACKED, "bias", "x_scale", "x_zero", "smooth", "columns", "low_a", "low_b", "gain")
    found = {leaf: tensors.get(f"{fqn}.{leaf}".lstrip(".")) for leaf in leaves}
    packed = _packed(fqn, record["w"], record["shape"], found)
    dtype = getattr(torch, record["dtype"])
    made: QuantLinear | QuantEmbedding
    if record["kind"] == "QuantEmbedding":
        made = QuantEmbedding(packed, record["padding_idx"], dtype=dtype)
    else:
        formats: dict[str, Any] = {leaf: found[leaf] for leaf in ("x_scale", "x_zero", "smooth", "gain")}
        formats |= {"x_format": record["x"], "dtype": dtype, "rotation": _rotation(record)}
        bias, columns = found["bias"], found["columns"]
        a, b = found["low_a"], found["low_b"]
        formats["low"] = None if a is None or b is None else (a, b)
        if record["kind"] == "QuantConv":
            made = QuantConv(packed, _Conv(record, bias), **formats)
        elif columns is not None:
            made = QuantPermuted(packed, bias, columns, **formats)
        else:
            made = QuantLinear(packed, bias, **formats)
    made.sqnr_db = record["sqnr_db"]
    return made


def _mixed(fqn: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantMixed:
    axis, shape, packed = record["axis"], record["shape"], []
    found = [
        Segment(Format.parse(fmt), tuple((start, stop) for start, stop in ranges), bool(more))
        for fmt, ranges, *more in record["segments"]
    ]
    prefix = f"{fqn}." if fqn else ""
    for number, segment in enumerate(found):
        stem = f"{prefix}{stem_of(axis, number)}"
        held = {name: tensors.get(f"{stem}{name[1:]}") for name in _PACKED}
        own = [shape[0], segment.size] if axis else [segment.size, shape[1]]
        packed.append(_packed(stem, str(segment.format), own, held))
    rest = {name: tensors.get(f"{prefix}{name}") for name in ("x_scale", "x_zero", "smooth", "gain")}
    bias, dtype = tensors.get(f"{prefix}bias"), getattr(torch, record["dtype"])
    turned = _rotation(record)
    made = QuantMixed(packed, found, axis, bias, x_format=record["x"], dtype=dtype, rotation=turned, **rest)
    made.sqnr_db = record["sqnr_db"]
    return made


def _rotation(record: Mapping[str, Any]) -> tuple[int, int] | None:
    return (record["rotation"][0], record["rotation"][1]) if "rotation" in record else None


class _Conv(nn.Module):
    """What QuantConv asks of the convolution whose place it takes."""

    def __init__(self, record: Mapping[str, Any], bias: Tensor | None) -> None:
        super().__init__()
        self.kernel_size, self.stride = tuple(record["kernel_size"]), tuple(record["stride"])
        self.padding, self.in_channels = tuple(record["padding"]), record["in_channels"]
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def _pack(model: nn.Module, fqn: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    owner, _, name = fqn.rpartition(".")
    found = {leaf: tensors.get(f"{fqn}_{leaf}") for leaf in _PACKED}
    packed = _packed(fqn, record["format"], record["shape"], found)
    pack_parameter(model.get_submodule(owner), name, packed, transposed=record["transposed"])
    specs: dict[str, PackedSpec] = dict(model.get_submodule(owner).qfx_packed)  # type: ignore[arg-type]
    dtype, view = getattr(torch, record["dtype"]), tuple(record["view"])
    specs[name] = PackedSpec(record["format"], tuple(record["shape"]), dtype, record["transposed"], view)
    model.get_submodule(owner).qfx_packed = specs  # type: ignore[assignment]


def _packed(fqn: str, fmt: str, shape: list[int], found: Mapping[str, Tensor | None]) -> Packed:
    codes, scale = found["w_codes"], found["w_scale"]
    if codes is None or scale is None:
        raise _misfit(fqn, "no packed weight in the file")
    return Packed(codes, scale, found["w_zero"], Format.parse(fmt), tuple(shape))


def _filled(model: nn.Module, saved: Saved) -> nn.Module:
    """Give the model the stored tensors themselves; what was one tensor is one again."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    model.load_state_dict(dict(saved.tensors), strict=True, assign=True)
    for name, source in saved.tied.items():
        owner, _, leaf = name.rpartition(".")
        head, _, first = source.rpartition(".")
        store, other = model.get_submodule(owner)._parameters, model.get_submodule(head)._parameters
        if leaf in store and first in other:
            store[leaf] = other[first]
        elif _LEAF.search(leaf):
            tell_shared(model.get_submodule(owner), leaf)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(wanted.get(name, False) and parameter.is_floating_point())
    for name, dtype in saved.buffers.items():
        owner, _, leaf = name.rpartition(".")
        buffer = model.get_submodule(owner)._buffers.get(leaf)
        if buffer is not None:
            model.get_submodule(owner)._buffers[leaf] = buffer.to(getattr(torch, dtype))
    without_fast_paths(model)
    return model


def _misfit(name: str, found: str) -> ValueError:
    return ValueError(
        explain(
            "the saved model does not fit",
            expected=f"a tensor or module {name!r} in the file and in the model",
            found=found,
            next_step="load into the model class that was saved",
        )
    )
