"""Packed weights that several graphs hold once."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.backends.triton import lower, lowering, shared
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture


class Mlp(nn.Module):
    """Two linears that become one product, and one of rows of several formats."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def model(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp().to(DEVICE).eval()


def quantized(float_model: nn.Module, rows: int, recipe: Recipe) -> fx.GraphModule:
    gm = capture(float_model, torch.randn(rows, 64, device=DEVICE))
    prepare(gm)
    apply_plan(gm, None, recipe)
    return gm


def constants(lowered: Any) -> dict[int, Tensor]:
    """The tensors that a graph which runs op by op holds, by their place in memory."""
    return {t.data_ptr(): t for t in lowered._run.buffers() if t.numel()}


RULES: Any = ({"target": "*", "w": "u4/g32"}, {"target": "down", "w": ["i8/ch", "i4/ch"]})
MIXED = Recipe.parse("w4a16").override(rules=RULES)


@pytest.mark.parametrize("recipe", [Recipe.parse("w8a8"), MIXED, Recipe.parse("nf4")], ids=["w8a8", "mixed", "nf4"])
def test_graphs_for_other_sizes_hold_their_weights_once(recipe: Recipe) -> None:
    one, other = (lower(quantized(model(), rows, recipe), mode="eager", share=True) for rows in (1, 5))
    assert constants(one).keys() == constants(other).keys()
    alone = lower(quantized(model(), 5, recipe), mode="eager")
    assert not constants(one).keys() & constants(alone).keys(), "tuning measures with copies"
    x = torch.randn(5, 64, device=DEVICE)
    assert torch.equal(other(x)[0], alone(x)[0])


def test_other_weights_of_the_same_name_are_their_own() -> None:
    x, recipe = torch.randn(3, 64, device=DEVICE), Recipe.parse("w8a8")
    graphs = [quantized(model(seed), 3, recipe) for seed in (0, 1, 0)]
    first, second, third = (lower(gm, mode="eager", share=True) for gm in graphs)
    assert not constants(first).keys() & constants(second).keys()
    for lowered, gm in zip((first, second, third), graphs, strict=True):
        assert torch.equal(lowered(x)[0], lower(gm, mode="eager")(x)[0])


def test_what_no_graph_holds_is_forgotten() -> None:
    gc.collect()
    before = len(shared._KNOWN)
    lowered = lower(quantized(model(), 3, Recipe.parse("w8a8")), mode="eager", share=True)
    assert len(shared._KNOWN) > before
    del lowered
    gc.collect()
    assert len(shared._KNOWN) <= before


def test_a_compiled_model_holds_its_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    make = lowering.lower

    def kept(gm: Any, **how: Any) -> Any:
        found.append(make(gm, **{**how, "mode": "eager"}))
        return found[-1]

    monkeypatch.setattr(lowering, "lower", kept)
    options: dict[str, Any] = {"recipe": "w4a16", "backend": "triton", "cache": False}
    compiled = torch.compile(model(), backend="qfx", options=options)
    with torch.no_grad():
        for rows in (1, 4, 7):
            compiled(torch.randn(rows, 64, device=DEVICE))
    torch._dynamo.reset()
    assert len(found) >= 2
    assert len({frozenset(constants(lowered)) for lowered in found}) == 1
