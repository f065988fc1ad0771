"""Give each unit of an annotated graph the format that a budget allows: predict, solve, refine, write.

    %linear_1: f32[2,9,64] = aten.linear(%x, @layers.0.attn.q.weight)     # w=u4/g32/f16
    %linear_2: f32[2,9,64] = aten.linear(%y, @layers.0.mlp.down.weight)   # w=u4/g32/f16
    ->
    %linear_1: f32[2,9,64] = aten.linear(%x, @layers.0.attn.q.weight)     # w=[u5/g32/f16,u3/g32/f16]
    %linear_2: f32[2,9,64] = aten.linear(%y, @layers.0.mlp.down.weight)   # w=u4/g16/f16

Of the weights that the recipe gives a format by op kind. One that a rule for its name gives a format keeps that, and it
is counted. Equal heads are then put side by side (`qfx.rewrites.permute`), which changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from torch import fx

from qfx.allocation import assign, predict, sites, whole
from qfx.allocation.budget import Stored, least_bytes
from qfx.allocation.costs import CacheFormats, Costs
from qfx.allocation.perplexity import Perplexity
from qfx.allocation.problem import Choice, Measured, Problem, Tile, ties_of
from qfx.allocation.search import Job, search
from qfx.allocation.solve import solve
from qfx.analysis.energies import Energies, energies
from qfx.analysis.losses import Loss
from qfx.analysis.measured import Measure, some
from qfx.analysis.score import Options, score_graph
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.task import TaskMeasure
from qfx.analysis.units import Unit, by_weight
from qfx.analysis.weights import rounding_of
from qfx.errors import Note, explain
from qfx.format import Format
from qfx.kv.plans import grown_formats
from qfx.passes.calibrate import progress_bar
from qfx.plan import Plan
from qfx.rewrites.permute import permute
from qfx.rounding.method_options import AllocationOptions

TOLD = "allocation"  # in Plan.sensitivities
MEASURED, FISHER = "measured", "quant-fisher"


@dataclass(frozen=True)
class Given:
    """What predicts the loss, in place of what `allocation.method` says.

    sensitivity: of `qfx.analyze`, for this model. loss, labelled: a task, and what its loss is given beside the outputs
    for each batch (see `qfx.analysis.losses`); it is measured, too, as `TaskMeasure` says.
    """

    sensitivity: Sensitivity | None = None
    loss: str | Loss | None = None
    labelled: Sequence[Any] = ()


def allocate(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, outputs: Sequence[str] = (),
    given: Given | None = None, progress: bool = True,
) -> list[Note]:  # fmt: skip
    """Replace the weight formats of a prepared float graph, and of `plan`, as `plan.recipe.allocation` says.

    batches: the graph's inputs. outputs: names of its outputs, as in `Captured.outputs`. given: see `Given`.
    `plan.sensitivities["allocation"]` tells the budget, the bytes, what was predicted and measured, and of each unit
    its format, bytes and score.
    Returns what did not go as asked. Raises ValueError where the budget cannot be kept, or nothing is to be allocated.
    """
    options = plan.recipe.allocation
    assert options is not None
    found = sites.find(gm, plan.recipe, options)
    given = given or Given()
    candidates = {unit.name: _scored(sites.candidates(unit, options), unit, given) for unit in found.units}
    stored = found.stored(candidates)
    if options.max_memory is not None:
        stored = replace(stored, beside=_beside(gm, options, plan))
    if options.max_loss is None:
        stored.budget(options)  # refuses before anything is measured
    used = some(batches, options.samples)
    seen = energies(gm, used, plan.recipe)
    measure = _measure(gm, plan, found, used, outputs, seen)
    method, scores = "sensitivity", cast(predict.Scores | None, None)
    if given.sensitivity is not None:
        scores = given.sensitivity.calibrated()
    if scores is None and (options.method != MEASURED or given.loss is not None):
        method, scores = _analyzed(gm, plan, found, batches, outputs, given, seen, progress=progress)
    with progress_bar(progress) as bar:
        if scores is None:
            task = bar.add_task("measuring units", total=len(found.units))
            scores = predict.measured(measure, candidates, Format.parse(options.probe), lambda: bar.advance(task))
            method = MEASURED
        heads = problem_of(found.units, predict.choices(found.units, candidates, scores), options)
        scores = whole.told(measure.weights, found.units, candidates, scores)
        layers = whole.joined(found.units, candidates, scores, heads)
        budget = _budget(stored, layers or heads, measure, options)
        rest = some(batches[len(used) :], options.samples)
        judge = _measure(gm, plan, found, rest, outputs, seen) if rest and layers and options.refine else None
        job = Job(
            _of_task(measure, options, given, given.labelled, outputs),
            judge and _of_task(judge, options, given, given.labelled[len(used) :], outputs),
            found.units, heads, layers,
        )  # fmt: skip
        result = search(job, budget, options, bar)
    chosen = result.assignment
    size = assign.nbytes(found.units, chosen)
    assert size <= budget, (size, budget)
    assign.write(plan, assign.formats_of(found.units, chosen), measure.weights.readers)
    plan.sensitivities[TOLD] = {
        "budget": {**options.budgets, "bytes": budget + stored.held},
        "bytes": size + stored.held,
        "average_bits": 8 * (size + stored.held) / stored.weights,
        "method": method,
        **result.told,
        "units": _rows(found.units, heads, chosen),
    }
    return [*found.notes, *(permute(gm, plan, minor=True) if options.units == "heads" else [])]


def _measure(
    gm: fx.GraphModule, plan: Plan, found: sites.Sites, batches: Sequence[Sequence[Any]], outputs: Sequence[str],
    seen: Energies,
) -> Measure:  # fmt: skip
    rounding = rounding_of(plan.recipe)
    return Measure(gm, batches, units=found.units, tensors=plan.tensors, outputs=outputs, rounding=rounding, seen=seen)


def _of_task(
    measure: Measure, options: AllocationOptions, given: Given, labelled: Sequence[Any], outputs: Sequence[str]
) -> Measured:
    """What refinement measures: the task's loss where there is one, and something is refined."""
    if given.loss is None or not options.refine or not options.task_weight:
        return measure
    return TaskMeasure(measure, given.loss, labelled, outputs, options.task_weight)


