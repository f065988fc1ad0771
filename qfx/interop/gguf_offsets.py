"""Learned rounding of a weight in GGUF's blocks: an offset for each value and, where blocks have no offset of their
own, a share for each factor.

What `qfx.rounding.offsets` is for formats, with the same gradients. The integer scales (and mins) of a K type stay
those that the search finds, and so do both factors of blocks with an offset: learned, they lost on held-out text. The
one factor of others is learned as a share of what it was, and rounded to float16:

    W' = step q + offset    q = clamp(round((W - offset) / step + V))    step = d s, offset = -m t (one level: d and m)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.interop.gguf_blocks import Blocks, BlockType, exponent_scale
from qfx.interop.gguf_encode import check_values, fit_blocks
from qfx.interop.gguf_search import divide, nearest_index
from qfx.rounding.offsets import OPTIMIZERS, SHARES, SLACK, widths


class BlockOffsets:
    """A weight f32 [N, K] in blocks of a type, its offsets and shares; see `qfx.rounding.offsets.Offsets`.

    All is held as [blocks, parts, n]. reach: how far a value may move, in steps.
    """

    def __init__(
        self, weight: Tensor, kind: BlockType, *, optimizer: str = "adam", reach: float = 0.5, name: str = "weight"
    ) -> None:
        check_values(weight, kind, name)
        self.kind, self.shape, self.reach = kind, weight.shape, reach
        self.weight = weight.reshape(-1, kind.parts, kind.size // kind.parts)
        ones = torch.ones_like(self.weight[:1])
        self._first = fit_blocks(self.weight[:, None], ones, kind)
        self._ways = {key: OPTIMIZERS[optimizer]() for key in ("offset", "share")}
        self.share = torch.ones(len(self.weight), 1, 1, device=weight.device)  # of the first d
        self._table = None if kind.table is None else torch.tensor(kind.table, device=weight.device).float()
        self.offset = torch.zeros_like(self.weight)
        self._settle()
        self.width = torch.ones(()) if self._table is None else widths(self._steps(), self._table)

    def _settle(self) -> None:
        """Factors as a file holds them, and what they make of the integers."""
        first, kind = self._first, self.kind
        if kind.name == "MXFP4":
            self._d = first.d
            self._step, self._offset = exponent_scale(first.d)[:, None, None], torch.zeros_like(self.share)
            return
        self._d = (first.d.float() * self.share.flatten()).to(torch.float16)
        self._step = self._d.float()[:, None, None] * self._along(first.scales)
        low = torch.zeros_like(self.share) if first.m is None else first.m.float()[:, None, None]
        self._offset = low * (self._along(first.mins) * (-1 if kind.parts > 1 else 1))

    def _along(self, integers: Tensor | None) -> Tensor:
        """What a factor is multiplied by in each part, f32 [blocks, parts, 1]."""
        return torch.ones_like(self.share) if integers is None else integers.float()[..., None]

    def _steps(self) -> Tensor:
        whole = self.weight - self._offset
        return divide(whole, self._step.squeeze(-1).expand(whole.shape[:-1]))

    def value(self) -> Tensor:
        """W' [N, K] in f32 as the parameters now make it; keeps what `step` needs."""
        self._now = self._steps()
        moved = self._now + self.offset * self.width
        if self._table is None:
            whole = moved.round_()
            self._codes = self._units = whole.clamp(self.kind.low, self.kind.high)
            self._inside = self._units == whole
        else:
            self._codes = nearest_index(moved, self.kind.table or ())
            self._units = self._table[self._codes]
            low, high = float(self._table.min()) * SLACK, float(self._table.max()) * SLACK
            self._inside = (moved >= low) & (moved <= high)
        return (self._units * self._step + self._offset).reshape(self.shape)

    def step(self, gradient: Tensor, rate: float, clip_rate: float) -> None:
        """Move offsets by about `rate` steps, and shares by about `clip_rate`, against dL/dW' [N, K]."""
        slope = gradient.to(torch.float32).reshape(self.weight.shape)
        free = slope * self._inside
        self._ways["offset"](self.offset, free * self._step, rate)
        self.offset.clamp_(-self.reach, self.reach)
        if not clip_rate or self.kind.affine or self.kind.name == "MXFP4":  # whose powers of two are too coarse
            return
        by_step = (slope * self._units - free * self._now).sum(-1, keepdim=True) * self._along(self._first.scales)
        share = self.share.clone()
        self._ways["share"](share, by_step.sum(1, keepdim=True) * self._first.d.float()[:, None, None], clip_rate)
        self.share = share.clamp_(*SHARES)
        self._settle()

    def packed(self) -> Blocks:
        """The blocks; their values are `value()`."""
        self.value()
        codes = self._codes.flatten(1).to(torch.int8 if self.kind.low < 0 else torch.uint8)
        return Blocks(self.kind, codes, self._d, self._first.m, self._first.scales, self._first.mins)

    @property
    def clipped(self) -> float:
        """The share of the values that lie beyond the range of their scale, at the last `value()`."""
        return 1.0 - float(self._inside.to(torch.float32).mean()) if self._inside.numel() else 0.0
