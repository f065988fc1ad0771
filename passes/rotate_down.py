"""Rotate the input of a down projection while the model runs, undone in its weight (R4 of QuaRot).

    %mul: f32[2,96] = aten.mul.Tensor(%silu, %up)
    %linear: f32[2,64] = aten.linear(%mul, @down.weight)
    ->
    %mul: f32[2,96] = aten.mul.Tensor(%silu, %up)
    %hadamard: f32[2,96] = qfx.hadamard(%mul, 96, 0, False)                  x' = x Q, W <- W Q
    %linear: f32[2,64] = aten.linear(%hadamard, @down.weight)

What an activation function gives has the strongest outliers of a layer, and nothing before it can take a rotation.
Exact for any linear; taken are those whose input an activation function or a product makes. In a live model the packed
linear rotates its own input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from qfx import annotation, graph
from qfx.errors import Note
from qfx.graph import is_call
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._build import call
from qfx.passes._sites import Norm, Record, Weight
from qfx.passes.rotate import rotate_tensor
from qfx.rewrites import rotation  # noqa: F401  (rotation registers the op)

aten = torch.ops.aten

_ACTIVATIONS = {
    f"aten::{name}"
    for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardtanh", "mish", "leaky_relu", "elu", "pow")
} | {"aten::softplus", "qfx::quick_gelu"}  # fmt: skip


@dataclass(frozen=True)
class Site(Record):
    """A linear whose input is rotated in blocks of `block` channels by the matrix of `seed`."""

    NAME: ClassVar[str] = "rotate-down"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"linears": Weight.of}

    linears: tuple[Weight, ...]
    channels: int
    block: int
    seed: int

    @property
    def explicit(self) -> bool:
        """The packed linear of a live model has to rotate its input."""
        return True


def find(
    gm: fx.GraphModule, *, seed: int = 0, block: int | None = None, fixed: Collection[str] = ()
) -> tuple[list[Site], list[Note]]:
    """Every linear that reads what an activation function or a product of two values gives, and those that cannot.

    block: None is the whole input. fixed: names of linears whose input the live model cannot rotate.
    """
    found, refusals = [], []
    for node in gm.graph.nodes:
        if not sites.is_linear(node) or not _is_activated(node.args[0]):
            continue
        site = _site(node, seed, block, fixed)
        if isinstance(site, Site):
            found.append(site)
        else:
            refusals.append(sites.note(node, f"its input cannot be rotated: {site}"))
    return found, refusals


def _site(node: fx.Node, seed: int, block: int | None, fixed: Collection[str]) -> Site | str:
    weight, channels = sites.weight_of(node), m.shape(node.args[0])[-1]
    if graph.schema_name(node) != "aten::linear":
        return "experts read their weights in a forward of their own"
    if isinstance(weight, str):
        return weight
    if weight.name in fixed:
        return "its weight is read by a forward of another module"
    if not isinstance(channels, int):
        return "its number of input channels is not fixed"
    if channels % (block or 1):
        return f"blocks of {block} do not divide its {channels} channels"
    return Site((weight,), channels, block or channels, seed)


def _is_activated(value: Any) -> bool:
    made = sites.origin(value)
    if not isinstance(made, fx.Node) or isinstance(sites.norm_of(made), Norm):
        return False
    if graph.schema_name(made) in _ACTIVATIONS:
        return True
    return is_call(made, aten.mul.Tensor) and all(
        isinstance(a, fx.Node) and m.rank(a) == m.rank(made) and m.shape(a)[-1] != 1 for a in made.args
    )


def apply(module: nn.Module, site: Site) -> None:
    """Rotate the weight in f64, in a graph or a live model, and in a graph its input.

    In a live model the caller packs the linear with its rotation (see `rotations`).
    """
    (linear,) = site.linears
    rotate_tensor(module, linear.weight, linear.inp, site.block, site.seed)
    if isinstance(module, fx.GraphModule):
        for node in list(module.graph.nodes):
            if sites.is_linear(node) and graph.fqn_of(node) == linear.name:
                node.replace_input_with(node.args[0], _rotated(module, node.args[0], node, site))


def rotations(records: Collection[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """FQN of a linear -> (block, seed) of the rotation of its input, of a plan's records."""
    own = [Site.from_record(record) for record in records if record["name"] == Site.NAME]
    return {linear.name: (site.block, site.seed) for site in own for linear in site.linears}


def _rotated(gm: fx.GraphModule, value: fx.Node, node: fx.Node, site: Site) -> fx.Node:
    target, args = torch.ops.qfx.hadamard.default, (value, site.block, site.seed, False)
    for user in value.users:
        if is_call(user, target) and user.args == args:
            return user
    with gm.graph.inserting_after(value):
        new = call(gm, target, *args, like=node)
    annotation.clear(new)
    return new
