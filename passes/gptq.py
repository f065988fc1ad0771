"""GPTQ: weights rounded one input channel after the other, each error made good by the channels that are still open.

    minimize ||W X - Q X||^2 over Q in the format, H = X X^T           (Frantar et al. 2022)

With H = R R^T, R upper triangular, column j is rounded to nearest of

    w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj

which is GPTQ's update written without the inverse of H (Babai's nearest plane on the lattice of R). X is what the layer
reads behind the layers that are rounded already. asymmetric: the target is W X_float instead of W X (GPTAQ, Li et al.
2025): w_j is replaced by w_j + sum_{i<j} w'_i P_ij, w'_i what column i was just before it was rounded and
P = triu((X_float - X) X^T R^-T, 1) R^-1.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfx.blocks import Block, Part, Site
from qfx.errors import Note, explain
from qfx.format import Format
from qfx.method_options import GptqOptions
from qfx.numerics import dequantize, quantize
from qfx.packing import Packed
from qfx.parts import ELEMENTS, round_in_parts
from qfx.passes._grid import Grid, scales
from qfx.passes._hessian import Hessian, factor
from qfx.recipe import Recipe
from qfx.rounding import round_weight
from qfx.spill import rest

_COLUMNS = 128  # whose errors are passed on to the rest together
_ELEMENTS = 1 << 23  # of the rows that are rounded together
_SAMPLED = 256  # rows by which errors are told


def method(recipe: Recipe) -> Gptq:
    """For `qfx.sequential`."""
    return Gptq(recipe.gptq)


@dataclass(frozen=True)
class Gptq:
    """GPTQ as a method of `qfx.sequential`."""

    options: GptqOptions

    @property
    def needs_float(self) -> bool:
        """The float model's inputs are asked for by the asymmetric correction alone."""
        return self.options.asymmetric

    def round(self, block: Block) -> list[Note]:
        """Round every weight of a block. Raises ValueError where what a layer reads is NaN or infinite."""
        notes: list[Note] = []
        for site in block.sites:
            started = time.perf_counter()
            grouped = site.linears[0].grouped  # the float model may send other tokens to an expert
            seen = _statistics(block, site, cross=self.options.asymmetric and not grouped)
            if self.options.asymmetric and grouped:
                reason = "experts are rounded without the asymmetric correction: it needs the float model's same tokens"
                notes.append(Note(site.linears[0].fqn, reason, "nothing", minor=True))
            share = (time.perf_counter() - started) / len(site.linears)
            for part in (part for linear in site.linears for part in linear.parts):
                started = time.perf_counter()
                weight = block.weight(part)
                found = [one.columns(part.columns) for one in seen]
                packed, told = round_by(weight, found, part.format, self.options, name=part.name)
                notes += _notes(part, found, weight)
                seconds = share / len(part.linear.parts) + time.perf_counter() - started
                block.put(part, packed, {**told, "seconds": round(seconds, 3)})
        return notes

    def round_table(self, part: Part, weight: Tensor, inputs: Iterable[Tensor]) -> tuple[Packed, dict[str, Any]]:
        """Round a table that an embedding and a linear read, for both: an error in a row counts as it is, since the
        embedding picks it, and by what the linear reads. So each channel gets the mean energy on top of its own."""
        started = time.perf_counter()
        seen = Hessian(weight.shape[-1], device=weight.device)
        for batch, x in enumerate(inputs):
            seen.add(x)
            _check_table(part, seen, batch)
        options = GptqOptions(act_order=False, dampening=1.0, clip=True)
        packed, told = round_by(weight, [seen], part.format, options, name=part.name)
        return packed, {**told, "seconds": round(time.perf_counter() - started, 3)} if told else {}


