"""What the inputs of each linear make of an error in its weight, where a recipe rounds by data in the end.

Nearest codes by scales of the least weighted error are as near as one comes to GPTQ in a moment. Where a few input
channels carry most of the energy, as in language models, scales of the least plain error are far from it, and formats
would be chosen by losses that the rounded model does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation, graph
from qfx.analysis.weights import rounding_of
from qfx.calibration.importance import Importance
from qfx.passes._sites import is_linear
from qfx.recipe import DATA_ROUNDINGS, Recipe
from qfx.rounding.lanes import Lane, Program

Energies = Mapping[str, Importance]


def energies(gm: fx.GraphModule, batches: Sequence[Sequence[Any]], recipe: Recipe | None) -> Energies:
    """FQN of an annotated linear -> mean x^2 of its input channels, over positions that no attention mask leaves out.

    gm: prepared. batches: its inputs in placeholder order, each. Empty where the recipe does not round by data, or
    where units alone are not rounded by "mse"; without linears that no data reaches.
    """
    by_data = recipe is not None and (recipe.rounding in DATA_ROUNDINGS or recipe.weighting != "uniform")
    if not by_data or rounding_of(recipe) != "mse":
        return {}
    program = Program(gm)
    lane = Lane(program, batches, rounded=False)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for node in program.nodes:
        if not is_linear(node) or "w" not in annotation.get(node):
            continue
        lane.advance(program.position[node])
        fqn, x = graph.fqn_of(node), node.args[0]
        assert isinstance(x, fx.Node)
        for number in range(len(batches)):
            value = lane.rows(number, x, lane.value(number, x))
            value = value.reshape(-1, value.shape[-1]).to(torch.float32)
            found = value.square().sum(0, dtype=torch.float64)
            sums[fqn] = sums[fqn] + found if fqn in sums else found
            rows[fqn] = rows.get(fqn, 0) + len(value)
    return {fqn: Importance((found / rows[fqn]).to(torch.float32)) for fqn, found in sums.items() if rows[fqn]}
