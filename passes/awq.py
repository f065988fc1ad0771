"""AWQ: channels that carry much are made large in the weights before these are rounded (Lin et al. 2023). Exact.

    y = round(W diag(s)) (x / s)        s_j = mean|x_j|^a / sqrt(max * min over j)

x / s costs nothing at run time: the norm before the linears takes 1 / s (see `smooth`), the value projection for the
output projection (`v_o`, all query heads of a group alike), the up projection for the down projection (`up_down`).
Inputs for which none of them can take it are left. The exponent a is that of a grid with which the result of the layers
on sampled inputs, weights rounded under the formats annotated, has the least error; 0 is no scaling. Where the
recipe searches scales ("mse", "gptq"), so does this for each factor: what clipping mends needs none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.calibration.observers import Observer
from qfx.calibration.sample import Sample
from qfx.passes import _sites as sites
from qfx.passes._sites import Weight
from qfx.passes.smooth import Layer, Tie

GRID: tuple[float, ...] = tuple(step / 20 for step in range(1, 20))
_LEAST = 1e-4


def watch(node: fx.Node, role: str) -> Observer | None:
    """For `insert_observers`: sample what the weights of linears multiply."""
    return Sample() if role == "w" and sites.is_linear(node) else None


def choose(
    gm: fx.GraphModule, linears: Sequence[Weight], inputs: Sequence[Sample], *, tie: Tie = lambda magnitude: magnitude,
    searched: bool = False,
) -> Tensor | None:  # fmt: skip
    """The factor [channels] for linears that read one input, f32; None where none is better than 1.

    tie: makes channels equal that must have one factor. searched: how weights are rounded to judge a factor, see
    `smooth.Layer`. A `smooth.Chooser`.
    """
    nodes = {graph.fqn_of(n): n for n in gm.graph.nodes if sites.is_linear(n)}
    if not any("w" in annotation.get(nodes[w.name]) for w in linears):
        return None
    layers = [Layer.of(gm, nodes[w.name], w, "minmax", 100.0, searched) for w in linears]
    rows = max((i.sample() for i in inputs), key=len)
    ends = rows.amin(0), rows.amax(0)
    size = tie(rows.abs().mean(0))

    energies = [layer.energy(rows) for layer in layers]

    def error(factor: Tensor) -> float:
        return sum(layer.error(rows, *ends, factor, e) for layer, e in zip(layers, energies, strict=True))

    tried = [torch.ones_like(size), *(factor_of(size, exponent) for exponent in GRID)]
    errors = [error(factor) for factor in tried]
    best = min(range(len(tried)), key=errors.__getitem__)
    return tried[best] if best else None


def factor_of(size: Tensor, exponent: float) -> Tensor:
    """size^exponent, f32, with the greatest and the least factor inverse to each other; 1 for channels never seen."""
    raw = size.to(torch.float64).clamp(min=_LEAST * float(size.mean().clamp(min=1e-30))).pow(exponent)
    scaled = (raw / (raw.max() * raw.min()).sqrt()).to(torch.float32)
    return torch.where(size > 0, scaled, 1.0)
