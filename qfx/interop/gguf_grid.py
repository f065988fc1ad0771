"""The values that the weights of a matrix may take in GGUF's blocks, column by column, for GPTQ and its sweeps.

What `qfx.passes._grid.Grid` is for a format. A block's factors are found when its first column is reached, from its
weights as the errors so far leave them; in K types the integer scale (and min) of each further part then, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.interop.gguf_blocks import Blocks, BlockType, exponent_scale
from qfx.interop.gguf_encode import column_weights, fit_blocks, fit_part
from qfx.interop.gguf_search import nearest_index


class BlockGrid:
    """Factors and integer scales of a matrix [N, K] in blocks of one type.

    step, offset: f32 [K / width, N], value = step * code + offset (of a table: its value for the code). d, m: as blocks
    hold them, [K / size, N]. scales, mins: int16 [K / width, N] of K types. width: columns of a part. together: of a
    block. moves: see `Grid`.
    """

    moves = True

    def __init__(self, kind: BlockType, shape: tuple[int, int], device: torch.device | None = None) -> None:
        rows, columns = shape
        assert columns % kind.size == 0, (kind, shape)
        self.kind, self.shape = kind, shape
        self.width, self.together = kind.size // kind.parts, kind.size
        self.code_dtype = torch.int8 if kind.low < 0 else torch.uint8
        parts, blocks = columns // self.width, columns // kind.size
        self.step, self.offset = (torch.zeros(parts, rows, device=device) for _ in range(2))
        exponents = kind.name == "MXFP4"
        self.d = torch.zeros(blocks, rows, dtype=torch.uint8 if exponents else torch.float16, device=device)
        self.m = torch.zeros(blocks, rows, dtype=torch.float16, device=device)
        self.scales, self.mins = (torch.zeros(parts, rows, dtype=torch.int16, device=device) for _ in range(2))
        self._table = None if kind.table is None else torch.tensor(kind.table, dtype=torch.float32, device=device)

    def reach(self, column: int) -> int:
        """How many columns from the first one of a part on `refit` looks at: the whole block at its start."""
        return self.width if column % self.together else self.together

    def refit(self, column: int, values: Tensor, rows: slice, energy: Tensor | None) -> None:
        """Scales of what begins at `column`, a block or a further part of one, for values f32 [n, reach] of rows."""
        assert energy is not None, "an error counts by the energy of its column"
        w, block, part = column_weights(energy), column // self.together, column // self.width
        parts = slice(part, part + values.shape[1] // self.width)
        if column % self.together == 0:
            found = fit_blocks(values.unflatten(1, (1, self.kind.parts, -1)), w.unflatten(0, (1, self.kind.parts, -1)),
                               self.kind)  # fmt: skip
            self.d[block, rows] = found.d
            if found.m is not None:
                self.m[block, rows] = found.m
            if found.scales is not None:
                self.scales[parts, rows] = found.scales.T
            if found.mins is not None:
                self.mins[parts, rows] = found.mins.T
        else:
            m = self.m[block, rows].float() if self.kind.affine else None
            s, t = fit_part(values, w, self.d[block, rows].float(), m, self.kind)
            self.scales[part, rows] = s.to(torch.int16)
            if t is not None:
                self.mins[part, rows] = t.to(torch.int16)
        self._settle(block, parts, rows)

    def _settle(self, block: int, parts: slice, rows: slice) -> None:
        """Steps and offsets of parts of a block from its integers."""
        if self.kind.name == "MXFP4":
            self.step[parts, rows] = exponent_scale(self.d[block, rows])
            return
        of_scales, of_mins = self._directions(parts, rows)
        self.step[parts, rows] = self.d[block, rows].float() * of_scales
        if self.kind.affine:
            self.offset[parts, rows] = self.m[block, rows].float() * of_mins

    def _directions(self, parts: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """What d and m are multiplied by in parts, f32 [parts, n]."""
        if self.kind.parts > 1:
            return self.scales[parts, rows].float(), -self.mins[parts, rows].float()
        return torch.ones_like(self.step[parts, rows]), torch.ones_like(self.step[parts, rows])

    def round(self, column: int, values: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Codes and rounded values f32 of one column f32 [n] of some rows."""
        part = column // self.width
        step, offset = self.step[part, rows], self.offset[part, rows]
        steps = torch.where(step == 0, 0.0, (values - offset) / step).nan_to_num_(0.0, 0.0, 0.0)
        if self._table is not None:
            codes = nearest_index(steps, self.kind.table or ())
            return codes, self._table[codes] * step
        codes = steps.round_().clamp_(self.kind.low, self.kind.high)
        return codes, (codes * step).add_(offset)

    def shift(self, start: int, rows: slice, held: Tensor, slope: Tensor, own: Tensor) -> Tensor:
        """Move the factors of the block at column `start` to the best for its codes; by how much its values move.

        The loss is quadratic in d and m: two equations, of which a float16 keeps what it can; rows that would not gain
        stay. held, slope f32 [size, n]: its values, and how much the loss falls where they grow (half of it); own: H
        there.
        """
        block, part = start // self.together, start // self.width
        parts = slice(part, part + self.kind.parts)
        if self.kind.name == "MXFP4":
            return torch.zeros_like(held)
        unit = own.diagonal().mean().clamp_min(1e-38)
        own, slope = own / unit, slope / unit  # products of sums of squares shall stay within float32
        d, m = self.d[block, rows].float(), self.m[block, rows].float()
        along_m = self._directions(parts, rows)[1].repeat_interleave(self.width, 0)
        along_d = torch.where(d == 0, 0.0, (held - m * along_m) / d)
        if not self.kind.affine:
            along_m = torch.zeros_like(along_m)
        by_d, by_m = own @ along_d, own @ along_m
        dd, dm, mm = (along_d * by_d).sum(0), (along_d * by_m).sum(0), (along_m * by_m).sum(0)
        to_d, to_m = (along_d * slope).sum(0), (along_m * slope).sum(0)
        determinant = dd * mm - dm * dm
        both = determinant > 1e-6 * dd * mm
        safe = torch.where(both, determinant, 1.0)
        alone = torch.where(dd > 0, to_d / dd.clamp_min(1e-38), 0.0)
        new_d = (d + torch.where(both, (mm * to_d - dm * to_m) / safe, alone)).to(torch.float16)
        new_m = (m + torch.where(both, (dd * to_m - dm * to_d) / safe, 0.0)).to(torch.float16)
        moved = along_d * (new_d.float() - d) + along_m * (new_m.float() - m)
        gain = 2 * (moved * slope).sum(0) - (moved * (own @ moved)).sum(0)
        same_sign = (new_d.float() * d > 0) & ((new_m.float() * m > 0) | (new_m.float() == m) | (self.kind.parts == 1))
        good = (gain > 0) & same_sign & torch.isfinite(new_d) & torch.isfinite(new_m)
        self.d[block, rows] = torch.where(good, new_d, self.d[block, rows])
        self.m[block, rows] = torch.where(good, new_m, self.m[block, rows])
        self._settle(block, parts, rows)
        return torch.where(good, moved, 0.0)

    def beyond(self, columns: Tensor, values: Tensor, rows: slice) -> int:
        """How many of the values f32 [k, n] of columns int [k] lie outside the range of their codes."""
        part = columns // self.width
        ends = self.kind.table or (self.kind.low - 0.5, self.kind.high + 0.5)
        steps = (values - self.offset[part][:, rows]) / self.step[part][:, rows]
        return int(((steps < min(ends) - 1e-3) | (steps > max(ends) + 1e-3)).sum())

    def values(self, codes: Tensor, rows: slice) -> Tensor:
        """What codes [n, K] of some rows stand for, f32 [K, n]."""
        found = codes.T.float() if self._table is None else self._table[codes.T.long()]
        step, offset = (t[:, rows].repeat_interleave(self.width, 0) for t in (self.step, self.offset))
        return found * step + offset

    def blocks(self, codes: Tensor, rows: slice) -> Blocks:
        """The blocks of some rows, one row after the other, given their codes [n, K]."""
        kind, parts = self.kind, self.kind.parts
        d, m = (t[:, rows].T.clone(memory_format=torch.contiguous_format).reshape(-1) for t in (self.d, self.m))
        s, t = (t[:, rows].T.reshape(-1, parts) for t in (self.scales, self.mins))
        two, affine = parts > 1, kind.affine
        return Blocks(kind, codes.reshape(-1, kind.size), d, m if affine else None, s if two else None,
                      t if two and affine else None)  # fmt: skip
