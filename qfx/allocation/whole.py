"""Heads of one format, as a place to start from: where a model gains nothing from mixed heads, it shall lose nothing.

    q_proj.q0: u3   q_proj.q1: u2   o_proj.o0: u4  ...       each head by itself: more choices, more bytes of padding
    q_proj.q*: u3                   o_proj.o*: u3  ...       each weight whole

Errors in the predicted losses of many small units add up in what is chosen by them, and columns that are stored apart
pad their scales and zero points. Both are measured, and refinement goes on from the better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qfx.allocation import assign
from qfx.allocation.problem import Choice, Problem
from qfx.allocation.solve import Solution, solve
from qfx.analysis.measured import Measure
from qfx.analysis.units import Unit, by_weight
from qfx.segments import nbytes


def joined(units: Sequence[Unit], choices: Mapping[str, Sequence[Choice]], problem: Problem) -> Problem | None:
    """`problem` with all units of a weight tied, and the bytes of the whole weight, which its first unit carries.

    Without formats of which a group is wider than a head's columns: their loss over several heads is not known. None
    where no unit is part of a weight, or a weight has no other format.
    """
    found: dict[str, Sequence[Choice]] = {}
    ties = []
    for fqn, own in by_weight(units).items():
        shape = assign.shape_of(own)
        width = own[0].shape[1] if own[0].axis == 1 else None
        for number, unit in enumerate(own):
            found[unit.name] = [
                replace(choice, bytes=0 if number else nbytes(choice.format, shape, fqn))
                for choice in choices[unit.name]
                if width is None or (choice.format.group or 0) <= width
            ]
            if not found[unit.name]:
                return None
        if len(own) > 1:
            ties.append(tuple(unit.name for unit in own))
    if not ties:
        return None
    return Problem(found, (*problem.ties, *ties), problem.classes, problem.layers)


def better(
    measure: Measure, units: Sequence[Unit], choices: Mapping[str, Sequence[Choice]], problem: Problem,
    solution: Solution, budget: int, *, seconds: float,
) -> tuple[Problem, Solution]:  # fmt: skip
    """(problem, solution) as they are, or those of whole weights, whichever the model loses less by."""
    other = joined(units, choices, problem)
    if other is None:
        return problem, solution
    found = solve(other, budget, seconds=seconds)
    if measure.kld(found.assignment) < measure.kld(solution.assignment):
        return other, found
    return problem, solution
