"""What GPTQ leaves is improved by coordinate descent over codes and scales, on the same statistics.

    minimize tr (W - Q) H (W - Q)^T      H = X^T X + d * 1, Q = s (codes - zero)

GPTQ fixes each column when it is reached, by what lies before it, and takes its scales from the weights alone. A sweep
goes over all columns once more, each against all the others as they now are (Behdin et al. 2023, "QuantEase"), and over
the scale of each group, for its codes:

    q_j <- nearest to q_j + (W - Q) h_j / H_jj        s <- s + u (W - Q) H_g / u H_gg u^T,  u = Q_g / s

No step adds to the loss, since what was there is one of the choices. With the asymmetric correction W X_float is aimed
at, which adds W (X_float - X)^T X to (W - Q) H.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qfx.packing import Packed
from qfx.passes._grid import Grid, Steps
from qfx.passes._hessian import Hessian
from qfx.rounding.parts import joined
from qfx.storage.spill import give_back, is_mapped, rest

_COLUMNS = 128  # whose slopes are found together, where no group says how many
_WIDEST = 512  # channels of a group whose slopes are
_ELEMENTS = 1 << 21  # of the rows that are improved together, in as much memory as GPTQ takes
_ROWS = 64  # that are put in order at once
_FREE = ("f32", "f16", "bf16")  # scales that can be moved by little


def swept(
    matrix: Tensor, packed: Packed, seen: Hessian, grid: Grid, sweeps: int, dampening: float, *, moving: bool
) -> Packed:
    """A matrix [N, K] that GPTQ rounded on this grid, after so many sweeps. Scales of the grid move with them.

    dampening: share of the mean energy that is added to each channel's. moving: scales may move, where each row has its
    own in a type that is fine enough.
    """
    fmt = packed.format
    spans = [slice(0, len(matrix))]
    if fmt.by_row:
        size = max(_ELEMENTS // matrix.shape[1], 1)
        spans = [slice(at, min(at + size, len(matrix))) for at in range(0, len(matrix), size)]
    if is_mapped(matrix):
        give_back()  # what GPTQ left
    work = Sweep(seen, grid, dampening, moving=moving and fmt.by_row and fmt.scale_type in _FREE)

    def parts() -> Iterator[Packed]:
        for rows in spans:
            held = packed.part(rows) if fmt.by_row else packed
            codes = work.improve(*_columns(matrix[rows], held), rows, sweeps)
            scale, zero = grid.of(rows) if fmt.by_row else (grid.scale, grid.zero)
            yield Packed.from_codes(codes, fmt, scale, zero)

    return joined(parts(), fmt, tuple(matrix.shape)) if fmt.by_row else next(parts())


class Sweep:
    """The statistics of a matrix, with what is added to their diagonal, and its grid."""

    def __init__(self, seen: Hessian, grid: Steps, dampening: float, *, moving: bool) -> None:
        energy = seen.diagonal
        alive = energy > 0
        mean = float(energy[alive].mean()) if bool(alive.any()) else 1.0
        self.more = torch.where(alive, dampening * mean, mean)  # [K]; without energy a column is rounded to nearest
        self.seen, self.grid, self.moving = seen, grid, moving

    def improve(self, values: Tensor, lost: Tensor, codes: Tensor, rows: slice, sweeps: int) -> Tensor:
        """Codes [n, K] of rows of the matrix, given as columns [K, n], all of which change: values, what they lack of
        the matrix (both f32), and codes."""
        asked = self._asked(values, lost)
        width, channels = max(self.grid.width, self.grid.together), len(values)
        within = self.moving and width <= _WIDEST
        for _ in range(sweeps):
            if self.moving and not within:
                for start in range(0, channels, width):
                    self._rescale(values, lost, asked, rows, start, min(start + width, channels))
            size = width if within else _COLUMNS
            for start in range(0, channels, size):
                stop = min(start + size, channels)
                own, slope = self._own(start, stop), self._slope(lost, asked, start, stop)
                if within:
                    moved = self.grid.shift(start, rows, values[start:stop], slope, own)
                    slope -= own @ self._move(values, lost, start, stop, moved)
                self._recode(values, lost, codes, rows, start, slope, own)
        return codes.T.contiguous()

    def _asked(self, values: Tensor, lost: Tensor) -> Tensor | None:
        """What the asymmetric correction adds to every slope, f32 [K, n]: W alone decides it, and W stays."""
        if self.seen.cross is None:
            return None
        found = torch.zeros_like(lost)
        for at in range(0, len(lost), _COLUMNS):
            some = self.seen.cross[at : at + _COLUMNS]
            found.addmm_(some.T, values[at : at + _COLUMNS] + lost[at : at + _COLUMNS])
            rest(some)
        return found

    def _slope(self, lost: Tensor, asked: Tensor | None, start: int, stop: int) -> Tensor:
        """How much the loss falls where these columns grow (half of it), f32 [stop - start, n]."""
        matrix = self.seen.matrix[start:stop]
        found = matrix @ lost
        rest(matrix)
        if asked is not None:
            found += asked[start:stop]
        return found.addcmul_(self.more[start:stop, None], lost[start:stop])

    def _own(self, start: int, stop: int) -> Tensor:
        """H of these columns. Reading it from a file brings its neighbours, too: `_slope` lets go of them."""
        return self.seen.matrix[start:stop, start:stop] + torch.diag(self.more[start:stop])

    def _recode(
        self, values: Tensor, lost: Tensor, codes: Tensor, rows: slice, start: int, slope: Tensor, own: Tensor
    ) -> None:
        """Each of these columns to the best code, the others as they are."""
        steps, scales = torch.empty_like(slope), own.diagonal().tolist()
        for i in range(len(slope)):
            column = start + i
            now = torch.addmv(slope[i], steps[:i].T, own[i, :i], alpha=-1)
            codes[column], value = self.grid.round(column, now.div_(scales[i]).add_(values[column]), rows)
            torch.sub(value, values[column], out=steps[i])
            values[column] = value
        lost[start : start + len(slope)] -= steps

    def _rescale(self, values: Tensor, lost: Tensor, asked: Tensor | None, rows: slice, start: int, stop: int) -> None:
        """The same for a group that is wide, some of its columns after the other."""
        gain, curve = lost.new_zeros(lost.shape[1]), lost.new_zeros(lost.shape[1])
        for at in range(start, stop, _WIDEST):
            end = min(at + _WIDEST, stop)
            held = values[at:end]
            felt = (self.seen.matrix[at:end, start:stop] @ values[start:stop]).addcmul_(self.more[at:end, None], held)
            curve += (held * felt).sum(0)
            gain += (held * self._slope(lost, asked, at, end)).sum(0)
        assert isinstance(self.grid, Grid), "blocks are narrow"
        share = self.grid.rescale(start, rows, gain, curve)
        self._move(values, lost, start, stop, values[start:stop] * share)

    def _move(self, values: Tensor, lost: Tensor, start: int, stop: int, moved: Tensor) -> Tensor:
        """These columns by so much, which it returns."""
        values[start:stop] += moved
        lost[start:stop] -= moved
        return moved


def _columns(part: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, K] as columns [K, n]: what their codes stand for, what is lost in it (both f32), and the codes."""
    values = packed.scale.new_empty(part.shape[1], part.shape[0], dtype=torch.float32)
    lost, codes = torch.empty_like(values), torch.empty_like(values, dtype=packed.format.code_dtype)
    step = _ROWS if packed.format.by_row else len(part)
    for start in range(0, len(part), step):
        rows = slice(start, start + step)
        held = packed.part(rows) if packed.format.by_row else packed
        values[:, rows] = held.dequantize().T
        lost[:, rows] = part[rows].to(torch.float32).T - values[:, rows]
        codes[:, rows] = held.codes().T
        rest(part[rows])
    rest(part)
    return values, lost, codes
