"""A sample of the rows that a layer reads, in memory that does not grow with the data, for searches on real inputs."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from qfx.calibration.observers import AbsMax
from qfx.calibration.padding import Attended, without


class Sample(AbsMax):
    """Extremes per channel and a uniform sample of rows over the last axis, for searches on a layer's real inputs.

    Every row draws a random key and those with the greatest keys stay, so a merge of two samples is a sample of both.
    Every second sample of [B, T, K] (of [M, K] the second half) is told apart, so that a choice can be judged on data
    that it was not made from.
    """

    def __init__(self, rows: int = 512, seed: int = 0) -> None:
        super().__init__("ch")
        if rows < 1:
            raise ValueError(f"a sample keeps at least one row, found {rows}")
        self.rows = rows
        self._keys: Tensor | None = None
        self._kept: Tensor | None = None
        self._half: Tensor | None = None
        self._ends_of: list[tuple[Tensor, Tensor] | None] = [None, None]
        self._random = torch.Generator().manual_seed(seed)
        self._samples = 0
        self._second = torch.zeros(0, dtype=torch.bool)

    @property
    def config(self) -> tuple[Any, ...]:
        return (*super().config, self.rows)

    def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
        """Take in one batch, see `Observer.update`."""
        if x.dim() > 2:
            second = (torch.arange(len(x), device=x.device) + self._samples) % 2 == 1
            second = second.reshape(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)
            self._second = without(second, kept or {}).reshape(-1)
            self._samples += len(x)
        else:
            count = x.numel() // max(1, x.shape[-1])
            second = torch.arange(count, device=x.device) >= count // 2
            self._second = without(second[:, None], kept or {}).reshape(-1) if x.dim() == 2 else second
        super().update(x, batch, kept)

    def sample(self) -> Tensor:
        """f32 [at most `rows`, channels]. Raises ValueError where there was no data."""
        self.extremes()
        assert self._kept is not None
        return self._kept

    def folds(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each half of the data: its sampled rows f32 [R, C], and the extremes f32 [C] of the other half.

        One fold, of everything, where the data has no two halves.
        """
        first, second = self._ends_of
        rows = self.sample()
        if first is None or second is None or self._half is None or self._half.unique().numel() < 2:
            return [(rows, *self.extremes())]
        return [(rows[self._half == 0], *second), (rows[self._half == 1], *first)]

    def _take(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        keys = torch.rand(rows.shape[1], generator=self._random, dtype=torch.float64).to(rows.device)
        top = keys.topk(min(self.rows, len(keys))).indices
        self._keep(keys[top], rows[:, top].t().to(torch.float32), self._second[top].to(torch.uint8))
        for half, chosen in enumerate((~self._second, self._second)):
            part = rows[:, chosen]
            if part.shape[1]:
                self._widen(half, part.amin(1).to(torch.float32), part.amax(1).to(torch.float32))

    def _join(self, other: Self) -> None:
        assert other._keys is not None
        assert other._kept is not None
        assert other._half is not None
        self._keep(other._keys, other._kept, other._half)
        for half, ends in enumerate(other._ends_of):
            if ends is not None:
                self._widen(half, *ends)

    def _keep(self, keys: Tensor, rows: Tensor, half: Tensor) -> None:
        if self._keys is not None and self._kept is not None and self._half is not None:
            keys = torch.cat([self._keys, keys.to(self._keys.device)])
            rows = torch.cat([self._kept, rows.to(self._kept.device)])
            half = torch.cat([self._half, half.to(self._half.device)])
        top = keys.topk(min(self.rows, len(keys))).indices
        self._keys, self._kept, self._half = keys[top], rows[top].contiguous(), half[top]

    def _widen(self, half: int, low: Tensor, high: Tensor) -> None:
        ends = self._ends_of[half]
        if ends is not None:
            low, high = torch.minimum(ends[0], low.to(ends[0].device)), torch.maximum(ends[1], high.to(ends[1].device))
        self._ends_of[half] = (low, high)
