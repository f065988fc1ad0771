"""One small model as text after every stage of qfx. The README shows what this prints; a test keeps them equal."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qfx.capture import capture_export
from qfx.compile import lower
from qfx.passes.annotate import annotate
from qfx.passes.quantize import quantize
from qfx.pipeline import prepare
from qfx.recipe import Recipe
from qfx.run import run
from qfx.text import dump


class Block(nn.Module):
    """An MLP that spells its RMSNorm out, as most language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 8] -> [B, 8]."""
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        y: Tensor = x + self.down(functional.gelu(self.up(h)))
        return y


def stages(recipe: Recipe) -> list[tuple[str, str]]:
    """(what the stage did, the graph's text after it), in order."""
    torch.manual_seed(0)
    shown: list[tuple[str, str]] = []

    def show(what: str, gm: fx.GraphModule) -> None:
        shown.append((what, dump(gm).rstrip()))

    gm = capture_export(Block().eval(), (torch.randn(4, 8),)).gm
    show("capture: the model as ATen operators; @ marks a parameter by its name", gm)
    prepare(gm)
    show("normalize: what belongs together is one operator", gm)
    annotate(gm, recipe)
    show("annotate: the recipe's formats on the nodes", gm)
    run(gm, [functools.partial(quantize, tensors={}, rounding=recipe.rounding)])
    show("quantize: weights packed, qfx operators in place of the float ones", gm)
    kernels = lower(gm, "auto", strict=True).kernels
    what_runs = (f"%{node}: {kernel or 'fused into a neighbour'}" for node, kernel in kernels.items())
    shown.append(("lower: what runs", "\n".join(what_runs)))
    return shown


def main() -> None:
    """Print every stage."""
    print("\n\n".join(f"# {what}\n{text}" for what, text in stages(Recipe.parse("w8a8"))))


if __name__ == "__main__":
    main()
