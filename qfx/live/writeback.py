"""Write a plan into the live module by FQN: rewrites applied, weights packed one at a time. See `places.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx.annotation import show
from qfx.format import Format
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantConv, QuantEmbedding, QuantLinear, take_place, tell_shared, without_fast_paths
from qfx.live.parameters import pack_parameter
from qfx.live.places import Place, kind_of
from qfx.live.segments import along, segments, stem_of, take
from qfx.packing import Packed
from qfx.passes.rewrites import apply_record, rotations
from qfx.plan import Plan
from qfx.rounding import rounded
from qfx.storage.spill import rest

Key = tuple[Any, ...]
Parts = list[Packed]  # one, or one for each segment


def write_back(model: nn.Module, plan: Plan, places: list[Place]) -> nn.Module:
    """Apply the plan's rewrites and quantize the places that `qfx.live.places.find` gave.

    Returns the model, or what stands in its place where it is itself a bare linear layer. A float weight is let go of
    as soon as it is packed, so that no more than one layer exists twice; the packed form of one in a file lies in a
    file, too (see `qfx.storage.spill`).
    """
    rewrite(model, plan)
    return Writer(model, plan).write(places)


def rewrite(model: nn.Module, plan: Plan) -> None:
    """Apply the plan's rewrites to the live model, in their order."""
    for record in plan.rewrites:
        apply_record(model, record, plan.tensors)
        if record["name"] == "untie":
            _untied(model)


def check_rounded(model: nn.Module, plan: Plan, places: list[Place]) -> None:
    """Raises ValueError where a weight that the plan carries rounded does not fit its place."""
    for place in places:
        value = oriented(model.get_submodule(place.owner).get_parameter(place.leaf), place)
        for part, fmt, name in cut(value, place):
            rounded.get(plan.tensors, name, fmt, tuple(part.shape))


def cut(value: Tensor, place: Place) -> Iterator[tuple[Tensor, Format, str]]:
    """The parts of a weight [N, K] with a format each, and their names; one where there is one format."""
    if isinstance(place.w, Format):
        yield value, place.w, place.fqn
        return
    axis, found = along(place.w), segments(place.w, value.shape, place.fqn)
    for i, segment in enumerate(found):
        name = place.fqn if len(found) == 1 else f"{place.fqn}.{stem_of(axis, i)}"
        yield take(value, segment, axis), segment.format, name


def _untied(model: nn.Module) -> None:
    """Tell a transformers model, which else ties its tables again when it is saved and loaded."""
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]


