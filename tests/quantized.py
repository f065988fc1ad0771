"""Quantized models of the zoo for tests: built once each, with what the float model gave."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import qfx
from qfx.measuring.measure import decibel, energies
from tests.zoo import ZOO, Inputs


@dataclass(frozen=True)
class Quantized:
    """model: quantized, not to be changed (deepcopy it). outputs: of the float model. told: the warnings."""

    model: nn.Module
    inputs: Inputs
    outputs: list[Tensor]
    told: list[str]


def floats(value: Any) -> list[Tensor]:
    """The floating tensors of a model's output."""
    leaves = pytree.tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def call(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The floating outputs of a call."""
    return floats(model(**inputs))


def sqnr(wanted: list[Tensor], found: list[Tensor]) -> float:
    """SQNR in dB over all tensors together."""
    assert wanted and len(wanted) == len(found)
    pairs = [energies(a, b) for a, b in zip(wanted, found, strict=True)]
    return decibel(sum(p[0] for p in pairs), sum(p[1] for p in pairs))


def built(name: str) -> tuple[nn.Module, Inputs]:
    """A float model of the zoo. T5 has the weights that transformers gives it: its attention is not scaled, so with the
    zoo's weights it is sharp, and each attention loses 6 to 9 dB of what it is given."""
    model, inputs = ZOO[name]()
    if name == "t5":
        torch.manual_seed(0)
        model = type(model)(model.config).eval()
    return model, inputs


@cache
def quantized(name: str, recipe: str = "w8a8", dtype: torch.dtype = torch.float32) -> Quantized:
    """A model of the zoo, quantized by a preset (on its own inputs where that needs data)."""
    model, inputs = built(name)
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    wanted = call(model, inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = qfx.quantize(model, recipe, [inputs] if qfx.Recipe.parse(recipe).needs_data else None)
    return Quantized(model, inputs, wanted, [str(w.message) for w in caught])


def left_in_float(model: nn.Module) -> list[str]:
    """Float parameters with two axes or more that are the weight of something: no biases, no positions."""
    no_weight = ("bias", "cls_token", "position_embeddings", "embed_positions.weight")
    named = [name for name, p in model.named_parameters() if p.dim() > 1 and p.is_floating_point()]
    return [name for name in named if not name.endswith(no_weight)]
