"""GPTQ: weights rounded one input channel after the other, each error made good by the channels that are still open.

    minimize ||W X - Q X||^2 over Q in the format, H = X X^T           (Frantar et al. 2022)

X is what the layer reads behind the layers that are rounded already. The columns are rounded in `_columns.py`, on a
grid of values (`_grid.py`); sweeps: what that leaves is improved by coordinate descent (`_sweep.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.errors import Note, explain, listed
from qfx.format import Format
from qfx.numerics import QParams, quantize
from qfx.packing import Packed
from qfx.passes._columns import Columns
from qfx.passes._grid import Grid, scales
from qfx.passes._hessian import Hessian
from qfx.passes._sweep import swept
from qfx.recipe import Recipe
from qfx.rounding.blocks import Block, Part, Site
from qfx.rounding.method_options import GptqOptions
from qfx.rounding.nearest import round_weight
from qfx.rounding.parts import ELEMENTS, joined, round_in_parts
from qfx.rounding.scales import search
from qfx.storage.spill import rest

_SAMPLED = 256  # rows by which errors are told


def method(recipe: Recipe) -> Gptq:
    """For `qfx.rounding.sequential`."""
    return Gptq(recipe.gptq)


Solve = Callable[[Part, Tensor, list[Hessian], GptqOptions], tuple[Packed, dict[str, Any]]]


def _in_its_format(
    part: Part, weight: Tensor, seen: list[Hessian], options: GptqOptions
) -> tuple[Packed, dict[str, Any]]:
    return round_by(weight, seen, part.format, options, name=part.name)


@dataclass(frozen=True)
class Gptq:
    """GPTQ as a method of `qfx.rounding.sequential`. solve: rounds one weight."""

    options: GptqOptions
    solve: Solve = _in_its_format

    @property
    def needs_float(self) -> bool:
        """The float model's inputs are asked for by the asymmetric correction alone."""
        return self.options.asymmetric

    @property
    def reads_all(self) -> bool:
        """The statistics of a weight are of all calls that read it."""
        return True

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
            counts = [one.rows for one in seen]
            filled = block.shares_inputs(site) and _filled(seen)
            share = (time.perf_counter() - started) / len(site.linears)
            for part in (part for linear in site.linears for part in linear.parts):
                started = time.perf_counter()
                weight = block.weight(part)
                found = [one.columns(part.columns) for one in seen]
                packed, told = self.solve(part, weight, found, self.options)
                notes += _notes(part, counts, weight, filled=filled)
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
            _check(part.names[-1], seen, batch)
        options = GptqOptions(act_order=False, dampening=1.0, clip=True)
        packed, told = self.solve(part, weight, [seen], options)
        return packed, {**told, "seconds": round(time.perf_counter() - started, 3)} if told else {}


def _statistics(block: Block, site: Site, *, cross: bool) -> list[Hessian]:
    """One Hessian; one for each expert where the site is of experts. Of everything that the layers read, wherever they
    are called."""
    first = site.linears[0]
    shape = block.weight(first.parts[0]).shape if first.grouped else (1,)
    seen: list[Hessian] = []
    for there, one_site in block.reads(site):
        for batch, (x, wanted) in enumerate(there.inputs_of(one_site)):
            rows = x.reshape(-1, x.shape[-1])
            other = None if wanted is None or not cross else wanted.reshape(rows.shape)
            seen = seen or [Hessian(rows.shape[1], cross=cross, device=rows.device) for _ in range(shape[0])]
            ends = there.offsets_of(one_site, batch).tolist() if first.grouped else [len(rows)]
            start = 0
            for one, end in zip(seen, ends, strict=True):
                one.add(rows[start:end], None if other is None else other[start:end])
                start = end
            for one in seen:
                _check(first.fqn, one, batch, functools.partial(block.first_bad, batch, one_site.x))
    return seen


def _check(name: str, seen: Hessian, batch: int, source: Callable[[], str] = str) -> None:
    """Raises ValueError, naming the layer and the channel, where the statistics are not finite any more.

    source: where NaN or infinity first comes up, as far as that is known.
    """
    bad = (~torch.isfinite(seen.diagonal)).nonzero().flatten()
    if not len(bad):
        return
    where = source()
    raise ValueError(
        explain(
            f"the input of {name!r} is NaN, or too large, in batch {batch + 1}",
            expected="finite values whose squares f32 can hold",
            found=f"{len(bad)} of {len(seen.diagonal)} channels, the first is {int(bad[0])}"
            + (f"; NaN or infinity first comes up in {where}" if where else ""),
            next_step="look at that batch; a model in float16 may need bfloat16 or float32",
        )
    )


