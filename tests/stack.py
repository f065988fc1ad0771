"""A small stack of blocks for tests of methods that round one block after the other: `layers.0`, `layers.1`, ..."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qfx.capture import capture_export
from qfx.passes.annotate import annotate
from qfx.pipeline import prepare
from qfx.plan import Plan
from qfx.recipe import Recipe

VOCAB, WIDTH = 40, 24


class Layer(nn.Module):
    """Two linears that read one norm, and one that reads their product: a gated MLP with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return out


class Stack(nn.Module):
    """Embedding, layers, a last norm, and a head that may be tied to the embedding."""

    def __init__(self, layers: int = 2, *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


def batches(count: int = 3, rows: int = 2, length: int = 16) -> list[Tensor]:
    """Token ids [rows, length]."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCAB, (rows, length), generator=generator) for _ in range(count)]


def annotated(
    model: nn.Module, rules: Any, data: list[Tensor], **fields: Any
) -> tuple[fx.GraphModule, Plan, list[tuple[Any, ...]]]:
    """The prepared, annotated float graph of a model, an empty plan, and the graph's inputs of each batch."""
    recipe = Recipe.parse({"rules": rules, **fields})
    captured = capture_export(model.eval(), (data[0],), {})
    prepare(captured.gm)
    annotate(captured.gm, recipe)
    return captured.gm, Plan.of(model, recipe), [tuple(captured.flatten((one,), {})) for one in data]
