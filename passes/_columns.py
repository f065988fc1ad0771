"""Columns of a matrix rounded one after the other, each error made good by those that are still open.

With H = R R^T, R upper triangular, column j is rounded to nearest of

    w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj

which is GPTQ's update written without the inverse of H (Babai's nearest plane on the lattice of R). asymmetric: the
target is W X_float instead of W X (GPTAQ, Li et al. 2025): w_j is replaced by w_j + sum_{i<j} w'_i P_ij, w'_i what
column i was just before it was rounded and P = triu((X_float - X) X^T R^-T, 1) R^-1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.passes._grid import Steps
from qfx.passes._hessian import Hessian, factor
from qfx.rounding.method_options import GptqOptions
from qfx.storage.spill import beside, give_back, is_mapped, rest

_COLUMNS = 128  # whose errors are passed on to the rest together
_ELEMENTS = 1 << 22  # of the rows that are rounded together
_ROWS = 128  # that are put in order at once


@dataclass(frozen=True)
class Columns:
    """What the columns of a matrix share. columns: their order. lower: R^T in that order. pushed: P, or None."""

    grid: Steps
    columns: Tensor
    lower: Tensor
    pushed: Tensor | None
    energy: Tensor
    dampening: float
    options: GptqOptions

    @classmethod
    def of(cls, seen: Hessian, grid: Steps, options: GptqOptions, name: str, weight: Tensor) -> Columns:
        """weight: where it lies in a file, so does the factor as long as P takes its memory."""
        whole, energy = seen.matrix, seen.diagonal
        if options.act_order:
            columns = energy.argsort(descending=True, stable=True)
        else:
            columns = torch.arange(len(whole), device=whole.device)
        upper, dampening = factor(whole, columns, options.dampening, name, energy)
        if seen.cross is None:
            return cls(grid, columns, upper.T, None, energy, dampening, options)
        pushed = _asymmetry(seen.cross, columns, upper)
        return cls(grid, columns, beside(upper.T, weight), pushed, energy, dampening, options)

    @property
    def _size(self) -> int:
        """Columns whose errors are passed on together; whole groups where their scales are found on the way."""
        return max(_COLUMNS // self.grid.together, 1) * self.grid.together

    @property
    def _moving(self) -> bool:
        """The scales of a group are found when it is reached: columns of groups in order, scales of their own."""
        return self.grid.moves and not self.options.act_order

    def solve(self, matrix: Tensor) -> Iterator[tuple[slice, Tensor, int]]:
        """A matrix [N, K] rounded, some rows [n] after the other: which, codes [n, K], and how many values lay beyond
        their codes."""
        size = max(_ELEMENTS // matrix.shape[1], 1)
        spans = [slice(at, min(at + size, len(matrix))) for at in range(0, len(matrix), size)]
        if is_mapped(matrix):
            give_back()  # what the statistics and their factor left
        count = 1 if self.pushed is None else 2
        rooms = [self.lower.new_empty(matrix.shape[1] * min(size, len(matrix))) for _ in range(count)]
        for rows in spans:
            yield rows, *self.round(matrix, rows, rooms)

    def round(self, matrix: Tensor, rows: slice, rooms: list[Tensor]) -> tuple[Tensor, int]:
        """Codes [n, K] of n rows of a matrix [N, K]; and how many values lay beyond their codes.

        rooms: f32 memory of K * n elements, twice where the correction is asymmetric.
        """
        errors = self._open(matrix[rows], rooms[0])  # [K, n]: weights, and from column j back what is lost in them
        codes = torch.empty_like(errors, dtype=self.grid.code_dtype)
        if self.pushed is None:
            reached = errors.new_empty(min(self._size, len(errors)), errors.shape[1])
        else:
            reached = rooms[1][: errors.numel()].view(errors.shape)
        order, scales = self.columns.tolist(), self.lower.diagonal().tolist()
        beyond = 0
        for start in range(0, len(errors), self._size):
            stop = min(start + self._size, len(errors))
            passed = self.lower[start:stop, :start] @ errors[:start]
            at = start if self.pushed is not None else 0  # in `reached`
            if self.pushed is not None:
                errors[start:stop] += self.pushed[:start, start:stop].T @ reached[:start]
            for j in range(start, stop):
                if self._moving and j % self.grid.width == 0:
                    self._refit(errors, passed, rows, start, j)
                if self.pushed is not None:
                    errors[j] += self.pushed[start:j, j] @ reached[start:j]
                whole, now = torch.addmv(passed[j - start], errors[start:j].T, self.lower[j, start:j]), at + j - start
                torch.add(errors[j], whole, alpha=1 / scales[j], out=reached[now])
                codes[order[j]], value = self.grid.round(order[j], reached[now], rows)
                torch.sub(errors[j], value, out=errors[j])
            beyond += self.grid.beyond(self.columns[start:stop], reached[at : at + stop - start], rows)
            rest(self.lower)
        return codes.T.contiguous(), beyond

    def _open(self, part: Tensor, room: Tensor) -> Tensor:
        """Rows [n, K] as columns in order, f32 [K, n], in this memory."""
        found = room[: part.numel()].view(part.shape[1], len(part))
        for start in range(0, len(part), _ROWS):
            few = part[start : start + _ROWS]
            found[:, start : start + len(few)] = few.to(torch.float32).T[self.columns]
        rest(part)
        return found

    def _refit(self, errors: Tensor, passed: Tensor, rows: slice, start: int, j: int) -> None:
        """Scales of the group that begins at column j, from its weights as the errors so far leave them."""
        stop = min(j + self.grid.reach(j), len(errors))
        whole = passed[j - start : stop - start] + self.lower[j:stop, start:j] @ errors[start:j]
        moved = torch.linalg.solve_triangular(self.lower[j:stop, j:stop], whole, upper=False)
        values = (errors[j:stop] + moved).T
        self.grid.refit(j, values, rows, self.energy[j:stop] if self.options.clip else None)


def _asymmetry(cross: Tensor, columns: Tensor, upper: Tensor) -> Tensor:
    """P = triu(D R^-T, 1) R^-1, from D [K, K] and R, both in this order of the columns; some rows after the other."""
    found = torch.empty_like(upper, memory_format=torch.contiguous_format)
    every, places = torch.arange(len(columns), device=columns.device), columns.argsort()
    for start in range(0, len(cross), _ROWS):
        rows = slice(start, start + _ROWS)
        inner = torch.linalg.solve_triangular(upper, cross[rows][:, columns].T, upper=True).T
        inner = inner.where(every > places[rows, None], 0.0)
        found[places[rows]] = torch.linalg.solve_triangular(upper, inner, upper=True, left=False)
        rest(cross[rows])
    rest(cross)
    return found
