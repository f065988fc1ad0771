"""How much an error in each input channel of a linear matters, told from the inputs that it sees.

The result of a row w of a weight changes by d x where w changes by d, so that the mean squared change over all inputs
is d C d^T with C = mean(x^T x). An `Importance` holds the diagonal of C ("energy"; of experts that of each), or its
blocks along the diagonal ("covariance"), which also see that errors of neighbouring channels can cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 128  # channels of a block, where no group of the format says another size


class Importance:
    """moments: f32 [K], mean x^2 of each channel, or [E, K], of each expert of a weight [E, N, K]; or
    [ceil(K / B), B, B], blocks of mean(x^T x), zero padded."""

    def __init__(self, moments: Tensor) -> None:
        assert moments.dim() in (1, 2, 3), moments.shape
        self.moments = moments

    @property
    def _energy(self) -> Tensor | None:
        """What squares are multiplied by; None where these are blocks."""
        if self.moments.dim() == 3:
            return None
        return self.moments if self.moments.dim() == 1 else self.moments.unsqueeze(1)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Elements [.., K] that sum to a C b^T over any run of channels which cuts no block."""
        energy = self._energy
        return a * self._mixed(b) if energy is None else a * b * energy

    def square(self, a: Tensor) -> Tensor:
        """`product(a, a)`, which may be written into a."""
        energy = self._energy
        return self.product(a, a) if energy is None else a.mul_(a).mul_(energy)

    def product_with(self, fixed: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`product` for many a beside one b, `fixed`, whose part of the work is done once."""
        if self._energy is not None:
            return self.product
        mixed = self._mixed(fixed)
        return lambda a, b: a * mixed if b is fixed else self.product(a, b)

    def _mixed(self, b: Tensor) -> Tensor:
        """b C, of blocks."""
        count, size, _ = self.moments.shape
        padded = torch.nn.functional.pad(b, (0, count * size - b.shape[-1]))
        rows = padded.reshape(-1, count, size).transpose(0, 1)  # [blocks, rows, B]
        mixed = (rows @ self.moments).transpose(0, 1).reshape(padded.shape)
        return mixed[..., : b.shape[-1]]

    def columns(self, ranges: Sequence[tuple[int, int]]) -> Importance:
        """That of some channels put side by side. Of blocks the diagonal alone is kept."""
        blocks = self.moments.dim() == 3
        energy = self.moments.diagonal(dim1=1, dim2=2).reshape(-1) if blocks else self.moments
        return Importance(torch.cat([energy[..., start:stop] for start, stop in ranges], -1))
