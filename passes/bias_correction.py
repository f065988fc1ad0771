"""Bias correction: what rounding shifts in the mean of a linear's result goes into its bias. Not exact.

    %linear: f32[2,4] = aten.linear(%x, @fc.weight)  # w=i4/g32
    ->
    %linear: f32[2,4] = aten.linear(%x, @fc.weight, @fc.bias)  # w=i4/g32

b <- b + E[W x] - E[W' x'], the means over all tokens of the data; x' is what comes behind what is rounded and corrected
already (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2, with
means that are measured, see `qfx.rounding.correct`). A linear without a bias is given one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qfx import graph
from qfx.passes import _edits as edits
from qfx.passes import _sites as sites
from qfx.passes._sites import Record


@dataclass(frozen=True)
class Site(Record):
    """linear: FQN of a linear. bias: of its bias, None where it has none, in a module of its own."""

    NAME: ClassVar[str] = "bias-correction"
    TENSORS: ClassVar[tuple[str, ...]] = ("factor",)

    linear: str
    bias: str | None

    def present(self, module: nn.Module) -> bool:
        """Whether the graph has the node, or the live model the bias, or a weight to stand beside."""
        if isinstance(module, fx.GraphModule):
            return bool(nodes_of(module, self.linear))
        return sites.holds(module, self.bias or f"{self.linear}.weight".lstrip("."))


def site_of(node: fx.Node) -> Site | str:
    """The site of a linear, or why its bias cannot be corrected."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    fqn = graph.fqn_of(node)
    if bias is None:
        return Site(fqn, None)
    if not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return "its bias is computed in the graph"
    if foreign := sites.other_user(bias, {node}):
        return f"its bias {bias.target} is also used by %{foreign.name}"
    return Site(fqn, str(bias.target))


def apply(module: nn.Module, site: Site, factor: Tensor) -> None:
    """Add the shift `factor` [N] to the bias of a graph's linear or of a live module's, or make it the bias."""
    if site.bias is not None:
        edits.edit(module, site.bias, lambda old: old + factor.to(old.device, torch.float64))
    elif isinstance(module, fx.GraphModule):
        for node in nodes_of(module, site.linear):
            name = f"{site.linear}.bias".lstrip(".")
            held = graph.get_tensor(module, name) if sites.holds(module, name) else factor.to(graph.val(node).dtype)
            node.args = (*node.args[:2], graph.add_tensor(module, name, held, node))
    else:
        owner = module.get_submodule(site.linear)
        weight = owner.get_parameter("weight")
        graph.set_tensor(owner, "bias", nn.Parameter(factor.to(weight), requires_grad=weight.requires_grad))


def nodes_of(gm: fx.GraphModule, fqn: str) -> list[fx.Node]:
    """The calls of a linear, by its name."""
    return [n for n in gm.graph.nodes if graph.schema_name(n) == "aten::linear" and graph.fqn_of(n) == fqn]
