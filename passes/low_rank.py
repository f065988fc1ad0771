"""Low-rank error compensation: two narrow float linears beside a quantized one carry the largest part of its error.

    %linear: f32[2,4] = aten.linear(%x, @fc.weight, @fc.bias)  # w=i4/g32
    ->
    %linear_1: f32[2,4] = aten.linear(%x, @fc.weight, @fc.bias)  # w=i4/g32
    %linear_2: f32[2,1] = aten.linear(%x, @fc.low_a)
    %linear_3: f32[2,4] = aten.linear(%linear_2, @fc.low_b)
    %linear: f32[2,4] = aten.add(%linear_1, %linear_3)

W ~ W' + B A with A [r, K], B [N, r] of the error's singular vectors (Yao et al. 2023, "ZeroQuant-V2"), weighed by what
the linear reads: with H = X^T X = R R^T the best rank r of (W - W') R (Zhang et al. 2024, "LQER", "QERA"). Not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import annotation, graph
from qfx.passes import _sites as sites
from qfx.passes._build import call
from qfx.passes._sites import Record
from qfx.passes.bias_correction import nodes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Site(Record):
    """linear: FQN of a linear with a module of its own."""

    NAME: ClassVar[str] = "low-rank"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor", "second")

    linear: str

    def present(self, module: nn.Module) -> bool:
        """Whether the graph has the node, or the live model the module."""
        if isinstance(module, fx.GraphModule):
            return bool(nodes_of(module, self.linear))
        return sites.holds(module, f"{self.linear}.weight".lstrip("."))


def factors(error: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], f32, of the best B A for an error [N, K] of inputs with H = R R^T; `root` is R [K, K]."""
    left, values, right = torch.linalg.svd(error.to(torch.float64) @ root.to(torch.float64), full_matrices=False)
    rank = min(rank, len(values))
    half = values[:rank].sqrt()
    a = torch.linalg.solve_triangular(root.to(torch.float64), half[:, None] * right[:rank], upper=True, left=False)
    return a.to(torch.float32), (left[:, :rank] * half).to(torch.float32)


def apply(module: nn.Module, site: Site, a: Tensor, b: Tensor) -> None:
    """Put the two linears beside a graph's, or give the factors to a live module, for what will stand in its place."""
    stem = f"{site.linear}.".lstrip(".")
    if not isinstance(module, fx.GraphModule):
        owner = module.get_submodule(site.linear)
        for leaf, tensor in (("low_a", a), ("low_b", b)):
            owner.register_buffer(leaf, tensor.to(owner.get_parameter("weight")))
        return
    for node in nodes_of(module, site.linear):
        _beside(module, node, stem, a, b)


def _beside(gm: fx.GraphModule, node: fx.Node, stem: str, a: Tensor, b: Tensor) -> None:
    dtype, users = graph.val(node).dtype, list(node.users)
    held = []
    for leaf, tensor in (("low_a", a), ("low_b", b)):
        known = sites.holds(gm, stem + leaf)
        held.append(
            graph.add_tensor(gm, stem + leaf, graph.get_tensor(gm, stem + leaf) if known else tensor.to(dtype), node)
        )
    with gm.graph.inserting_after(node):
        narrow = call(gm, aten.linear.default, node.args[0], held[0], like=node)
    with gm.graph.inserting_after(narrow):
        wide = call(gm, aten.linear.default, narrow, held[1], like=node)
    with gm.graph.inserting_after(wide):
        whole = call(gm, aten.add.Tensor, node, wide, like=node)
    for new in (narrow, wide, whole):
        annotation.clear(new)
    for user in users:
        user.replace_input_with(node, whole)
    node.name, whole.name = whole.name, node.name
