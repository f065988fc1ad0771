"""Quantize a float model while transformers loads it: each weight is packed as soon as it is read, and let go of.

The plan is made before, on a copy of the empty model (`qfx.storage.hollow`). Recipes with rewrites change several
weights together, and a model whose graph needs its weights cannot be planned so: these are quantized once all is
loaded, which a warning says.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import load_state_dict

from qfx.errors import Note, explain, warn
from qfx.hf.saved import keep_float_ties, shield
from qfx.kv.live import with_caches
from qfx.live import attending
from qfx.live.modules import tell_shared, without_fast_paths
from qfx.live.places import Place, find
from qfx.live.walk import NO_GRAPH
from qfx.live.writeback import Writer
from qfx.pipeline import told
from qfx.plan import Plan
from qfx.quantize import planned, quantize
from qfx.recipe import Recipe
from qfx.reporting.told import remember
from qfx.storage.hollow import hollow

Name = tuple[str, str]  # path of the module, name of the parameter in it


class Streaming:
    """One model that is being loaded.

    groups: name of a parameter -> all names of that parameter (tied ones). places: name -> what shall stand there.
    whole: why the model is quantized only once it is loaded; "" where it is not.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, files: Sequence[str], *, strict: bool) -> None:
        self.recipe, self.strict = recipe, strict
        self.groups: dict[str, list[str]] = {}
        self.places: dict[str, list[Place]] = {}
        self.done: set[str] = set()
        self.apart: list[tuple[str, str]] = []
        self.notes: list[Note] = []
        self.failed: Exception | None = None
        self.whole = self._prepare(model, files)
        if self.whole:
            step = "nothing, if the float model fits in memory; else a recipe without rewrites, such as 'w4a16'"
            warn(
                str(Note(type(model).__name__, f"quantized once all is loaded in float, since {self.whole}", step)), ""
            )

    def takes(self, name: str) -> bool:
        """Whether the weight of this name is packed when it is read."""
        return not self.whole and any(one in self.places for one in self.groups.get(name, ()))

    def operation(self) -> ConversionOps:
        """What transformers calls with a weight that was read."""
        return _Pack(self)

    def take(self, model: nn.Module, name: str, weight: torch.Tensor) -> set[str]:
        """Pack one weight; the names that need no value any more. The first error is kept, and raised by `finish`."""
        group = self.groups[name]
        if self.failed is None and name not in self.done:
            try:
                self._write(model, group, nn.Parameter(weight, requires_grad=False))
            except Exception as error:  # noqa: BLE001  (transformers would only log it)
                self.failed = error
        self.done.update(group)
        return set(group)

    def finish(self, model: nn.Module) -> None:
        """Quantize what is still float, and tie what is equal. Raises the first error of `take`."""
        if self.failed is not None:
            raise self.failed
        if self.whole:
            shield(model, on=False)
            quantize(model, self.recipe, strict=self.strict)
            return
        for name, places in self.places.items():
            if name not in self.done:  # in no file: transformers gave it first values
                weight = model.get_submodule(places[0].owner)._parameters[places[0].leaf]
                assert weight is not None
                self._write(model, self.groups[name], weight)
                self.done.update(self.groups[name])
        for one, other in self.apart:
            _share(model, one, other)
        shield(model, on=False)
        without_fast_paths(model)
        with_caches(attending.attend(model, self.attentions), self.plan.caches, strict=self.strict)
        remember(model, self.notes)

    def _prepare(self, model: nn.Module, files: Sequence[str]) -> str:
        if self.recipe.rewrites:
            return f"recipe {self.recipe.name!r} rewrites weights together ({', '.join(self.recipe.rewrites)})"
        tied = dict(getattr(model, "all_tied_weights_keys", {}))
        twin = hollow(model, tied)
        made, notes = planned(twin, self.recipe)
        if any(NO_GRAPH in note.reason for note in notes):
            return f"its graph cannot be had without its weights: {notes[-1].reason}"
        places, more = find(twin, made)
        self.attentions, apart = attending.find(twin, made)
        self.notes = [*notes, *more, *apart]
        told(self.notes, strict=self.strict)
        self.plan: Plan = made
        self.writer = Writer(model, made)
        for place in places:
            self.places.setdefault(_name(place.owner, place.leaf), []).append(place)
        self._group(model, tied, files)
        return ""

    def _group(self, model: nn.Module, tied: dict[str, str], files: Sequence[str]) -> None:
        """Names of one parameter together. Those that the files hold twice may differ: they are compared at the end."""
        roots: dict[str, str] = {}
        stored = _stored(files)
        for target, source in tied.items():
            root = roots.get(source, source)
            if _holds(stored, target) and _holds(stored, root):
                self.apart.append((root, target))
            else:
                roots[target] = root
        together: dict[str, list[str]] = {}
        for name, _ in model.named_parameters(remove_duplicate=False):
            group = together.setdefault(roots.get(name, name), [])
            group.append(name)
            self.groups[name] = group

    def _write(self, model: nn.Module, group: list[str], weight: nn.Parameter) -> None:
        names = [_split(name) for name in group]
        places = [place for name in group for place in self.places.get(name, ())]
        self.writer.arrived(weight, names, places)
        for owner, _ in names:
            shield(model.get_submodule(owner), on=True)
        if len(group) > 1 or self.apart:
            keep_float_ties(model)


class _Pack(ConversionOps):  # type: ignore[misc]
    """transformers' step between reading weights and putting them into the model."""

    def __init__(self, streaming: Streaming) -> None:
        self.streaming = streaming

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Names and weights that were read -> those that transformers itself shall put into the model."""
        rest: dict[str, Any] = {}
        for name, read in input_dict.items():
            weight = read[0] if isinstance(read, list) else read
            if not self.streaming.takes(name):
                rest[name] = read
                continue
            settled = self.streaming.take(kwargs["model"], name, weight)
            if kwargs.get("missing_keys") is not None:
                kwargs["missing_keys"].difference_update(settled)
        return rest


def _share(model: nn.Module, one: str, other: str) -> None:
    """Let two modules that hold equal packed weights hold one."""
    mine, its = (model.get_submodule(_split(name)[0]) for name in (one, other))
    leaves = ("w_codes", "w_scale", "w_zero")
    pairs = [(mine._buffers.get(leaf), its._buffers.get(leaf)) for leaf in leaves]
    same_format = getattr(mine, "w_format", None) == getattr(its, "w_format", "")
    equal = (a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    if same_format and all(equal):
        for leaf, (held, _) in zip(leaves, pairs, strict=True):
            its._buffers[leaf] = held
        tell_shared(its, *(leaf for leaf, (held, _) in zip(leaves, pairs, strict=True) if held is not None))


def _stored(files: Sequence[str]) -> set[str]:
    """The names of the tensors in the files of a float model."""
    names: set[str] = set()
    for file in files:
        if Path(file).suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as handle:
                    names.update(handle.keys())
            except Exception as error:
                step = "download or copy the file again"
                raise ValueError(
                    explain(f"{file} is truncated or no safetensors file: {error}", next_step=step)
                ) from error
        else:
            names.update(load_state_dict(file, map_location="meta"))
    return names


def _holds(stored: set[str], name: str) -> bool:
    """Whether files hold a parameter, under its name or with more or less of a prefix."""
    return any(name == one or name.endswith(f".{one}") or one.endswith(f".{name}") for one in stored)


def _split(name: str) -> Name:
    owner, _, leaf = name.rpartition(".")
    return owner, leaf


def _name(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf
