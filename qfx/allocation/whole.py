"""Each weight in one format, as a place to start from: a model that gains nothing from mixed heads loses nothing.

    q_proj.q0: u3/g64   q_proj.q1: u3/g64   o_proj.o0: u2/g64   o_proj.o1: u2/g64

The bytes are those of whole weights: columns of neighbouring heads share groups, and their zero points share bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qfx.allocation.predict import Scores, errors
from qfx.allocation.problem import Choice, Problem
from qfx.analysis.units import Unit, by_weight, shape_of, wholes
from qfx.analysis.weights import Weights
from qfx.format import Format
from qfx.live.segments import nbytes


def joined(
    units: Sequence[Unit], candidates: Mapping[str, Sequence[Format]], scores: Scores, problem: Problem
) -> Problem | None:
    """`problem` with all units of a weight tied, with the bytes and scores of the whole weight, which its first unit
    carries. scores: of units, and of whole weights by their names. None where no unit is part of a weight."""
    found: dict[str, Sequence[Choice]] = {}
    ties = []
    for fqn, own in by_weight(units).items():
        if own[0].axis is None:
            found[own[0].name] = problem.choices[own[0].name]
            continue
        shape, score = shape_of(own), scores[fqn]
        for number, unit in enumerate(own):
            known = [fmt for fmt in candidates[unit.name] if str(fmt) in score]
            figures = [(0, 0.0) if number else (nbytes(fmt, shape, fqn), score[str(fmt)]) for fmt in known]
            found[unit.name] = [Choice(unit.name, fmt, *two) for fmt, two in zip(known, figures, strict=True)]
        ties.append(tuple(unit.name for unit in own))
    if not ties:
        return None
    return Problem(found, (*problem.ties, *ties), problem.classes, problem.layers)


def told(weights: Weights, units: Sequence[Unit], candidates: Mapping[str, Sequence[Format]], scores: Scores) -> Scores:
    """`scores`, with those of whole weights that are missing told by their units'.

    The sum over units, times the error of the whole weight over the sum of theirs: where a group is wider than a head,
    heads that are stored together have fewer scales than apart.
    """
    found = dict(scores)
    own = by_weight(units)
    for whole in wholes(units):
        if whole.name in found:
            continue
        parts = own[whole.fqn]
        formats = dict.fromkeys(candidates[parts[0].name])
        total = {str(fmt): sum(scores[unit.name][str(fmt)] for unit in parts) for fmt in formats}
        if parts[0].axis == 1:
            each = [errors(weights, unit, formats) for unit in parts]
            joint = errors(weights, whole, formats)
            total = {
                str(fmt): total[str(fmt)] * len(parts) * joint[fmt] / (sum(error[fmt] for error in each) or 1.0)
                for fmt in formats
            }
        found[whole.name] = total
    return found
