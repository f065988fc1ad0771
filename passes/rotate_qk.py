"""Rotate queries and keys by the same matrix while the model runs (R3 of SpinQuant): their products stay.

    %sdpa = aten.scaled_dot_product_attention(%rope, %rope_1, %v)
    ->
    %hadamard: f32[2,4,7,16] = qfx.hadamard(%rope, 16, 0, False)            (q Q) (k Q)^T = q k^T
    %hadamard_1: f32[2,2,7,16] = qfx.hadamard(%rope_1, 16, 0, False)
    %sdpa = aten.scaled_dot_product_attention(%hadamard, %hadamard_1, %v)

It comes after the rotary embedding, which no weight could pass. In a live model it is part of attention with formats
(`qfx.live.attending`); attention that runs in float is left as it is, where the rotation would change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from qfx import annotation, graph
from qfx.errors import Note
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._build import call
from qfx.passes._sites import Record
from qfx.rewrites import rotation  # noqa: F401  (rotation registers the op)


@dataclass(frozen=True)
class Site(Record):
    """The attention of this name, whose heads have `block` channels; seed: of the matrix."""

    NAME: ClassVar[str] = "rotate-qk"

    attention: str
    block: int
    seed: int

    def present(self, module: nn.Module) -> bool:
        """Attention has no parameters: what is not there needs nothing."""
        return True


def find(gm: fx.GraphModule, *, seed: int = 0) -> tuple[list[Site], list[Note]]:
    """Every attention, and those whose heads have no fixed size."""
    found: dict[Site, None] = {}
    refusals = []
    for node in gm.graph.nodes:
        if graph.schema_name(node) not in sites.ATTENTION:
            continue
        size = m.shape(node.args[0])[-1]
        if isinstance(size, int):
            found[Site(graph.fqn_of(node), size, seed)] = None
        else:
            refusals.append(sites.note(node, "its queries and keys cannot be rotated: the size of a head is not fixed"))
    return list(found), refusals


def apply(module: nn.Module, site: Site) -> None:
    """Rotate queries and keys in a graph; a live model is left as it is (see the module)."""
    if not isinstance(module, fx.GraphModule):
        return
    for node in list(module.graph.nodes):
        if graph.schema_name(node) not in sites.ATTENTION or graph.fqn_of(node) != site.attention:
            continue
        q, k, *rest = node.args
        with module.graph.inserting_before(node):
            turned = [
                call(module, torch.ops.qfx.hadamard.default, value, site.block, site.seed, False, like=node)
                for value in (q, k)
            ]
        for value in turned:
            annotation.clear(value)
        node.args = (*turned, *rest)
