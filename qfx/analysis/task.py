"""What a model loses of a task, measured like a divergence: how far the task's loss of each sample moves.

    mixed = TaskMeasure(measure, "classification", labelled, names, weight=0.5)
    mixed.kld(assignment)         # weight x scale x mean (change of a sample's loss)^2 / 2 + (1 - weight) x divergence

The square, not the change: with a few hundred labels the mean change of the loss is mostly chance, and a choice out of
many by it is a choice of errors that happen to suit these labels. Its square falls to 0 with the error, as a divergence
does, and is what Quant-Fisher predicts from the gradients of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.analysis.losses import Loss, Task, find
from qfx.analysis.measured import Measure, output_nodes
from qfx.analysis.weights import Assignment


class TaskMeasure:
    """A `Measure` of a task; stands where refinement measures.

    labelled: what the loss is given beside the outputs, for each batch of `measure`. names: of the graph's outputs.
    weight: share of the task, the rest is the divergence's. The first assignment that loses something brings the task
    to the scale of the divergence. Raises ValueError for labels that are missing.
    """

    def __init__(
        self, measure: Measure, loss: str | Loss, labelled: Sequence[Any], names: Sequence[str], weight: float
    ) -> None:
        if len(labelled) < len(measure.batches):
            raise ValueError(f"a loss needs {len(measure.batches)} labelled batches, found {len(labelled)}")
        self.measure, self.weight, self.scale = measure, weight, 0.0
        self.nodes = output_nodes(measure.program.gm)
        known = list(names) if len(names) == len(self.nodes) else [f"output_{i}" for i in range(len(self.nodes))]
        name, function = find(loss)
        self.what = f"{name}: half the mean squared change of a sample's loss"
        if weight < 1:
            self.what = f"{weight:g} of {self.what}, {1 - weight:g} of {measure.what}"
        self.task = Task(function, labelled, known, name)
        self.float = [self._losses(values, i) for i, values in enumerate(measure.values({}, self.nodes))]

    @property
    def evaluations(self) -> int:
        """How many assignments were measured."""
        return self.measure.evaluations

    def kld(self, assignment: Assignment) -> float:
        """The task's loss and the divergence of these formats, mixed."""
        squares = difference = size = 0.0
        count = 0
        for number, values in enumerate(self.measure.values(assignment, [*self.nodes, self.measure.main])):
            moved = self._losses(values[:-1], number) - self.float[number]
            squares, count = squares + float(moved.double().square().sum()), count + len(moved)
            more, own = self.measure.distance(number, values[-1])
            difference, size = difference + more, size + own
        task, general = squares / (2 * count), difference / size if size else 0.0
        if self.weight == 1:
            return task
        self.scale = self.scale or (general / task if task and general else 0.0)
        return self.weight * (self.scale or 1.0) * task + (1 - self.weight) * general

    def anchor(self, assignment: Assignment) -> None:
        """As `Measure.anchor`."""
        self.measure.anchor(assignment)

    def _losses(self, outputs: Sequence[Any], number: int) -> Tensor:
        """[B] of a batch, [1] where the loss is one value for it."""
        with torch.no_grad():
            return self.task.value(outputs, number).detach().reshape(-1)