def _statistics(block: Block, site: Site, *, cross: bool) -> list[Hessian]:
    """One Hessian; one for each expert where the site is of experts."""
    first = site.linears[0]
    shape = block.weight(first.parts[0]).shape if first.grouped else (1,)
    seen: list[Hessian] = []
    for batch, (x, wanted) in enumerate(block.inputs_of(site)):
        rows = x.reshape(-1, x.shape[-1])
        other = None if wanted is None or not cross else wanted.reshape(rows.shape)
        seen = seen or [Hessian(rows.shape[1], cross=cross, device=rows.device) for _ in range(shape[0])]
        ends = block.offsets_of(site, batch).tolist() if first.grouped else [len(rows)]
        start = 0
        for one, end in zip(seen, ends, strict=True):
            one.add(rows[start:end], None if other is None else other[start:end])
            start = end
        _check(block, site, seen, batch)
    return seen


def _check(block: Block, site: Site, seen: list[Hessian], batch: int) -> None:
    """Raises ValueError, naming the layer and the channel, where the statistics are not finite any more."""
    for one in seen:
        bad = (~torch.isfinite(one.diagonal)).nonzero().flatten()
        if not len(bad):
            continue
        source = block.first_bad(batch, site.x)
        raise ValueError(
            explain(
                f"the input of {site.linears[0].fqn!r} is NaN, or too large, in batch {batch + 1}",
                expected="finite values whose squares f32 can hold",
                found=f"{len(bad)} of {len(one.diagonal)} channels, the first is {int(bad[0])}"
                + (f"; NaN or infinity first comes up in {source}" if source else ""),
                next_step="look at that batch; a model in float16 may need bfloat16 or float32",
            )
        )


def _check_table(part: Part, seen: Hessian, batch: int) -> None:
    """Raises ValueError where what the linear of a table reads is not finite."""
    if not bool(torch.isfinite(seen.diagonal).all()):
        raise ValueError(
            explain(
                f"the input of {part.names[-1]!r} is NaN, or too large, in batch {batch + 1}",
                expected="finite values whose squares f32 can hold",
                next_step="look at that batch; a model in float16 may need bfloat16 or float32",
            )
        )


def _notes(part: Part, seen: list[Hessian], weight: Tensor) -> Iterator[Note]:
    channels = weight.shape[-1]
    unseen = [i for i, one in enumerate(seen) if one.rows == 0]
    few = [one.rows for one in seen if 0 < one.rows < channels]
    if unseen:
        shown = ", ".join(map(str, unseen[:5])) + (", ..." if len(unseen) > 5 else "")
        reason = f"no token of the data reached {len(unseen)} of {len(seen)} experts ({shown}): rounded by 'mse'"
        yield Note(part.name, reason, "give more data", minor=True)
    if few:
        which = "a layer" if len(seen) == 1 else f"{len(few)} of {len(seen)} experts"
        reason = f"GPTQ saw fewer tokens than input channels in {which}, and fits the data closely"
        yield Note(part.name, reason, "give more data", minor=True)
    if part.format.group is not None and part.format.group > channels:
        reason = f"groups of {part.format.group} are wider than its {channels} input channels, and padded"
        yield Note(part.name, reason, f"a format of groups that divide {channels}, or /ch", minor=True)


def round_by(
    weight: Tensor, seen: list[Hessian], fmt: Format, options: GptqOptions, *, name: str
) -> tuple[Packed, dict[str, Any]]:
    """A weight [N, K] (one Hessian) or [E, N, K] (E Hessians) rounded in `fmt`, and what is told about it.

    told: error_before, error_after (squared error of the result relative to it, on some rows; rounded to nearest, and
    by GPTQ), dampening (the greatest used), dead (share of channels without energy), clipped (share of weights beyond
    the range of their codes). Raises ValueError where the weight or the statistics are not finite.
    """
    nearest = round_in_parts(weight, fmt, "rtn", name=name)
    if fmt.is_plain:
        return nearest, {}
    full = weight.detach()
    start = nearest.params()
    before = _rows_of(nearest.codes(), fmt, *start, _some(full))
    if full.dim() == 2:
        grid = _grid(full, fmt, start, seen[0], options)
        codes, told = _solve(full, before, seen[0], grid, options, name)
        return Packed.from_codes(codes, fmt, grid.scale, grid.zero), told
    solved = []
    for i, one in enumerate(seen):
        scale, zero = (t[i] if t is not None and t.dim() else t for t in start)
        assert scale is not None
        grid = _grid(full[i], fmt, (scale, zero), one, options)
        solved.append((*_solve(full[i], before[i], one, grid, options, name), grid))
    return _stacked(solved, fmt), _mean([told for _, told, _ in solved if told])