def _filled(seen: list[Hessian]) -> bool:
    """Experts that saw fewer tokens than channels get what is missing from what all of them saw, on average: a few
    tokens tell nothing of most directions. Whether they did: all together must have seen enough (tokens count for each
    of their experts, so twice as many)."""
    channels, rows = len(seen[0].diagonal), sum(one.rows for one in seen)
    few = [one for one in seen if one.rows < channels]
    if not few or rows < 2 * channels:
        return False
    mean = Hessian(0)
    mean.matrix, mean.rows = torch.zeros_like(seen[0].matrix), rows
    for one in seen:
        mean.matrix += one.whole()
    for one in few:
        one.fill(mean, channels - one.rows)
    return True


def _notes(part: Part, counts: Sequence[int], weight: Tensor, *, filled: bool) -> Iterator[Note]:
    """counts: tokens that the layer, or each expert, saw. filled: see `_filled`."""
    channels = weight.shape[-1]
    unseen = [i for i, count in enumerate(counts) if count == 0]
    few = [count for count in counts if 0 < count < channels]
    if unseen:
        shown = listed([*map(str, unseen)], 5)
        how = "by what the others read" if filled else "by 'mse'"
        reason = f"no token of the data reached {len(unseen)} of {len(counts)} experts ({shown}): rounded {how}"
        yield Note(part.name, reason, "give more data", minor=True)
    if few:
        which = "a layer" if len(counts) == 1 else f"{len(few)} of {len(counts)} experts"
        how = "counts what the others read, too" if filled else "fits the data closely"
        reason = f"GPTQ saw fewer tokens than input channels in {which}, and {how}"
        yield Note(part.name, reason, "give more data", minor=True)
    if part.format.group is not None and part.format.group > channels:
        reason = f"groups of {part.format.group} are wider than its {channels} input channels, and padded"
        yield Note(part.name, reason, f"a format of groups that divide {channels}, or /ch", minor=True)


def round_by(
    weight: Tensor, seen: list[Hessian], fmt: Format, options: GptqOptions, *, name: str, kept: QParams | None = None
) -> tuple[Packed, dict[str, Any]]:
    """A weight [N, K] (one Hessian) or [E, N, K] (E Hessians) rounded in `fmt`, and what is told about it.

    kept: scales and zero points of a weight [N, K] that are taken as they are (with options.act_order). What is told:
    error_before, error_after (squared error of the result relative to it, on some rows; rounded to nearest, and
    by GPTQ), dampening (the greatest used), dead (share of channels without energy), clipped (share of weights beyond
    the range of their codes). Raises ValueError where the weight or the statistics are not finite.
    """
    nearest = round_in_parts(weight, fmt, "rtn", name=name)
    if fmt.is_plain:
        return nearest, {}
    full = weight.detach()
    before, start = _values(nearest, _some(full)), nearest.params()
    del nearest  # its codes
    if options.clip and kept is None and not fmt.by_row and any(one.rows for one in seen):
        start = search(full.to(torch.float32), fmt, Importance(_energies(seen)))
    if full.dim() == 2:
        grid = _grid(full, fmt, start, seen[0], options)
        if kept is not None:
            grid = Grid(fmt, *kept, (full.shape[0], full.shape[1]))
        return _solve(full, before, seen[0], grid, options, name, moving=kept is None)
    solved = []
    for i, one in enumerate(seen):
        scale, zero = (t[i] if t is not None and t.dim() else t for t in start)
        assert scale is not None
        grid = _grid(full[i], fmt, (scale, zero), one, options)
        solved.append(_solve(full[i], before[i], one, grid, options, name))
    return _stacked([packed for packed, _ in solved]), _mean([told for _, told in solved if told])


def _energies(seen: list[Hessian]) -> Tensor:
    """The energy of each channel [K], or of each expert [E, K]; one that saw nothing is as the others on average."""
    if len(seen) == 1:
        return seen[0].diagonal
    mean = torch.stack([one.diagonal for one in seen if one.rows]).mean(0)
    return torch.stack([one.diagonal if one.rows else mean for one in seen])


