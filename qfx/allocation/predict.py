"""Predicted loss of each unit in each candidate format.

"measured":    s(u, f) = KLD(u alone in the probe format) x e(u, f) / e(u, probe),   e = mean squared error of weights

A divergence grows with the square of a small error, so that one measurement of each unit does for all its formats.
Other methods are those of `qfx.analyze`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qfx.allocation.problem import Choice
from qfx.analysis.measured import Measure
from qfx.analysis.units import Unit
from qfx.analysis.weights import Weights
from qfx.calibration.importance import Importance
from qfx.errors import explain
from qfx.format import Format
from qfx.rounding.parts import dequantize_in_parts, round_in_parts

_ELEMENTS = 1 << 14  # of a unit, by whole rows, that are rounded to tell the error of a format

Scores = Mapping[str, Mapping[str, float]]  # unit -> format's text -> predicted loss


def measured(
    measure: Measure, candidates: Mapping[str, Sequence[Format]], probe: Format, advance: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """unit -> format -> score, for the candidates of each unit. advance: called after each unit."""
    found = {}
    for unit in reversed(measure.units):  # late layers first: what can be wrong is told soon
        error = errors(measure.weights, unit, dict.fromkeys((probe, *candidates[unit.name])))
        loss = measure.single(unit, probe) if error[probe] else 0.0
        base = error[probe] or 1.0
        found[unit.name] = {str(fmt): loss * error[fmt] / base for fmt in candidates[unit.name]}
        advance()
    return found


def errors(weights: Weights, unit: Unit, formats: Sequence[Format] | Mapping[Format, None]) -> dict[Format, float]:
    """Mean squared error of a unit's weight in each format, weighed as it is rounded, told from some of its rows where
    it is large."""
    whole = weights.part(unit, Format("f32"))[0]
    rows = whole.reshape(-1, whole.shape[-1])
    some = rows[:: max(1, rows.numel() // _ELEMENTS)]
    seen = weights.importance(unit.fqn, unit.axis, ((unit.start, unit.stop),))
    found = {}
    for fmt in formats:
        value = some if fmt.by_row else whole
        found[fmt] = _error(value, fmt, weights.rounding, unit.name, seen)
    return found


def _error(value: Tensor, fmt: Format, rounding: str, name: str, seen: Importance | None) -> float:
    packed = round_in_parts(value.contiguous(), fmt, rounding, name=name, importance=seen)
    error = dequantize_in_parts(packed, torch.float32) - value
    return float((error.double().square() if seen is None else seen.product(error, error).double()).mean())


def choices(
    units: Sequence[Unit], candidates: Mapping[str, Sequence[Format]], scores: Scores
) -> dict[str, list[Choice]]:
    """The choices of each unit. Raises ValueError where a unit or a format of it has no score."""
    found: dict[str, list[Choice]] = {}
    for unit in units:
        own = scores.get(unit.name)
        missing = [str(fmt) for fmt in candidates[unit.name] if own is None or str(fmt) not in own]
        if own is None or missing:
            raise ValueError(
                explain(
                    f"the sensitivity has no score of {unit.name!r}" + (f" in {missing[0]}" if own is not None else ""),
                    expected=f"a score in each of {', '.join(map(str, candidates[unit.name]))}",
                    found="none of the unit" if own is None else ", ".join(own),
                    next_step="analyze this model with these formats and units, allocate formats that have scores, or "
                    "take a method that scores every unit: 'quant-fisher', 'measured' or 'weight-error' ('outlier' is "
                    "for heads alone, 'activation-norm' for no tables)",
                )
            )
        found[unit.name] = [Choice(unit.name, fmt, unit.nbytes(fmt), own[str(fmt)]) for fmt in candidates[unit.name]]
    return found
