"""Data for a part of a model: what it is given while the whole runs on data of its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx import data as batches
from qfx.errors import explain, listed, nearest
from qfx.inputs import without_cache
from qfx.quantize import evaluating


def part_batches(
    model: nn.Module, part: nn.Module | str, data: Iterable[Any], *, samples: int | None = None
) -> list[dict[str, Any]]:
    """What a part of `model` is called with on `data`, a batch for each call: the arguments of its forward by name.

    For a part of a model that torch.export does not take as one graph (the language model of a Qwen2-VL, whose images
    have sizes that values tell): `qfx.quantize(part, recipe, data=qfx.part_batches(model, part, data))`.

    part: a module of the model, or its name; data: batches as for `qfx.plan`, without a cache; samples: stop once that
    many samples of `data` are there. Tensors are copies, where they were. The model is not changed.
    Raises ValueError for a part that the model does not have or does not call, bad data, and calls that have arguments
    by position beyond the names of its forward.
    """
    name, module = _found(model, part)
    calls = batches.calls(model, data, samples)
    seen: list[batches.Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (args, kwargs)))

    hook = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            for number, (args, kwargs) in enumerate(calls, 1):
                with batches.telling(number):
                    model(*args, **without_cache(model, kwargs, args))
    finally:
        hook.remove()
    if not seen:
        raise ValueError(
            explain(
                f"the model does not call {name!r} on this data",
                expected="a part whose forward runs",
                next_step="give data that reach it, or take a part of it",
            )
        )
    return [_named(module, name, args, kwargs) for args, kwargs in seen]


def _found(model: nn.Module, part: nn.Module | str) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if isinstance(part, str):
        if part not in modules:
            raise ValueError(f"the model has no part {part!r}, {nearest(part, modules)}")
        return part, modules[part]
    for name, module in modules.items():
        if module is part:
            return name, module
    raise ValueError(f"the {type(part).__name__} is no part of the {type(model).__name__}: take one that it holds")


def _named(module: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind not in kinds]
    if len(args) > len(names):
        raise ValueError(
            explain(
                f"{name!r} is called with {len(args)} arguments by position",
                expected=f"arguments that have a name in its forward ({listed(names) or 'none'})",
                next_step="take a part of it",
            )
        )
    return {**dict(zip(names, args, strict=False)), **kwargs}
