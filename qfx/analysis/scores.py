"""What a unit is predicted to lose in a format, by several formulas, all from one pass over the data.

w is the unit's weight, e what rounding it changes, G_s the gradient of a sample, X what the linear reads.

quant-fisher     sum_s |G_s * e|^2 / 2 / positions       KL(p || p') in nats per position, up to terms of third order
michel           (sum_s |z_s . dL/dz_s| * |e| / |w|)^2   Michel et al. 2019: importance of what a unit gives, z
tacq             sum |mean G * e * w|                    TaCQ, Xiao et al. 2025
outlier          share of outliers * |e|^2 / |w|^2       pre-softmax scores above mean + t std, heads only
activation-norm  sum_k mean X_k^2 * |e_k|^2              squared change of the layer's result; no gradient
weight-error     |e|^2                                   no data

Quant-Fisher takes the diagonal of the Fisher matrix: rounding errors of different weights have nothing to do with each
other, so that the rest has the mean 0. Of a large unit some rows are rounded, chosen by how much they weigh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import Progress
from torch import Tensor

from qfx.analysis.gradients import Gathered, cut
from qfx.analysis.units import Unit
from qfx.analysis.weights import Weights
from qfx.format import Format

_LARGEST = 1 << 18  # weights of a unit that are rounded for its score
_TOGETHER = 1 << 20  # weights of units that are rounded at once
Scores = dict[str, dict[str, float]]  # unit -> format -> score


@dataclass(frozen=True)
class _Part:
    """A unit (or rows of it) and what the data told about it. `outliers`: None where it is no head's."""

    unit: Unit
    weight: Tensor
    error: Tensor
    fisher: Tensor | None
    gradient: Tensor | None
    energy: Tensor | None  # mean square of each channel that a linear reads
    taylor: float
    outliers: float | None
    size: float
    samples: int
    factor: float


def _relative(part: _Part) -> float:
    """|e|^2 / |w|^2"""
    return float(part.error.square().sum() / part.weight.square().sum().clamp_min(torch.finfo(torch.float32).tiny))


def quant_fisher(part: _Part) -> float | None:
    if part.fisher is None:  # nothing that is differentiated reads it
        return 0.0
    return part.factor * float((part.fisher * part.error.square()).sum()) / max(part.size, 1e-30)


def michel(part: _Part) -> float | None:
    return (part.taylor / max(1, part.samples)) ** 2 * _relative(part)


def tacq(part: _Part) -> float | None:
    if part.gradient is None:
        return 0.0
    return float((part.gradient * part.error * part.weight).abs().sum()) / max(1, part.samples)


def outlier(part: _Part) -> float | None:
    return None if part.outliers is None else part.outliers * _relative(part)


def activation_norm(part: _Part) -> float | None:
    return None if part.energy is None else float((part.energy * part.error.square()).sum())


def weight_error(part: _Part) -> float | None:
    return float(part.error.square().sum())


METHODS: dict[str, Callable[[_Part], float | None]] = {
    "quant-fisher": quant_fisher, "michel": michel, "tacq": tacq, "outlier": outlier,
    "activation-norm": activation_norm, "weight-error": weight_error,
}  # fmt: skip
FIRST_ORDER = ("michel", "tacq")  # need sums of gradients beside those of their squares


def scores(
    weights: Weights, units: Iterable[Unit], formats: Sequence[Format], methods: Sequence[str], found: Gathered, *,
    factor: float = 0.5, outliers: Mapping[str, float] | None = None, bar: Progress | None = None,
) -> dict[str, Scores]:  # fmt: skip
    """method -> unit -> format -> score. Units that a method cannot tell about are missing in its scores.

    factor: of the objective whose gradients were gathered. outliers: unit -> share of outliers of its head.
    """
    units = list(units)
    made: dict[str, Scores] = {method: {} for method in methods}
    task = bar.add_task("scores", total=len(units)) if bar is not None else None
    for some in _alike(units):
        rows, share = _rows(weights, some[0], found)
        for fmt in formats:
            pairs = weights.parts(some, fmt) if rows is None else [weights.part(some[0], fmt, rows)]
            for unit, (w, rounded) in zip(some, pairs, strict=True):
                part = _part(unit, w, rounded - w, rows, found, (outliers or {}).get(unit.name), factor)
                for method in methods:
                    value = METHODS[method](part)
                    if value is not None:
                        whole = 1.0 if method in ("michel", "outlier") else share  # relative, those two
                        made[method].setdefault(unit.name, {})[str(fmt)] = value * whole
        if bar is not None and task is not None:
            bar.advance(task, len(some))
    return made


def _alike(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Neighbours of one weight and shape that are small enough to be rounded together, whole."""
    some: list[Unit] = []
    for unit in units:
        if some:
            same = (unit.fqn, unit.shape, unit.axis) == (some[0].fqn, some[0].shape, some[0].axis)
            if not same or unit.elements * (len(some) + 1) > _TOGETHER or unit.elements > _LARGEST:
                yield some
                some = []
        some.append(unit)
    if some:
        yield some


def _part(
    unit: Unit, weight: Tensor, error: Tensor, rows: Tensor | None, found: Gathered, outliers: float | None,
    factor: float,
) -> _Part:  # fmt: skip
    def of(held: Mapping[str, Tensor]) -> Tensor | None:
        if unit.fqn not in held:
            return None
        part = cut(held[unit.fqn], unit)
        return part if rows is None else part[rows]

    energy = found.energy.get(unit.fqn)
    if energy is not None:
        energy = energy / max(1, found.rows[unit.fqn])
        energy = energy[unit.start : unit.stop] if unit.axis == 1 else energy
    return _Part(
        unit=unit, weight=weight, error=error, fisher=of(found.fisher), gradient=of(found.gradient), energy=energy,
        taylor=found.taylor.get(unit.name, 0.0), outliers=outliers, size=found.weight, samples=found.samples,
        factor=factor,
    )  # fmt: skip


def _rows(weights: Weights, unit: Unit, found: Gathered) -> tuple[Tensor | None, float]:
    """Rows of a large unit that are rounded for all of it, and what their sum is to be multiplied by.

    A row counts as its squared gradient times its squared weights. Half of the rows are those that count most, the
    others lie evenly among the rest.
    """
    if unit.elements <= _LARGEST or len(unit.shape) != 2:
        return None, 1.0
    weight = weights.part(unit, Format("f32"))[0]
    size = weight.square().mean(1)
    fisher = found.fisher.get(unit.fqn)
    if fisher is not None:
        size = size * cut(fisher, unit).sum(1)
    order = size.argsort(descending=True)
    count = max(8, _LARGEST // unit.shape[1]) // 2
    rest = order[count:]
    chosen = torch.cat([order[:count], rest[:: max(1, len(rest) // count)]]).sort().values
    return chosen, float(size.sum() / size[chosen].sum().clamp_min(1e-38))
