"""A model without weights to plan on: every parameter is one value in memory, spread over the shape that it has."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MARK = "qfx_hollow"


def hollow(model: nn.Module, tied: Mapping[str, str]) -> nn.Module:
    """A copy on the CPU of a model on the meta device, in eval mode, that takes next to no memory.

    tied: name of a parameter -> name of the one that it shall be. The copy can be traced and planned on: dtypes, shapes
    and devices are those of a real model. Its outputs mean nothing.
    """
    twin = copy.deepcopy(model).eval()
    for target, source in tied.items():
        owner, _, leaf = target.rpartition(".")
        twin.get_submodule(owner)._parameters[leaf] = twin.get_parameter(source)
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                    made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for store in (module._buffers, module.__dict__):
            for name, held in store.items():
                if isinstance(held, Tensor) and held.is_meta:
                    store[name] = torch.zeros(held.shape, dtype=held.dtype)
    setattr(twin, _MARK, True)
    return twin


def is_hollow(model: nn.Module) -> bool:
    """Whether `hollow` made the model: its weights have no content."""
    return bool(model.__dict__.get(_MARK))


def is_hollow_leaf(module: nn.Module) -> bool:
    """Whether the weight of a leaf module is one value, spread over several places."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.numel() > 1 and not any(weight.stride())


def filled(module: nn.Module) -> nn.Module:
    """A copy of a leaf module with random parameters, always the same ones."""
    twin = copy.deepcopy(module)
    random = torch.Generator().manual_seed(1)
    for name, parameter in twin._parameters.items():
        if parameter is not None:
            value = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
            twin._parameters[name] = nn.Parameter(value, requires_grad=False)
    return twin
