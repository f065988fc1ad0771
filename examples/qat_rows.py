"""What the examples of training with quantization share: rates, rows of results, their table and their picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

FLOAT, PTQ = "fp32", "PTQ"
SCALES = ("log_scale", "zero_shift")  # the parameters of learned scales


@dataclass
class Row:
    """What one way of making the model gives. seed None: the same for each; curve: (step, score)."""

    recipe: str
    method: str
    score: float
    seed: int | None = None
    recovered: float | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


def with_recovered(rows: Sequence[Row]) -> None:
    """Fill in what share of the loss of PTQ, against the float model, a row of the same recipe and seed gives back."""
    for row in rows:
        if row.method == PTQ or row.recipe == FLOAT:
            continue
        base, reference = (_score_of(rows, *asked, row.seed) for asked in ((row.recipe, PTQ), (FLOAT, "")))
        if base is not None and reference is not None and base != reference:
            row.recovered = (base - row.score) / (base - reference)


def _score_of(rows: Sequence[Row], recipe: str, method: str, seed: int | None) -> float | None:
    found = (row for row in rows if (row.recipe, row.method) == (recipe, method) and row.seed in (None, seed))
    return next((row.score for row in found), None)


def rate_at(step: int, steps: int, rate: float, *, last: float = 0.0) -> float:
    """The rate of a step: a linear rise over the first twentieth of `steps`, then a cosine to the part `last`."""
    warm = max(1, steps // 20)
    done = max(0.0, (step - warm) / max(1, steps - warm))
    return rate * min((step + 1) / warm, (1 + last) / 2 + (1 - last) / 2 * math.cos(math.pi * done))


def parameter_groups(model: nn.Module, ratio: float) -> list[dict[str, object]]:
    """Groups for an optimizer: the trainable weights, and the learned scales, at `ratio` times the rate ("ratio")."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scales = [p for name, p in named if name.endswith(SCALES)]
    weights = [p for name, p in named if not name.endswith(SCALES)]
    groups = [(weights, 1.0), (scales, ratio)]
    return [{"params": params, "ratio": part} for params, part in groups if params]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of `parameter_groups` its rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def by_method(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of the several seeds of each way; those of a recipe follow one another."""
    found: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        found.setdefault(row.recipe, {}).setdefault((row.recipe, row.method), []).append(row)
    return {key: own for ways in found.values() for key, own in ways.items()}


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """ "31.20 ± 0.11": the mean and, of several values, the standard deviation."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def shown(rows: Sequence[Row], score: str, title: str, form: str = ".3f") -> Table:
    """A table with a line for each way: `score` is what the scores are called, `form` how they are written."""
    table = Table("recipe", "method", "seeds", score, "recovered", "seconds", title=title)
    for (recipe, method), own in by_method(rows).items():
        recovered = mean_and_spread([row.recovered for row in own if row.recovered is not None], ".0%")
        seconds = mean_and_spread([row.seconds for row in own if row.seconds is not None][:1], ".0f")
        seeds = " ".join(str(row.seed) for row in own if row.seed is not None)
        table.add_row(recipe, method, seeds, mean_and_spread([row.score for row in own], form), recovered, seconds)
    return table


def _draw(axis: Any, label: str, own: Sequence[Row]) -> None:
    """The curves of the several seeds of one way."""
    steps = [step for step, _ in own[0].curve]
    found = list(zip(*([value for _, value in row.curve] for row in own), strict=True))
    (line,) = axis.plot(steps, [statistics.mean(values) for values in found], marker="o", ms=3, label=label)
    low, high = [min(values) for values in found], [max(values) for values in found]
    axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)


def plot(path: Path, rows: Sequence[Row], score: str) -> None:
    """Scores over steps, a picture for each recipe: the mean over seeds as a line, their range as a band."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    recipes = list(dict.fromkeys(row.recipe for row in rows if row.curve and row.recipe != FLOAT))
    figure, axes = plt.subplots(1, len(recipes), figsize=(6 * len(recipes), 4.5), squeeze=False)
    for axis, asked in zip(axes[0], recipes, strict=True):
        for (recipe, method), own in by_method(rows).items():
            scores = [row.curve[-1][1] if row.curve else row.score for row in own]  # what the curves are of
            if recipe == FLOAT and not method:
                axis.axhline(statistics.mean(scores), color="grey", ls="--", label=FLOAT)
            elif recipe == asked and len(own[0].curve) < 2:  # nothing was trained
                style = ":" if method == PTQ else "-."
                axis.axhline(statistics.mean(scores), color="black", ls=style, label=method)
            elif recipe == asked:
                _draw(axis, method, own)
        axis.set(title=asked, xlabel="step", ylabel=score)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
