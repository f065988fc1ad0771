"""Tail: the newest tokens of a layer, in the model's dtype, in memory that is never written twice.

    keys, values  [B, G, room, D]   tokens start to end - 1 are held; new ones come behind them

A token costs one copy of itself. Where the room ends, what is held moves to new memory, and what reads the old one is
undisturbed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qfx.kv import native

Pair = tuple[Tensor, Tensor]
SLACK = 32  # tokens that new memory has room for


class Tail:
    """See the module. pair: what is held at first, keys and values [B, G, n, D], which nobody else writes to."""

    def __init__(self, pair: Pair) -> None:
        self.memory = pair
        self.start, self.end = 0, pair[0].shape[2]

    @property
    def pair(self) -> Pair:
        """Keys and values that are held."""
        k, v = self.memory
        return k[:, :, self.start : self.end], v[:, :, self.start : self.end]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(t.numel() * t.element_size() for t in self.memory)

    def push(self, keys: Tensor, values: Tensor) -> bool:
        """Hold new tokens, too; False, and nothing happens, where some of them are not finite."""
        new, end = keys.shape[2], self.end + keys.shape[2]
        if end > self.memory[0].shape[2]:
            self._move(new)
            end = self.end + new
        places = tuple(t[:, :, self.end : end] for t in self.memory)
        fine = native.take((keys, values), (places[0], places[1]))
        if fine is None:
            places[0].copy_(keys.detach())
            places[1].copy_(values.detach())
            fine = finite(keys, values)
        if fine:
            self.end = end
        return fine

    def skip(self, tokens: int) -> None:
        """Hold the first `tokens` no more."""
        self.start += tokens

    def each(self, change: Callable[[Tensor], Tensor]) -> Tail:
        """The same with both tensors changed."""
        return Tail((change(self.pair[0]), change(self.pair[1])))

    def _move(self, new: int) -> None:
        held, room = self.end - self.start, self.end - self.start + max(new, SLACK)
        with torch.inference_mode(False):  # it may be written to without inference mode later
            memory = tuple(t.new_empty((*t.shape[:2], room, t.shape[3])) for t in self.memory)
            for to, kept in zip(memory, self.pair, strict=True):
                to[:, :, :held] = kept
        self.memory = memory[0], memory[1]
        self.start, self.end = 0, held


def finite(keys: Tensor, values: Tensor) -> bool:
    """Whether all is finite, in one look at the device."""
    total = keys.detach().sum(dtype=torch.float32) + values.detach().sum(dtype=torch.float32)
    if math.isfinite(total.item()):
        return True
    return all(bool(torch.isfinite(x).all()) for x in (keys, values))  # large values may sum up to Inf