class Writer:
    """Writes one place after the other. Everything is found by name, so that nothing keeps a float weight alive.

    parents: id of a module -> (name of the parent, name in it). twins: place in memory of a weight -> (owner, leaf).
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.packed: dict[Key, Parts] = {}
        self.used: set[int] = set()
        self.rotations = rotations(plan.rewrites)
        self.sqnr: Mapping[str, float] = plan.sensitivities.get("sqnr_db", {})
        self.parents: dict[int, list[tuple[str, str]]] = {}
        self.twins = twins_of(model)
        for path, module in model.named_modules():
            for name, child in module._modules.items():
                self.parents.setdefault(id(child), []).append((path, name))

    def write(self, places: list[Place]) -> nn.Module:
        """Write all places; the model, or what stands in its place."""
        self._write(places)
        without_fast_paths(self.model)
        return self.model

    def arrived(self, weight: nn.Parameter, names: list[tuple[str, str]], places: list[Place]) -> None:
        """Put a weight that was just read under all its names (owner, leaf) and write its places; none of it is kept.

        For a model that is being loaded, whose other weights may be on the meta device.
        """
        for owner, leaf in names:
            self.model.get_submodule(owner)._parameters[leaf] = weight
        self.twins = {pointer_of(weight): names}
        self._write(places)
        self.twins, self.packed = {}, {}
        self.used.clear()

    def _write(self, places: list[Place]) -> None:
        planned = {(place.owner, place.leaf) for place in places}
        for place in places:
            module = self.model.get_submodule(place.owner)
            weight = module._parameters.get(place.leaf)
            if weight is None:
                continue  # a module under two names, written already
            pointer = pointer_of(weight)
            packed = self._pack(place, weight)
            del weight
            self._put(place, module, packed)
            for part in packed:
                self._tell_shared(place.owner, part)
            for owner, leaf in self.twins.get(pointer, ()):
                if (owner, leaf) not in planned and len(packed) == 1:
                    self._put_twin(owner, leaf, place, packed[0])

    def _pack(self, place: Place, weight: Tensor) -> Parts:
        key = (*pointer_of(weight), show(place.w), place.transposed)
        if key not in self.packed:
            tensors, method = self.plan.tensors, self.plan.recipe.rounding
            parts = cut(oriented(weight.detach(), place), place)
            self.packed[key] = [
                rounded.pack(tensors, value, fmt, method, name=name).beside(weight) for value, fmt, name in parts
            ]
            rest(weight)
        return self.packed[key]

    def _put(self, place: Place, module: nn.Module, parts: Parts) -> None:
        packed = parts[0]
        if place.kind == "parameter":
            pack_parameter(module, place.leaf, packed, transposed=place.transposed)
            return
        dtype = module.weight.dtype
        assert isinstance(dtype, torch.dtype)
        if place.kind == "table":
            assert isinstance(module, nn.Embedding)
            new: QuantEmbedding | QuantLinear | QuantMixed = QuantEmbedding(packed, module.padding_idx, dtype=dtype)
        else:
            tensors = {leaf: self.plan.tensors.get(f"{place.fqn}/{leaf}") for leaf in ("x_scale", "x_zero", "smooth")}
            formats: dict[str, Any] = {"x_format": str(place.x) if place.x else "", "dtype": dtype, **tensors}
            formats["rotation"] = self.rotations.get(place.fqn)
            formats["gain"] = module._buffers.get("gain")  # of the rewrite 'rotate'
            bias = module._parameters.get("bias")
            if place.kind == "conv":
                new = QuantConv(packed, module, **formats)
            elif isinstance(place.w, Format):
                a, b = module._buffers.get("low_a"), module._buffers.get("low_b")  # of the rewrite 'low-rank'
                low = None if a is None or b is None else (a, b)
                new = QuantLinear(packed, bias, low=low, **formats)
            else:
                held = module._parameters["weight"]
                assert held is not None
                found = segments(place.w, oriented(held, place).shape, place.fqn)
                new = QuantMixed(parts, found, along(place.w), bias, **formats)
        new.sqnr_db = self.sqnr.get(place.fqn)
        self._replace(module, new)

    def _put_twin(self, owner: str, leaf: str, place: Place, packed: Packed) -> None:
        """A parameter that shares the weight and is not in the graph (T5's `shared`) shares the packed one."""
        module = self.model.get_submodule(owner)
        if module._parameters.get(leaf) is None:
            return
        kind = kind_of(module, leaf, "embedding")
        if kind == "table" and not place.transposed:
            assert isinstance(module, nn.Embedding)
            self._replace(module, QuantEmbedding(packed, module.padding_idx, dtype=module.weight.dtype))
        else:
            pack_parameter(module, leaf, packed, transposed=place.transposed)
        self._tell_shared(owner, packed)

    def _tell_shared(self, owner: str, packed: Packed) -> None:
        if id(packed) in self.used:
            module = self.model.get_submodule(owner)
            held = {id(t) for t in packed.tensors().values()}
            tell_shared(module, *(name for name, b in module.named_buffers(recurse=False) if id(b) in held))
        self.used.add(id(packed))

    def _replace(self, old: nn.Module, new: nn.Module) -> None:
        """The new module under every name of the old one."""
        take_place(new, old)
        if old is self.model:
            self.model = new
        for path, name in self.parents.get(id(old), ()):
            setattr(self.model.get_submodule(path), name, new)


def twins_of(model: nn.Module) -> dict[Key, list[tuple[str, str]]]:
    """Place in memory of a weight -> (owner, leaf) of those that hold it."""
    found: dict[Key, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(pointer_of(parameter), []).append((path, leaf))
    return found


def oriented(weight: Tensor, place: Place) -> Tensor:
    """The weight as [.., N, K]; a view."""
    if place.transposed:
        return weight.transpose(-2, -1)
    return weight.flatten(1) if place.layout.startswith("patch") else weight


def pointer_of(weight: Tensor) -> Key:
    """What tensors of the same values in the same memory have in common."""
    return (weight.data_ptr() or id(weight), weight.dtype, weight.shape, weight.stride())
