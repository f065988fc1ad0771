"""The values that the weights of a matrix may take, column by column: its format with scales found beforehand."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.format import Format
from qfx.numerics import QParams, choose_qparams, dequantize, effective_scale, quantize, signed_scale
from qfx.rounding.scales import search


class Steps(Protocol):
    """What GPTQ and its sweeps ask of a grid; see `Grid`."""

    width: int
    together: int
    moves: bool
    code_dtype: torch.dtype

    def reach(self, column: int) -> int: ...
    def refit(self, column: int, values: Tensor, rows: slice, energy: Tensor | None) -> None: ...
    def round(self, column: int, values: Tensor, rows: slice) -> tuple[Tensor, Tensor]: ...
    def shift(self, start: int, rows: slice, held: Tensor, slope: Tensor, own: Tensor) -> Tensor: ...
    def beyond(self, columns: Tensor, values: Tensor, rows: slice) -> int: ...


class Grid:
    """Format, scales and zero points of a matrix [N, K], to round single columns of it.

    scale, zero: as in QParams. step, offset: f32 [G, N], those of column j at j // width. moves: scales of a group may
    be found when its first column is reached. together: columns whose scales belong together.
    """

    def __init__(self, fmt: Format, scale: Tensor, zero: Tensor | None, shape: tuple[int, int]) -> None:
        self.format, self.shape = fmt, shape
        self.scale, self.zero = scale.clone(), None if zero is None else zero.clone()
        self.width = fmt.group or (fmt.block[1] if fmt.block else shape[1])
        self.moves, self.together = fmt.group is not None and fmt.by_row, fmt.group or 1
        self.code_dtype = fmt.code_dtype
        self._one = Format(fmt.type), torch.ones((), device=scale.device)
        self.step = self._by_column(effective_scale(self.scale, self.zero, fmt))
        self.offset = self._by_column(self.zero.to(torch.float32)) if fmt.has_zero and self.zero is not None else None

    def _by_column(self, held: Tensor) -> Tensor:
        rows = self.shape[0]
        if held.dim() == 0:
            return held.expand(1, rows).contiguous()
        if self.format.block:
            held = held.repeat_interleave(self.format.block[0], 0)[:rows]
        return held.T.contiguous()

    def of(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point, as stored, of some rows; of a format whose scales are those of single rows."""
        return self.scale[rows], None if self.zero is None else self.zero[rows]

    def round(self, column: int, values: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Codes (f32 for integers, else as stored) and rounded values of one column f32 [n] of some rows."""
        group = column // self.width
        step, fmt = self.step[group, rows], self.format
        if not fmt.is_integer:
            codes = quantize(values / step, *self._one)
            return codes, dequantize(codes, *self._one).mul_(step)
        codes = (values / step).round_()
        if self.offset is None:
            codes.clamp_(fmt.qmin, fmt.qmax)
            return codes, codes * step
        offset = self.offset[group, rows]
        codes.add_(offset).clamp_(fmt.qmin, fmt.qmax)
        return codes, (codes - offset).mul_(step)

    def reach(self, column: int) -> int:
        """How many columns from the first one of a group on `refit` looks at."""
        return self.width

    def refit(self, column: int, values: Tensor, rows: slice, energy: Tensor | None) -> None:
        """Find the scales of the group anew that begins at `column`, for values f32 [n, g] of rows. See `scales`."""
        fmt = Format(self.format.type, "ch", self.format.scale_type)
        group = column // self.width
        found = scales(values, fmt, energy)
        self.scale[rows, group] = found.scale[:, 0]
        self.step[group, rows] = found.scale[:, 0].to(torch.float32)
        if self.zero is not None and self.offset is not None and found.zero is not None:
            self.zero[rows, group] = found.zero[:, 0]
            self.offset[group, rows] = found.zero[:, 0].to(torch.float32)

    def shift(self, start: int, rows: slice, held: Tensor, slope: Tensor, own: Tensor) -> Tensor:
        """Move the scales of the group at column `start` to the best for its codes; by how much its values move.

        held, slope f32 [g, n]: its values, and how much the loss falls where they grow (half of it). own: H there.
        """
        return held * self.rescale(start, rows, (held * slope).sum(0), (held * (own @ held)).sum(0))

    def rescale(self, start: int, rows: slice, gain: Tensor, curve: Tensor) -> Tensor:
        """Scales times 1 + gain / curve, as they are stored, where that lowers the loss: 2 r gain - r^2 curve > 0.

        The shares r f32 [n] by which they grew.
        """
        group = start // self.width
        old = self.step[group, rows]
        stored = signed_scale(old * (1 + gain / curve.clamp(min=torch.finfo(torch.float32).tiny)), None, self.format)
        new = stored.to(torch.float32)
        share = new / old - 1
        good = (2 * share * gain - share.square() * curve > 0) & (new * old > 0) & torch.isfinite(new)
        self.step[group, rows] = torch.where(good, new, old)
        target = self.scale[rows]
        target[:, group] = torch.where(good, stored, target[:, group])
        return torch.where(good, share, 0.0)

    def beyond(self, columns: Tensor, values: Tensor, rows: slice) -> int:
        """How many of the values f32 [k, n] of columns int [k] lie outside the range of their codes."""
        group = columns // self.width
        step, fmt = self.step[group][:, rows], self.format
        half = 0.5 if fmt.is_integer else 0.0
        offset = 0.0 if self.offset is None else self.offset[group][:, rows]
        steps = values / step + offset
        slack = 1e-3 * (1.0 if fmt.is_integer else fmt.qmax)  # the extremes themselves do not count
        return int(((steps < fmt.qmin - half - slack) | (steps > fmt.qmax + half + slack)).sum())


def scales(full: Tensor, fmt: Format, energy: Tensor | None) -> QParams:
    """Scales and zero points for f32 [.., N, K] from the extremes; with the energy of each column [K], searched."""
    return choose_qparams(full, fmt) if energy is None else search(full, fmt, Importance(energy))
