"""How much an error in each input channel of a linear matters, told from the inputs that it sees.

The result of a row w of a weight changes by d x where w changes by d, so that the mean squared change over all inputs
is d C d^T with C = mean(x^T x). An `Importance` holds the diagonal of C ("energy"), or its blocks along the diagonal
("covariance"), which also see that errors of neighbouring channels can cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 128  # channels of a block, where no group of the format says another size


class Importance:
    """moments: f32 [K], mean x^2 of each channel; or [ceil(K / B), B, B], blocks of mean(x^T x), zero padded."""

    def __init__(self, moments: Tensor) -> None:
        assert moments.dim() in (1, 3), moments.shape
        self.moments = moments

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Elements [.., K] that sum to a C b^T over any run of channels which cuts no block."""
        return a * b * self.moments if self.moments.dim() == 1 else a * self._mixed(b)

    def square(self, a: Tensor) -> Tensor:
        """`product(a, a)`, which may be written into a."""
        return a.mul_(a).mul_(self.moments) if self.moments.dim() == 1 else self.product(a, a)

    def product_with(self, fixed: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """`product` for many a beside one b, `fixed`, whose part of the work is done once."""
        if self.moments.dim() == 1:
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
        energy = self.moments if self.moments.dim() == 1 else self.moments.diagonal(dim1=1, dim2=2).reshape(-1)
        return Importance(torch.cat([energy[start:stop] for start, stop in ranges]))