def _grid(
    matrix: Tensor, fmt: Format, start: tuple[Tensor, Tensor | None], seen: Hessian, options: GptqOptions
) -> Grid:
    """The grid of a matrix, with searched scales where they are asked for and each is of a row alone; else `start`."""
    scale, zero = start
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


def _stacked(each: list[Packed]) -> Packed:
    """The experts as one weight; what is one for the whole tensor is shared."""
    first = each[0]
    scale = torch.stack([one.scale for one in each]) if first.scale.dim() else first.scale
    zero = first.zero
    if zero is not None and zero.dim():
        zero = torch.stack([one.zero for one in each if one.zero is not None])
    data = torch.stack([one.data for one in each])
    return Packed(data, scale, zero, first.format, (len(each), *first.shape))


def _mean(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the experts that saw tokens: the greatest dampening, of everything else the mean."""
    if not told:
        return {}
    found = {key: sum(one[key] for one in told) / len(told) for key in told[0]}
    return {**found, "dampening": max(one["dampening"] for one in told)}


def _solve(
    matrix: Tensor, nearest: Tensor, seen: Hessian, grid: Grid, options: GptqOptions, name: str, *, moving: bool = True
) -> tuple[Packed, dict[str, Any]]:
    """One matrix [N, K] rounded, and what is told about it.

    nearest: some rows of it (see `_some`) as rounding to nearest gives them. moving: sweeps may move scales.
    """
    if seen.rows == 0:
        return _unseen(matrix, grid, name), {}
    seen.settle(matrix)
    columns = Columns.of(seen, grid, options, name, matrix)
    packed, beyond = _packed(columns, matrix, grid)
    dampening = columns.dampening
    del columns  # with the factor, which is as large as the statistics
    if options.sweeps:
        packed = swept(matrix, packed, seen, grid, options.sweeps, dampening, moving=moving)
    some = _some(matrix)
    exact = torch.stack([_row(matrix, at) for at in range(len(matrix))[some]])
    signal = max(seen.energy(exact), 1e-30)
    told = {
        "error_before": seen.energy(exact - nearest) / signal,
        "error_after": seen.energy(exact - _values(packed, some)) / signal,
        "dampening": dampening,
        "dead": float((seen.diagonal <= 0).double().mean()),
        "clipped": beyond / max(matrix.numel(), 1),
    }
    return packed, told


def _packed(columns: Columns, matrix: Tensor, grid: Grid) -> tuple[Packed, int]:
    """A matrix [N, K] rounded and packed, and how many values lay beyond their codes."""
    fmt, beyond = grid.format, [0]

    def codes() -> Iterator[tuple[slice, Tensor]]:
        for rows, found, more in columns.solve(matrix):
            beyond[0] += more
            yield rows, found

    if fmt.by_row:
        parts = (Packed.from_codes(found, fmt, *grid.of(rows)) for rows, found in codes())
        packed = joined(parts, fmt, tuple(matrix.shape))
    else:
        packed = Packed.from_codes(torch.cat([found for _, found in codes()]), fmt, grid.scale, grid.zero)
    return packed, beyond[0]


def _some(matrix: Tensor) -> slice:
    """The rows of [.., N, K] by which errors are told."""
    return slice(None, None, -(-matrix.shape[-2] // _SAMPLED))


def _row(matrix: Tensor, at: int) -> Tensor:
    """A row [K], f32; reading it from a file brings its neighbours, too, which rest again."""
    row = matrix[at].to(torch.float32, copy=True)
    rest(matrix[max(at - 16, 0) : at + 16])
    return row


def _values(packed: Packed, some: slice) -> Tensor:
    """Some rows of a weight [.., N, K] as they come back, f32."""
    if packed.format.by_row:
        return packed.part(some).dequantize()
    return packed.dequantize()[..., some, :].clone()


def _unseen(matrix: Tensor, grid: Grid, name: str) -> Packed:
    """An expert that no token reached."""
    if grid.format.by_row:
        return round_weight(matrix, grid.format, "mse", name=name)
    codes = quantize(matrix, grid.format, grid.scale, grid.zero)  # its scales are not its own
    return Packed.from_codes(codes, grid.format, grid.scale, grid.zero)
