"""A task's loss measured like a divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfx import Format
from qfx.analysis.losses import causal_lm
from qfx.analysis.measured import Measure
from qfx.analysis.task import TaskMeasure
from tests.qfx.analysis.models import causal, prepared

U2, U4 = (Format.parse(text) for text in ("u2/g16", "u4/g16"))


def of(weight: float = 1.0, loss: Any = "causal-lm", labelled: Any = None) -> tuple[TaskMeasure, Measure]:
    gm, flat, found = prepared()
    measure = Measure(gm, flat, outputs=found.outputs)
    given = causal()[1] if labelled is None else labelled
    return TaskMeasure(measure, loss, given, found.outputs, weight), measure


def everything(measure: Measure, fmt: Format) -> dict[str, Format]:
    return {unit.name: fmt for unit in measure.units}


def test_it_is_half_the_mean_square_of_what_each_sample_moves() -> None:
    task, measure = of()
    chosen = everything(measure, U4)
    moved = []
    for batch, before, after in zip(causal()[1], measure.outputs({}), measure.outputs(chosen), strict=True):
        losses = [causal_lm(type("Outputs", (), {"logits": logits}), batch) for logits in (before, after)]
        moved.append(losses[1] - losses[0])
    assert task.kld(chosen) == pytest.approx(float(torch.cat(moved).square().mean() / 2), rel=1e-5)
    assert task.kld({}) == 0
    assert 0 < task.kld(chosen) < task.kld(everything(measure, U2))


def test_labels_make_the_difference() -> None:
    """A loss that sees only the first sample's first token tells of nothing else."""
    seen: list[int] = []

    def first(outputs: Any, batch: Any) -> Tensor:
        seen.append(len(batch["input_ids"]))
        value: Tensor = outputs.logits[:, 0, 0] * batch["input_ids"][:, 0].eq(batch["input_ids"][0, 0])
        return value

    task, measure = of(loss=first)
    chosen = everything(measure, U4)
    values = [(a - b)[0, 0, 0] for a, b in zip(measure.outputs(chosen), measure.outputs({}), strict=True)]
    found = task.kld(chosen)
    assert found == pytest.approx(sum(float(v) ** 2 for v in values) / 2 / sum(seen[:2]), rel=1e-4)
    assert "first" in task.what


def test_a_share_of_the_task_and_the_rest_of_the_divergence() -> None:
    alone, measure = of()
    mixed, _ = of(0.25)
    rough, fine = everything(measure, U2), everything(measure, U4)
    assert mixed.kld(rough) == pytest.approx(measure.kld(rough)), "the first brings both to one scale"
    scale = measure.kld(rough) / alone.kld(rough)
    assert mixed.kld(fine) == pytest.approx(0.25 * scale * alone.kld(fine) + 0.75 * measure.kld(fine))
    assert mixed.kld({}) == 0
    assert mixed.what.startswith("0.25 of causal_lm: half") or mixed.what.startswith("0.25 of causal-lm: half")


def test_an_anchor_changes_nothing_but_time() -> None:
    task, measure = of(0.5)
    rough = everything(measure, U2)
    late = measure.units[-1].name
    before = task.kld(rough), task.kld(rough | {late: U4})
    task.anchor(rough)
    assert (task.kld(rough), task.kld(rough | {late: U4})) == pytest.approx(before)
    assert task.evaluations == measure.evaluations


def test_labels_that_are_missing_are_told() -> None:
    with pytest.raises(ValueError, match="needs 2 labelled batches, found 1"):
        of(labelled=causal()[1][:1])
    with pytest.raises(ValueError, match="'classification' needs labels"):
        of(loss="classification")
