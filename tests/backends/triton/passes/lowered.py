"""What the tests of passes share: small models, their quantized graphs, and these lowered without any other pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx import graph, run
from qfx.backends.triton import device
from qfx.backends.triton.rules_linear import linear
from qfx.backends.triton.site import Site
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture

K = 32


def inputs(dtype: torch.dtype = torch.float32, rows: int = 3) -> Tensor:
    """x [rows, K]."""
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)


class Gated(nn.Module):
    """A norm that q and k read, or gate and up; a residual; a gated MLP. layer: a LayerNorm with a bias."""

    def __init__(self, *, layer: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(K) if layer else nn.RMSNorm(K, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.first = nn.Linear(K, K, bias=False)
        self.gate, self.up = nn.Linear(K, 48), nn.Linear(K, 48, bias=False)
        self.down = nn.Linear(48, K)
        self.to(DEVICE, dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + self.first(x)
        y = self.norm(total)
        z = self.down(F.silu(self.gate(y)) * self.up(y))
        return total + z, z


def quantized(
    model: nn.Module, x: Tensor, x_format: str = "i8/tok", w_format: str | list[str] = "i8/ch"
) -> fx.GraphModule:
    """The quantized graph of a model in normal form: all linears in these formats, "" for an input in float.

    w_format: of several, each is that of as many rows.
    """
    gm = capture(model, x)
    prepare(gm)
    rule: dict[str, Any] = {"target": "linear", "w": w_format, **({"x": x_format} if x_format else {})}
    apply_plan(gm, None, Recipe.parse({"rules": [rule]}))
    graph.rename(gm)
    return gm


def lowered(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which the linears are this backend's ops."""
    own = graph.copy(gm)
    for node in list(own.graph.nodes):
        if graph.schema_name(node) == "qfx::linear":
            assert not isinstance(linear(Site(own, node, device.find(torch.device(DEVICE)))), str)
    run.settle(own)
    return own


def ran(gm: fx.GraphModule, *passes: run.Pass) -> fx.GraphModule:
    """A copy of the graph after passes, each checked by the runner."""
    own = graph.copy(gm)
    run.run(own, list(passes))
    return own


@torch.no_grad()
def outputs(gm: fx.GraphModule, *args: Any) -> list[Tensor]:
    """What a graph computes."""
    gm.recompile()
    return list(gm(*args))