def _scored(formats: list[Format], unit: Unit, given: Given) -> list[Format]:
    """Those of the formats in which a given sensitivity knows the unit; all where it knows none, to be refused."""
    known = {} if given.sensitivity is None else given.sensitivity.score().get(unit.name, {})
    return [fmt for fmt in formats if str(fmt) in known] or formats


def _analyzed(
    gm: fx.GraphModule, plan: Plan, found: sites.Sites, batches: Sequence[Sequence[Any]], outputs: Sequence[str],
    given: Given, seen: Energies, *, progress: bool,
) -> tuple[str, predict.Scores]:  # fmt: skip
    """(method, scores) of `qfx.analysis`, on the scale of what some units were measured to lose if on none yet."""
    options = plan.recipe.allocation
    assert options is not None
    method = options.method
    if method == MEASURED:
        what = "method='measured' measures the divergence of the model's output, and a loss was given"
        raise ValueError(explain(what, next_step="take method='quant-fisher', which sees the loss"))
    how = Options(
        method=method, formats=tuple(dict.fromkeys((*options.formats, *options.embeddings))), by=options.units,
        task_weight=options.task_weight, heads=False, caches=False, wholes=options.units == "heads",
        measure=0 if method == FISHER else 4,
    )  # fmt: skip
    sensitivity, notes = score_graph(
        gm, batches, how, outputs=outputs, loss=given.loss, labelled=given.labelled, skip=found.skip,
        tensors=plan.tensors, seen=seen, progress=progress,
    )  # fmt: skip
    found.notes += [note for note in notes if note not in found.notes]
    return method, sensitivity.calibrated()


def problem_of(units: Sequence[Unit], choices: Mapping[str, Sequence[Choice]], options: AllocationOptions) -> Problem:
    """The choices of units, with the constraints that the options ask for."""
    tiles, ties = [], ties_of(units, options.ties)
    if options.tile is not None:
        for own in by_weight(units).values():
            width = own[0].stop - own[0].start
            multiple = math.lcm(width, options.tile) // width if width else 1
            names = tuple(unit.name for unit in own)
            if len(own) > 1 and len(own) % multiple:
                ties.append(names)  # nothing but the whole would be of whole tiles
            elif len(own) > 1 and multiple > 1:
                tiles.append(Tile(names, multiple))
    return Problem(choices, ties, options.classes, {unit.name: unit.layer for unit in units}, tiles)


def _beside(gm: fx.GraphModule, options: AllocationOptions, plan: Plan) -> int:
    """Bytes of caches, in the format of the options or those of the plan, and of activations at the batch and the
    context of the options."""
    costs = Costs.of(gm)
    new, old = (1, options.context) if costs.caches else (options.context, 0)
    fmt: CacheFormats = None if options.cache is None else Format.parse(options.cache)
    if fmt is None:
        fmt = grown_formats(plan.caches, costs.grown)
    return costs.memory(cache=fmt, batch=options.batch, sequence=new, context=old) - costs.weights()


def _budget(stored: Stored, problem: Problem, measure: Measure, options: AllocationOptions) -> int:
    """Bytes for the units."""
    if options.max_loss is None:
        return stored.budget(options)
    perplexity = Perplexity(measure)
    low, high = (sum(int(pick(group.bytes)) for group in problem.groups) for pick in (np.min, np.max))
    return least_bytes(
        low, high, lambda size: perplexity.rise(solve(problem, size, exact=False).assignment), options.max_loss
    )


def _rows(units: Sequence[Unit], problem: Problem, chosen: Mapping[str, Format]) -> dict[str, dict[str, Any]]:
    """unit -> what is told about it."""
    found = {}
    for own in by_weight(units).values():
        size = assign.nbytes(own, chosen)
        apart = sum(unit.nbytes(chosen[unit.name]) for unit in own)  # neighbours share groups and padding
        for unit in own:
            choice = next(c for c in problem.choices[unit.name] if c.format == chosen[unit.name])
            found[unit.name] = {
                "kind": unit.kind, "layer": unit.layer, "head": unit.head, "format": str(choice.format),
                "bytes": round(unit.nbytes(choice.format) * size / apart), "elements": unit.elements,
                "score": choice.score,
            }  # fmt: skip
    return found
