"""An observer of second moments of a linear's inputs, of which an `Importance` is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.calibration.observers import Observer


class Moments(Observer):
    """The mean of x^2 of each channel, or of x^T x in blocks of `block` channels, over all values seen (f64 sums)."""

    def __init__(self, name: str = "tensor", block: int | None = None) -> None:
        super().__init__("ch", name)
        self.block = block
        self._sum: Tensor | None = None

    @property
    def config(self) -> tuple[Any, ...]:
        return (*super().config, self.block)

    def importance(self) -> Importance:
        """Raises ValueError where there was no data."""
        low, _ = self.extremes()
        assert self._sum is not None
        return Importance((self._sum / (self.seen / len(low))).to(torch.float32))

    def _take(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        wide = rows.to(torch.float32)
        if self.block is None:
            found = wide.square().sum(1)
        else:
            missing = -len(wide) % self.block
            blocks = torch.nn.functional.pad(wide, (0, 0, 0, missing)).reshape(-1, self.block, wide.shape[1])
            found = blocks @ blocks.mT
        found = found.to(torch.float64)
        self._sum = found if self._sum is None else self._sum + found

    def _join(self, other: Any) -> None:
        self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum.to(self._sum.device)
