"""How well each formula predicts what was measured: which one to trust, for the user's own model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qfx.analysis.units import Unit
from qfx.format import Format

Table = Mapping[str, Mapping[str, float]]  # unit -> format -> value
EVERY = "all"


@dataclass(frozen=True)
class Prediction:
    """One formula against measurements of units of one kind ("all" of them) in formats of some bits.

    rank: Spearman's correlation, nan below 3 units. ratio: geometric mean of measured over predicted. error: the factor
    by which a single prediction is typically off after that ratio was taken out (exp of the standard deviation).
    """

    method: str
    kind: str
    bits: int
    count: int
    rank: float
    ratio: float
    error: float


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share their mean rank. nan below 3 values or where all are equal."""
    if len(a) < 3:
        return math.nan
    ranks = torch.stack([_ranks(a), _ranks(b)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norm = centred.norm(dim=1).prod()
    return float((centred[0] * centred[1]).sum() / norm) if norm else math.nan


def _ranks(values: Sequence[float]) -> torch.Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    below, equal = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
    return below + (equal.double() - 1) / 2


def fit(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(ratio, error) of pairs, see `Prediction`; pairs that are not above 0 are left out. (nan, nan) where none is."""
    logs = [math.log(m / p) for p, m in zip(predicted, measured, strict=True) if p > 0 and 0 < m < math.inf]
    if not logs:
        return math.nan, math.nan
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / max(1, len(logs) - 1))
    return math.exp(mean), math.exp(spread)


def compare(method: str, scores: Table, measured: Table, units: Sequence[Unit]) -> list[Prediction]:
    """A formula against everything measured, by kind of unit and bits of the format, and for all kinds together."""
    kinds = {unit.name: unit.kind for unit in units}
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for name, by_format in measured.items():
        for text, value in by_format.items():
            score = scores.get(name, {}).get(text)
            if score is not None and name in kinds:
                for kind in (kinds[name], EVERY):
                    pairs.setdefault((kind, Format.parse(text).bits), []).append((score, value))
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    found = []
    for kind, bits in sorted(pairs, key=lambda key: (order.get(key[0], len(order)), key[1])):
        a, b = zip(*pairs[kind, bits], strict=True)
        found.append(Prediction(method, kind, bits, len(a), spearman(a, b), *fit(a, b)))
    return found
