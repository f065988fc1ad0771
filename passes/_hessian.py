"""What a linear reads, as sums over the rows of its input: the Hessian of its squared error, and what a float model
would have read instead."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.storage.spill import beside, rest

_BLOCK = 512  # columns of one product: only those on and above the diagonal are computed
_ROWS = 64  # that are put in order at once
_SWAPPED = 1 << 20  # elements that change places at once
_GROWTH, _LEAST, _MOST = 10.0, 1e-6, 1e6  # of the dampening


class Hessian:
    """H = X^T X over the rows X [.., K] that were added, f32 [K, K]; with cross, also D = (X_float - X)^T X.

    rows: how many.
    """

    def __init__(self, channels: int, *, cross: bool = False, device: torch.device | None = None) -> None:
        self.matrix = torch.zeros(channels, channels, device=device)
        self.cross = torch.zeros(channels, channels, device=device) if cross else None
        self.rows = 0
        self._whole = True
        self._diagonal: Tensor | None = None

    def add(self, x: Tensor, wanted: Tensor | None = None) -> None:
        """Add rows [.., K]; wanted: the same rows in the float model."""
        x = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        for start in range(0, x.shape[1], _BLOCK):
            stop = min(start + _BLOCK, x.shape[1])
            self.matrix[:stop, start:stop].addmm_(x[:, :stop].T, x[:, start:stop])
        if self.cross is not None:
            assert wanted is not None
            self.cross.addmm_((wanted.detach().reshape(x.shape).to(torch.float32) - x).T, x)
        self.rows += len(x)
        self._whole = False

    def fill(self, other: Hessian, rows: int) -> None:
        """Add so many rows as `other` saw them on average."""
        assert self.cross is None and other.rows, "there is nothing to fill it with"
        self.whole().add_(other.whole(), alpha=rows / other.rows)
        self.rows += rows

    def whole(self) -> Tensor:
        """H with both halves."""
        if not self._whole:
            for start in range(0, len(self.matrix), _BLOCK):
                rows = slice(start, start + _BLOCK)
                self.matrix[start:, rows] = self.matrix[rows, start:].T.clone()
            self._whole = True
        return self.matrix

    @property
    def diagonal(self) -> Tensor:
        """Energy of each channel [K]."""
        return self.matrix.diagonal() if self._diagonal is None else self._diagonal

    def settle(self, weight: Tensor) -> None:
        """Nothing is added any more. Where the weight lies in a file, H and D do, too (see `qfx.storage.spill`)."""
        self.whole()
        if self._diagonal is None:
            self._diagonal = self.matrix.diagonal().clone()
            self.matrix = beside(self.matrix, weight)
            self.cross = None if self.cross is None else beside(self.cross, weight)

    def energy(self, rows: Tensor) -> float:
        """Sum of squares of what rows [n, K] give for the inputs that were added."""
        found = 0.0
        for start in range(0, len(self.matrix), _BLOCK):
            part = self.matrix[start : start + _BLOCK]
            found += float(((rows[:, start : start + _BLOCK] @ part) * rows).sum())
            rest(part)
        rest(self.matrix)
        return max(found, 0.0)  # which rounding may leave a little below

    def columns(self, ranges: tuple[tuple[int, int], ...] | None) -> Hessian:
        """That of some of the channels."""
        if ranges is None:
            return self
        index = torch.cat([torch.arange(a, b) for a, b in ranges]).to(self.matrix.device)
        part = Hessian(0)
        part.matrix, part.rows = self.whole()[index][:, index], self.rows
        part.cross = None if self.cross is None else self.cross[index][:, index]
        return part


def factor(
    matrix: Tensor, order: Tensor, dampening: float, name: str, energies: Tensor | None = None
) -> tuple[Tensor, float]:
    """Upper triangular R [K, K] with R R^T = H + d * mean(diag H) * 1 in this order of the channels, and d.

    d is `dampening`, or as much more as lets the factorization succeed. Channels without energy get that of the mean.
    All is done in the memory of R, whose transpose is contiguous. energies: the diagonal of H, where it is known.
    Raises ValueError, naming `name`, where no dampening is enough.
    """
    backwards = order.flip(0)
    places = backwards.argsort()
    energy = (matrix.diagonal() if energies is None else energies)[backwards]
    alive = energy > 0
    mean = float(energy[alive].mean()) if bool(alive.any()) else 1.0
    energy[~alive] = mean
    while dampening <= _MOST:
        held = torch.empty_like(matrix, memory_format=torch.contiguous_format)
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, start + _ROWS)
            held[places[rows]] = matrix[rows][:, backwards]
            rest(matrix[rows])
        rest(matrix)
        held.diagonal().copy_(energy + dampening * mean)
        lower, info = held.mT, torch.empty((), dtype=torch.int32, device=held.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            _reverse(held.view(-1))
            return held.mT, dampening
        dampening = max(dampening * _GROWTH, _LEAST)
    raise ValueError(
        explain(
            f"the statistics of {name!r} cannot be factored, whatever is added to their diagonal",
            found=f"energies from {float(energy.min()):g} to {float(energy.max()):g}",
            next_step="look for inputs of very different magnitude, or leave the layer out (Recipe.ignore)",
        )
    )


def _reverse(flat: Tensor) -> None:
    """Turn the order of the elements round, in place."""
    count = len(flat)
    for start in range(0, count // 2, _SWAPPED):
        stop = min(start + _SWAPPED, count // 2)
        first = flat[start:stop].clone()
        flat[start:stop] = flat[count - stop : count - start].flip(0)
        flat[count - stop : count - start] = first.flip(0)