def _grid(
    matrix: Tensor, fmt: Format, nearest: tuple[Tensor, Tensor | None], seen: Hessian, options: GptqOptions
) -> Grid:
    """The grid of a matrix, with searched scales where they are asked for and are the matrix's own."""
    scale, zero = nearest
    if options.clip and seen.rows and fmt.by_row:
        rows = matrix.split(max(1, ELEMENTS // matrix.shape[1]))
        parts = []
        for part in rows:
            parts.append(scales(part.to(torch.float32), fmt, seen.diagonal))
            rest(part)
        scale = torch.cat([part[0] for part in parts])
        zeros = [part[1] for part in parts if part[1] is not None]
        zero = torch.cat(zeros) if zeros else None
    return Grid(fmt, scale, zero, (matrix.shape[0], matrix.shape[1]))


def _stacked(solved: list[tuple[Tensor, dict[str, Any], Grid]], fmt: Format) -> Packed:
    """The experts' codes, scales and zero points as one weight; what is one for the whole tensor is shared."""
    first = solved[0][2]
    scale = torch.stack([grid.scale for *_, grid in solved]) if first.scale.dim() else first.scale
    zero = first.zero
    if zero is not None and zero.dim():
        zero = torch.stack([grid.zero for *_, grid in solved if grid.zero is not None])
    return Packed.from_codes(torch.stack([codes for codes, *_ in solved]), fmt, scale, zero)


def _mean(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the experts that saw tokens: the greatest dampening, of everything else the mean."""
    if not told:
        return {}
    found = {key: sum(one[key] for one in told) / len(told) for key in told[0]}
    return {**found, "dampening": max(one["dampening"] for one in told)}


def _solve(
    matrix: Tensor, nearest: Tensor, seen: Hessian, grid: Grid, options: GptqOptions, name: str
) -> tuple[Tensor, dict[str, Any]]:
    """Codes [N, K] of one matrix [N, K], and what is told about it; its scales are left in `grid`.

    nearest: some rows of it (see `_some`) as rounding to nearest gives them.
    """
    if seen.rows == 0:
        return _unseen(matrix, grid, name), {}
    seen.settle(matrix)
    work = _Work.of(seen, grid, options, name)
    codes = torch.empty((matrix.shape[1], matrix.shape[0]), dtype=grid.format.code_dtype, device=matrix.device)
    size = max(_ELEMENTS // matrix.shape[1], 1)
    beyond = sum(work.round(matrix, slice(at, at + size), codes) for at in range(0, len(matrix), size))
    dampening = work.dampening
    del work  # with the factor, which is as large as the statistics
    codes, some = codes.T.contiguous(), _some(matrix)
    exact, after = matrix[some].to(torch.float32), _rows_of(codes, grid.format, grid.scale, grid.zero, some)
    signal = max(seen.energy(exact), 1e-30)
    told = {
        "error_before": seen.energy(exact - nearest) / signal,
        "error_after": seen.energy(exact - after) / signal,
        "dampening": dampening,
        "dead": float((seen.diagonal <= 0).double().mean()),
        "clipped": beyond / max(matrix.numel(), 1),
    }
    return codes, told


def _some(matrix: Tensor) -> slice:
    """The rows of [.., N, K] by which errors are told."""
    return slice(None, None, -(-matrix.shape[-2] // _SAMPLED))


def _rows_of(codes: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None, some: slice) -> Tensor:
    """Some rows of codes [.., N, K] as they come back, f32."""
    if not fmt.by_row:
        return dequantize(codes, fmt, scale, zero)[..., some, :].clone()
    own, offset = (t[..., some, :] if t is not None and t.dim() else t for t in (scale, zero))
    return dequantize(codes[..., some, :], fmt, own, offset)


def _unseen(matrix: Tensor, grid: Grid, name: str) -> Tensor:
    """Codes of an expert that no token reached."""
    if not grid.format.by_row:  # its scales are not its own
        return quantize(matrix, grid.format, grid.scale, grid.zero)
    packed = round_weight(matrix, grid.format, "mse", name=name)
    grid.scale, grid.zero = packed.params()
    return packed.codes()


@dataclass(frozen=True)
class _Work:
    """What the columns of a matrix share. columns: their order. lower: R^T in that order. pushed: P, or None."""

    grid: Grid
    columns: Tensor
    lower: Tensor
    pushed: Tensor | None
    energy: Tensor
    dampening: float
    options: GptqOptions

    @classmethod
    def of(cls, seen: Hessian, grid: Grid, options: GptqOptions, name: str) -> _Work:
        whole, energy = seen.matrix, seen.diagonal
        if options.act_order:
            columns = energy.argsort(descending=True, stable=True)
        else:
            columns = torch.arange(len(whole), device=whole.device)
        upper, dampening = factor(whole, columns, options.dampening, name, energy)
        pushed = None if seen.cross is None else _asymmetry(seen.cross[columns][:, columns], upper)
        return cls(grid, columns, upper.T.contiguous(), pushed, energy, dampening, options)

    @property
    def _size(self) -> int:
        """Columns whose errors are passed on together; whole groups where their scales are found on the way."""
        group = self.grid.format.group or 1
        return max(_COLUMNS // group, 1) * group

    @property
    def _moving(self) -> bool:
        """The scales of a group are found when it is reached: columns of groups in order, scales of their own."""
        fmt = self.grid.format
        return fmt.group is not None and fmt.by_row and not self.options.act_order

    def round(self, matrix: Tensor, rows: slice, codes: Tensor) -> int:
        """Round some rows of a matrix [N, K] into `codes` [K, N]. Returns how many values lay beyond their codes."""
        target = matrix[rows].to(torch.float32).T[self.columns]
        rest(matrix[rows])
        errors, reached = torch.empty_like(target), torch.empty_like(target)
        order, scales = self.columns.tolist(), self.lower.diagonal().tolist()
        beyond = 0
        for start in range(0, len(target), self._size):
            stop = min(start + self._size, len(target))
            passed = self.lower[start:stop, :start] @ errors[:start]
            if self.pushed is not None:
                target[start:stop] += self.pushed[:start, start:stop].T @ reached[:start]
            for j in range(start, stop):
                if self._moving and j % self.grid.width == 0:
                    self._refit(target, errors, passed, rows, start, j)
                if self.pushed is not None:
                    target[j] += self.pushed[start:j, j] @ reached[start:j]
                whole = torch.addmv(passed[j - start], errors[start:j].T, self.lower[j, start:j])
                torch.add(target[j], whole, alpha=1 / scales[j], out=reached[j])
                found, value = self.grid.round(order[j], reached[j], rows)
                torch.sub(target[j], value, out=errors[j])
                codes[order[j], rows] = found
            beyond += self.grid.beyond(self.columns[start:stop], reached[start:stop], rows)
        return beyond

    def _refit(self, target: Tensor, errors: Tensor, passed: Tensor, rows: slice, start: int, j: int) -> None:
        """Scales of the group that begins at column j, from its weights as the errors so far leave them."""
        stop = min(j + self.grid.width, len(target))
        whole = passed[j - start : stop - start] + self.lower[j:stop, start:j] @ errors[start:j]
        moved = torch.linalg.solve_triangular(self.lower[j:stop, j:stop], whole, upper=False)
        values = (target[j:stop] + moved).T
        self.grid.refit(j, values, rows, self.energy[j:stop] if self.options.clip else None)


def _asymmetry(cross: Tensor, upper: Tensor) -> Tensor:
    """P = triu(D R^-T, 1) R^-1, from D [K, K] and R."""
    inner = torch.linalg.solve_triangular(upper, cross.T, upper=True).T
    found: Tensor = torch.linalg.solve_triangular(upper, inner.triu(1), upper=True, left=False)
    return found
