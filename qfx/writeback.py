"""Write a plan into the live module by FQN: rewrites applied, weights packed one at a time. See `qfx/places.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx.modules import (
    QuantConv,
    QuantEmbedding,
    QuantLinear,
    pack_parameter,
    take_place,
    tell_shared,
    without_fast_paths,
)
from qfx.packing import Packed
from qfx.parts import round_in_parts
from qfx.passes.rewrites import apply_record
from qfx.places import READ, Place, kind_of
from qfx.plan import Plan

Key = tuple[Any, ...]


def write_back(model: nn.Module, plan: Plan, places: list[Place]) -> nn.Module:
    """Apply the plan's rewrites and quantize the places that `qfx.places.find` gave.

    Returns the model, or what stands in its place where it is itself a bare linear layer. A float weight is let go of
    as soon as it is packed, so that no more than one layer exists twice.
    """
    for record in plan.rewrites:
        apply_record(model, record, plan.tensors)
        if record["name"] == "untie":
            _untied(model)
    return _Writer(model, plan).write(places)


def _untied(model: nn.Module) -> None:
    """Tell a transformers model, which else ties its tables again when it is saved and loaded."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


class _Writer:
    """Writes one place after the other. Everything is found by name, so that nothing keeps a float weight alive.

    parents: id of a module -> (name of the parent, name in it). twins: place in memory of a weight -> (owner, leaf).
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.packed: dict[Key, Packed] = {}
        self.used: set[int] = set()
        self.sqnr: Mapping[str, float] = plan.sensitivities.get("sqnr_db", {})
        self.parents: dict[int, list[tuple[str, str]]] = {}
        self.twins: dict[Key, list[tuple[str, str]]] = {}
        for path, module in model.named_modules():
            for name, child in module._modules.items():
                self.parents.setdefault(id(child), []).append((path, name))
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self.twins.setdefault(_pointer(parameter), []).append((path, leaf))

    def write(self, places: list[Place]) -> nn.Module:
        planned = {(place.owner, place.leaf) for place in places}
        for place in places:
            module = self.model.get_submodule(place.owner)
            weight = module._parameters.get(place.leaf)
            if weight is None:
                continue  # a module under two names, written already
            pointer = _pointer(weight)
            packed = self._pack(place, weight)
            del weight
            self._put(place, module, packed)
            self._tell_shared(place.owner, place.leaf, packed)
            for owner, leaf in self.twins.get(pointer, ()):
                if (owner, leaf) not in planned:
                    self._put_twin(owner, leaf, place, packed)
        without_fast_paths(self.model)
        return self.model

    def _pack(self, place: Place, weight: Tensor) -> Packed:
        key = (*_pointer(weight), str(place.w), _is_transposed(place))
        if key not in self.packed:
            value = _oriented(weight.detach(), place)
            self.packed[key] = round_in_parts(value, place.w, self.plan.recipe.rounding, name=place.fqn)
        return self.packed[key]

    def _put(self, place: Place, module: nn.Module, packed: Packed) -> None:
        if place.kind == "parameter":
            pack_parameter(module, place.leaf, packed, transposed=_is_transposed(place))
            return
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        if place.kind == "table":
            assert isinstance(module, nn.Embedding)
            new: QuantEmbedding | QuantLinear = QuantEmbedding(packed, module.padding_idx, dtype=dtype)
        else:
            tensors = {leaf: self.plan.tensors.get(f"{place.fqn}/{leaf}") for leaf in ("x_scale", "x_zero", "smooth")}
            formats: dict[str, Any] = {"x_format": str(place.x) if place.x else "", "dtype": dtype, **tensors}
            is_conv = place.kind == "conv"
            bias = module._parameters.get("bias")
            new = QuantConv(packed, module, **formats) if is_conv else QuantLinear(packed, bias, **formats)
        new.sqnr_db = self.sqnr.get(place.fqn)
        self._replace(module, new)

    def _put_twin(self, owner: str, leaf: str, place: Place, packed: Packed) -> None:
        """A parameter that shares the weight and is not in the graph (T5's `shared`) shares the packed one."""
        module = self.model.get_submodule(owner)
        if module._parameters.get(leaf) is None:
            return
        kind = kind_of(module, leaf, "embedding")
        if kind == "table" and not _is_transposed(place):
            assert isinstance(module, nn.Embedding)
            self._replace(module, QuantEmbedding(packed, module.padding_idx, dtype=module.weight.dtype))
        else:
            pack_parameter(module, leaf, packed, transposed=_is_transposed(place))
        self._tell_shared(owner, leaf, packed)

    def _tell_shared(self, owner: str, leaf: str, packed: Packed) -> None:
        if id(packed) in self.used:
            module = self.model.get_submodule(owner)
            head = f"{leaf}_" if leaf in getattr(module, "qfx_packed", {}) else ""
            tell_shared(module, *(f"{head}{name}" for name in ("w_codes", "w_scale", "w_zero")))
        self.used.add(id(packed))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """The new module under every name of the old one."""
        take_place(new, old)
        if old is self.model:
            self.model = new
        for path, name in self.parents.get(id(old), ()):
            setattr(self.model.get_submodule(path), name, new)


def _is_transposed(place: Place) -> bool:
    return place.layout.removesuffix(READ).endswith("transposed")


def _oriented(weight: Tensor, place: Place) -> Tensor:
    """The weight as [.., N, K]; a view."""
    if _is_transposed(place):
        return weight.transpose(-2, -1)
    return weight.flatten(1) if place.layout.startswith("patch") else weight


def _pointer(weight: Tensor) -> Key:
    """What tensors of the same values in the same memory have in common."""
    return (weight.data_ptr() or id(weight), weight.dtype, weight.shape, weight.stride())
