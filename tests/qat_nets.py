"""A small model, its data and its training steps, for tests of quantization-aware training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import qfx

VOCAB, WIDTH = 24, 32


class Net(nn.Module):
    """A table, two linears of biases, a norm, and an output that may be tied to the table."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, WIDTH, padding_idx=0)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y: Tensor = self.head(x + self.down(torch.relu(self.up(self.norm(x)))))
        return y


def net(**fields: bool) -> Net:
    torch.manual_seed(0)
    model = Net(**fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def prepared(*args: Any, **fields: Any) -> Any:
    return qfx.prepare_qat(*args, **fields)


def ids(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (4, 6), generator=torch.Generator().manual_seed(seed))


DATA = [{"ids": ids(seed)} for seed in (2, 3)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1) -> Tensor:
    model.train()
    batch = ids(seed)
    loss = nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.roll(1, 1).flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@torch.no_grad()
def out(model: nn.Module) -> Tensor:
    y: Tensor = model.eval()(ids(9))
    return y


def both(w: str, x: str = "none", table: str = "i8/ch", **fields: Any) -> dict[str, Any]:
    return {"rules": [{"target": "linear", "x": x, "w": w}, {"target": "embedding", "w": table}], **fields}
