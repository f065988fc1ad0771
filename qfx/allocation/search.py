"""From scores to formats: solve for whole weights, refine by measuring, then cut by heads where other text agrees.

    solve(whole weights) -> refine on the data -> propose cuts by heads, measured on the same data
                                               -> take the best on data kept apart, whole weights where none is better

Heads are more choices than whole weights: with as many measurements they fit the data more closely, and other text
less. So whole weights come first, exactly as units="layers" would have them, and what is cut has to prove itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from qfx.allocation import assign
from qfx.allocation.problem import Assignment, Measured, Problem
from qfx.allocation.refine import refine
from qfx.allocation.solve import solve
from qfx.allocation.split import chosen, cuts, joined, split
from qfx.analysis.units import Unit, by_weight
from qfx.rounding.method_options import AllocationOptions

_APART, _SAME = 5e-3, 2e-2  # the share of the loss that cuts have to gain, on data kept apart and on the same data


@dataclass(frozen=True)
class Job:
    """measure: on the data; judge: on data kept apart, None where there is none. heads: the problem of the units;
    layers: of whole weights, over the same units, None where no weight has several."""

    measure: Measured
    judge: Measured | None
    units: Sequence[Unit]
    heads: Problem
    layers: Problem | None

    def score(self, chosen: Assignment) -> float:
        """What is predicted: by the score of the whole weight where it has one format."""
        total = 0.0
        for own in by_weight(self.units).values():
            one = len({chosen[unit.name] for unit in own}) == 1
            problem = self.layers if one and self.layers is not None else self.heads
            total += Problem({unit.name: problem.choices[unit.name] for unit in own}).value(chosen)[1]
        return total


@dataclass
class Found:
    """The formats of the units, and what is told about how they were found."""

    assignment: Assignment
    told: dict[str, Any]


def search(job: Job, budget: int, options: AllocationOptions, bar: Progress) -> Found:
    """The formats of the units in at most `budget` bytes. Without `options.refine` by what is predicted alone."""
    problem = job.layers or job.heads
    solution = solve(problem, budget, seconds=options.seconds)
    task = bar.add_task("refining", total=options.refine)
    refined = refine(
        job.measure, problem, solution.assignment, budget, evaluations=options.refine,
        advance=lambda: bar.advance(task),
    )  # fmt: skip
    found = Found(assign.fill(job.units, problem, refined.assignment, budget), {})
    if job.layers is not None and options.refine:
        found = _cut(job, job.layers, found.assignment, budget, options.refine // 2, bar)
    elif job.layers is not None:
        found = Found(_predicted(job, job.layers, found.assignment, budget, options), {})
    found.told = {
        "predicted": job.score(found.assignment), "gap": solution.gap, "measured_before": refined.before,
        "measured": job.measure.kld(found.assignment), "what": job.measure.what,
        **found.told, "evaluations": job.measure.evaluations,
    }  # fmt: skip
    return found


def _cut(job: Job, layers: Problem, start: Assignment, budget: int, evaluations: int, bar: Progress) -> Found:
    """`start`, or with the cuts by heads that lose less than it, on the data and on data kept apart."""
    task = bar.add_task("cutting by heads", total=evaluations)
    tried = split(
        job.measure, job.units, job.heads, layers, start, budget, evaluations=evaluations,
        advance=lambda: bar.advance(task),
    )  # fmt: skip
    judge, gain = (job.measure, _SAME) if job.judge is None else (job.judge, _APART)
    loss, own = judge.kld(start), job.measure.kld(start)
    judged = [(judge.kld(made), number) for number, made in enumerate(tried) if job.measure.kld(made) < own]
    least, number = min(judged, default=(loss, -1))
    better = least < (1 - gain) * loss
    on = "data kept apart" if job.judge is not None else "the same data"
    told = {"judged": {
        "on": on, "layers": loss, "heads": least if judged else None, "better": "heads" if better else "layers",
        "whole": {unit.fqn: str(start[unit.name]) for unit in job.units},
    }}  # fmt: skip
    return Found(tried[number] if better else start, told)


def _predicted(job: Job, layers: Problem, start: Assignment, budget: int, options: AllocationOptions) -> Assignment:
    """Of whole weights, the same with cuts by heads, and heads each by itself that which is predicted to lose least."""
    left = budget - assign.nbytes(job.units, start)
    tried = [start, joined(start, chosen(cuts(job.units, job.heads, layers, start), left, _APART * job.score(start)))]
    if job.heads.least <= budget:
        apart = solve(job.heads, budget, seconds=options.seconds).assignment
        tried.append(assign.fill(job.units, job.heads, apart, budget))
    return min((made for made in tried if not job.heads.violations(made)), key=job.score)
