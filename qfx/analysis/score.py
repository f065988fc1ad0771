"""From a prepared graph and batches to a `Sensitivity`: gradients, scores, head types, and some measurements.

`qfx.analyze` is the door for models; allocation, which has a graph already, calls `score_graph`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rich.progress import Progress
from torch import Tensor, fx

from qfx.analysis.attentions import Attention
from qfx.analysis.caches import FORMATS as CACHE_FORMATS
from qfx.analysis.caches import Cache, CacheScores, caches
from qfx.analysis.energies import Energies
from qfx.analysis.gradients import gather
from qfx.analysis.head_types import Head
from qfx.analysis.losses import General, Loss, Objective, Task, find
from qfx.analysis.measured import Measure, main_output, output_nodes, positions, some, what_of
from qfx.analysis.patterns import Patterns
from qfx.analysis.scores import FIRST_ORDER, METHODS, Scores, scores
from qfx.analysis.sensitivity import Sensitivity
from qfx.analysis.units import Unit, wholes
from qfx.analysis.units import units as find_units
from qfx.analysis.weights import Weights
from qfx.errors import Note, nearest
from qfx.format import Format
from qfx.passes.calibrate import progress_bar
from qfx.rounding.blocks import layer_of
from qfx.rounding.lanes import Program

FORMATS = (
    "u2/g64/f16", "u2/g32/f16", "u3/g64/f16", "u3/g32/f16", "u4/g128/f16", "u4/g64/f16", "u4/g32/f16", "u5/g64/f16",
    "u6/g64/f16", "i8/ch",
)  # fmt: skip
"""Candidates where none are asked for."""
_MEASURED_BITS = (2, 4)  # from 4 bits on a formula's error hardly changes
_MEASURED_ROWS = 1024  # positions on which units are measured
By = Literal["heads", "layers"]


@dataclass(frozen=True)
class Options:
    """How to analyze. method: one of METHODS, or "all". measure: units of each kind that are measured, 0: none.

    task_weight: share of the task's scores where there is a task, the rest is the general ones'. seed: of drawn labels.
    rounding: of weights, see `qfx.rounding.nearest`. heads: tell the types of heads. caches: score the key-value cache.
    wholes: score each weight that heads cut as one unit, too.
    """

    method: str = "quant-fisher"
    formats: tuple[str, ...] = FORMATS
    by: By = "heads"
    measure: int = 4
    task_weight: float = 1.0
    rounding: str = "mse"
    seed: int = 0
    heads: bool = True
    caches: bool = True
    wholes: bool = False

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, "all"):
            raise ValueError(f"there is no method {self.method!r}, {nearest(self.method, [*METHODS, 'all'])}")
        if not 0 <= self.task_weight <= 1:
            raise ValueError(f"task_weight must be from 0 to 1, found {self.task_weight}")
        if self.measure < 0:
            raise ValueError(f"measure must be 0 or more, found {self.measure}")
        if self.by not in ("heads", "layers"):
            raise ValueError(f"units are 'heads' or 'layers', found {self.by!r}")
        if not self.formats:
            raise ValueError("at least one format is needed")
        for text in self.formats:
            if Format.parse(text).dynamic:
                raise ValueError(f"{text!r} is no format of a weight: its scale is found at run time")

    @property
    def methods(self) -> tuple[str, ...]:
        """The chosen one first."""
        return tuple(METHODS) if self.method == "all" else (self.method,)


def score_graph(
    gm: fx.GraphModule, batches: Sequence[Sequence[Any]], options: Options | None = None, *,
    outputs: Sequence[str] = (), loss: str | Loss | None = None, labelled: Sequence[Any] = (),
    skip: Sequence[str] = (), tensors: dict[str, Tensor] | None = None, seen: Energies | None = None,
    progress: bool = True,
) -> tuple[Sensitivity, list[Note]]:  # fmt: skip
    """Analyze a prepared graph.

    batches: its inputs in placeholder order, each. outputs: names of its outputs, as in `Captured.outputs`. loss: a
    task, None for the model's own distribution; labelled: what the loss is given beside the outputs, for each batch.
    skip: weights without units. tensors, seen: as of `Measure`. Raises ValueError for bad data, formats, labels
    and losses.
    """
    options = options or Options()
    if loss is not None and len(labelled) != len(batches):
        raise ValueError(f"a loss needs a labelled batch for each batch, found {len(labelled)} for {len(batches)}")
    found, attentions, notes = find_units(gm, by=options.by, skip=skip)
    if not found:
        raise ValueError("the model has no weight that could have a format, so there is nothing to analyze")
    with progress_bar(progress) as bar:
        job = _Job(gm, batches, options, found, attentions, list(outputs), bar, seen)
        made = job.scored(loss, labelled)
        notes += _without_loss(found, made)
        heads, missing = job.heads() if options.heads and attentions else ((), [])
        sensitivity = Sensitivity(
            units=(*found, *job.wholes, *(cache.unit for cache in job.caches)),
            formats=(*options.formats, *(CACHE_FORMATS if job.caches else ())),
            scores=made, heads=tuple(heads), what=job.what, notes=tuple(map(str, [*notes, *missing])),
        )  # fmt: skip
        if options.measure:
            sensitivity = replace(sensitivity, measured=job.measured(made, tensors))
    return sensitivity, notes


class _Job:
    """One analysis: what its steps share."""

    def __init__(
        self, gm: fx.GraphModule, batches: Sequence[Sequence[Any]], options: Options, units: list[Unit],
        attentions: list[Attention], outputs: list[str], bar: Progress, seen: Energies | None,
    ) -> None:  # fmt: skip
        self.gm, self.batches, self.options, self.units, self.bar = gm, batches, options, units, bar
        self.attentions, self.outputs = attentions, outputs
        self.wholes = wholes(units) if options.wholes else []
        self.seen = seen
        self.weights = Weights(gm, units, rounding=options.rounding, seen=seen)
        self.weights.check_finite()
        self.program = Program(gm)
        self.caches: list[Cache] = caches(attentions) if options.caches else []
        self.patterns = Patterns(attentions)
        self.name, self.main = main_output(gm, outputs)
        self.what = what_of(self.name)

    def scored(self, loss: str | Loss | None, labelled: Sequence[Any]) -> dict[str, Scores]:
        """method -> unit -> format -> score, of the model's own distribution mixed with the task's."""
        weight = self.options.task_weight if loss is not None else 0.0
        masks = [positions(self.program, batch) for batch in self.batches]
        general = General(0, self.name == "logits", masks, self.options.seed)
        made = self._scores(general, [self.main]) if weight < 1 else {}
        if loss is None or weight == 0:
            return made
        name, function = find(loss)
        nodes = output_nodes(self.gm)
        names = self.outputs if len(self.outputs) == len(nodes) else [f"output_{i}" for i in range(len(nodes))]
        task = self._scores(Task(function, labelled, names, name), nodes)
        return {method: _mixed(made.get(method, {}), task[method], weight) for method in task}

    def _scores(self, objective: Objective, nodes: Sequence[Any]) -> dict[str, Scores]:
        methods, formats = self.options.methods, [Format.parse(text) for text in self.options.formats]
        of_caches = CacheScores(self.caches, [Format.parse(text) for text in CACHE_FORMATS])
        fresh = not self.patterns.seen
        watched = (self.options.heads or "outlier" in methods) and fresh
        found = gather(
            self.weights, self.program, self.batches, nodes, objective, more=self.wholes,
            first_order=not set(FIRST_ORDER).isdisjoint(methods), watch=self.patterns.watch if watched else None,
            values=of_caches.hooks, bar=self.bar,
        )  # fmt: skip
        outliers = _of_units(self.patterns.outliers(), self.units, self.attentions)
        made = scores(
            self.weights, [*self.units, *self.wholes], formats, methods, found, factor=objective.factor,
            outliers=outliers, bar=self.bar,
        )  # fmt: skip
        if "quant-fisher" in made:
            made["quant-fisher"] |= of_caches.scores(objective.factor, found.weight)
        return made

    def heads(self) -> tuple[Sequence[Head], list[Note]]:
        """Types of heads, and a note where some of what makes them cannot be had."""
        missing = []
        if not self.patterns.repeated(self.program, self.batches[0]):
            reason = "it has no input_ids [B, T] of 8 tokens or more: no scores of induction and duplicate tokens"
            missing.append(Note("the model", reason, "nothing: types of heads come from offsets alone", minor=True))
        return self.patterns.heads({a.name: layer_of(a.node) for a in self.attentions}), missing

    def measured(self, made: dict[str, Scores], tensors: dict[str, Tensor] | None) -> Scores:
        """Losses of some units of each kind, at some bits: those at even steps of the scores."""
        measure = Measure(
            self.gm, some(self.batches, _MEASURED_ROWS), units=self.units, caches=self.caches, tensors=tensors,
            rounding=self.options.rounding, seen=self.seen, outputs=self.outputs,
        )  # fmt: skip
        first = next(iter(made.values()))
        todo = _sample([*self.units, *(cache.unit for cache in self.caches)], first, self.options.measure)
        task = self.bar.add_task("measurements", total=len(todo))
        for name, text in todo:
            measure.single(name, Format.parse(text))
            self.bar.advance(task)
        return measure.measured


def _without_loss(units: Sequence[Unit], made: dict[str, Scores]) -> list[Note]:
    """A note about each weight that makes no difference to what is compared."""
    table = made.get("quant-fisher", {})
    idle = {u.fqn for u in units if u.name in table} - {u.fqn for u in units if any(table.get(u.name, {}).values())}
    reason = "no gradient reaches it: the output that is compared does not depend on it, and its scores are 0"
    return [
        Note(fqn, reason, "leave it out by a recipe that ignores it, or give a loss", minor=True)
        for fqn in sorted(idle)
    ]


def _sample(units: Sequence[Unit], made: Scores, count: int) -> list[tuple[str, str]]:
    """(unit, format) pairs to measure: of each kind `count` units, the least and the most sensitive among them."""
    todo: list[tuple[str, str]] = []
    for kind in dict.fromkeys(unit.kind for unit in units):
        own = [unit.name for unit in units if unit.kind == kind and unit.name in made]
        if not own:
            continue
        texts = {Format.parse(text).bits: text for text in made[own[0]]}
        own.sort(key=lambda name: sum(made[name].values()))
        chosen = {own[round(i * (len(own) - 1) / max(1, count - 1))] for i in range(count)}
        todo += [(name, texts[b]) for name in own if name in chosen for b in sorted(texts) if b in _MEASURED_BITS]
    return todo


def _mixed(general: Scores, task: Scores, weight: float) -> Scores:
    """weight x task + (1 - weight) x general, the task's brought to the scale of the general ones first."""
    if not general or weight == 1:
        return task
    logs = [
        math.log(value / task[name][text])
        for name, row in general.items() for text, value in row.items()
        if value > 0 and task.get(name, {}).get(text, 0) > 0
    ]  # fmt: skip
    scale = math.exp(sum(logs) / len(logs)) if logs else 1.0
    return {
        name: {text: weight * scale * task[name][text] + (1 - weight) * value for text, value in row.items()}
        for name, row in general.items()
    }


def _of_units(
    outliers: dict[tuple[str, int], float], units: Sequence[Unit], attentions: Sequence[Attention]
) -> dict[str, float]:
    """unit -> share of outliers of its head; of a key or value head the mean of the query heads that read it."""
    groups = {attention.name: attention.groups for attention in attentions}
    found = {}
    for unit in units:
        if unit.attention is None or unit.head is None:
            continue
        read = [unit.head] if unit.kind in ("q", "o") else [
            head for head, group in enumerate(groups[unit.attention]) if group == unit.head
        ]  # fmt: skip
        values = [outliers[unit.attention, head] for head in read if (unit.attention, head) in outliers]
        if values:
            found[unit.name] = sum(values) / len(values)
    return found
