"""Does an allocation for the task beat one for nothing in particular? A text classifier, equal bytes, held-out texts.

    python examples/benchmarks/task_allocation.py --json numbers.json
    python examples/benchmarks/task_allocation.py --budget 3 --seeds 1 --refine 60

For each seed a head is trained (`examples/doc_task.py`). "general" scores the encoder by what moves its states on plain
text; "own output" the classifier by what moves its answers on the texts of the task, without labels; "task" by the
cross-entropy of labelled texts. All are solved for the same bytes and rounded alike. Without --refine the scores alone
make the difference; with it each way measures what it scores by. The head and the table of words have formats of their
own. What counts are accuracy and loss on texts that neither training nor scoring has seen.
"""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.task_allocation` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples import doc_task
from examples.benchmarks.peers import table
from examples.demo import encoder_batches, minilm
from qfx import annotation, data
from qfx.allocation import assign, predict
from qfx.allocation.problem import Problem
from qfx.allocation.solve import solve
from qfx.analysis.sensitivity import Sensitivity
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.measuring import measure

BUDGETS = (2.5, 3.0, 4.0)
FORMATS = tuple(f"{bits}/g32/f16" for bits in ("u2", "u3", "u4", "u5", "u6", "i8"))
FIXED = {"hidden": "i8/ch/f16", "output": "i8/ch/f16", "encoder.embeddings.word_embeddings": "u4/g32/f16"}
COLUMNS = {"bits": "bits", "size_bytes": "MB", "accuracy": "accuracy", "loss": "loss", "kld": "KLD"}
WAYS = ("general", "own output", "task")
Row = dict[str, Any]


def recipe(rounding: str = "mse", fixed: Mapping[str, str] = FIXED) -> dict[str, Any]:
    """A format for every weight, which a budget replaces except in those of `fixed`."""
    rules = [{"target": target, "w": FORMATS[0]} for target in ("linear", "embedding")]
    rules += [{"target": name, "w": fmt} for name, fmt in fixed.items()]
    unread = () if fixed is FIXED else ("*pooler*",)  # of the encoder alone
    return {"name": "task", "rounding": rounding, "rules": rules, "ignore": unread}


def allocated(
    model: torch.nn.Module, batches: Sequence[Any], bits: float, *, refine: int, rounding: str = "mse",
    fixed: Mapping[str, str] = FIXED, loss: str | None = None,
) -> dict[str, Format]:  # fmt: skip
    """Unit -> the format that `qfx.plan` gives it, at so many average bits of the weights that are not `fixed`."""
    options = {"formats": FORMATS, "embeddings": FORMATS, "refine": refine}
    asked = {**recipe(rounding, fixed), "allocation": options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # the pooler, which nothing reads
        bare = qfx.plan(model, recipe(rounding, fixed), [doc_task.inputs(batches[0])])
        shapes = {fqn: model.get_parameter(f"{fqn}.weight").shape for fqn in bare.annotations}
        held = sum(Format.parse(fmt).nbytes(shapes[fqn]) for fqn, fmt in fixed.items())
        free = sum(shape.numel() for fqn, shape in shapes.items() if fqn not in fixed)
        average = 8 * (int(bits * free / 8) + held) / sum(shape.numel() for shape in shapes.values())
        made = qfx.plan(model, asked, batches, avg_bits=average, loss=loss)
    told = made.sensitivities["allocation"]["units"]
    return {name: Format.parse(row["format"]) for name, row in told.items()}


def general(samples: int = 64, rounding: str = "mse") -> Sensitivity:
    """Scores of the encoder alone, by its states on Python's help topics, under the names of the classifier."""
    loaded = minilm()
    batches = encoder_batches(loaded, data.python_help(), samples)
    settings: dict[str, Any] = {"formats": FORMATS, "measure": 0, "recipe": recipe(rounding)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # the pooler, which nothing reads
        return prefixed(qfx.analyze(loaded.model, batches, **settings), "encoder.")


@cache
def encoder_formats(bits: float, samples: int, refine: int, rounding: str) -> dict[str, Format]:
    """Unit of the classifier's encoder -> its format, planned for its states on Python's help topics."""
    loaded = minilm()
    own = {name.removeprefix("encoder."): fmt for name, fmt in FIXED.items() if name.startswith("encoder.")}
    batches = encoder_batches(loaded, data.python_help(), samples)
    found = allocated(loaded.model, batches, bits, refine=refine, rounding=rounding, fixed=own)
    return {f"encoder.{name}": fmt for name, fmt in found.items()}


def prefixed(found: Sensitivity, prefix: str) -> Sensitivity:
    """The scores of a part of a model, under the names that its weights have in the whole."""

    def named(scores: Mapping[str, Any]) -> dict[str, Any]:
        return {prefix + name: value for name, value in scores.items()}

    units = tuple(replace(unit, name=prefix + unit.name, fqn=prefix + unit.fqn) for unit in found.units)
    scores = {method: named(own) for method, own in found.scores.items()}
    return replace(found, units=units, scores=scores, measured=named(found.measured))


class Trial:
    """One seed: the classifier, its texts, and what each way says about its units."""

    def __init__(
        self, seed: int, encoder: Sensitivity, *, classes: int = 16, most: int = doc_task.MOST, rounding: str = "mse",
        ways: Sequence[str] = WAYS, refine: int = 0, samples: int = 64,
    ) -> None:  # fmt: skip
        found = doc_task.task(classes=classes, seed=seed, most=most)
        self.model, self.sides = doc_task.trained(found, seed=seed)
        whole = len(self.sides["calibration"][0]["labels"])
        self.labelled = [batch for batch in self.sides["calibration"] if len(batch["labels"]) == whole]
        self.data = [doc_task.inputs(batch) for batch in self.labelled]
        self.refine, self.samples, self.rounding = refine, samples, rounding
        settings: dict[str, Any] = {"formats": FORMATS, "measure": 0, "seed": seed, "recipe": recipe(rounding)}
        self.scores = dict.fromkeys(("general", *(way for way in WAYS[1:] if way in ways)), encoder)
        if "own output" in ways and not refine:  # else each plan is scored anew
            self.scores["own output"] = qfx.analyze(self.model, self.data, **settings)
        if "task" in ways and not refine:
            self.scores["task"] = qfx.analyze(self.model, self.labelled, loss="classification", **settings)
        self.base = qfx.plan(self.model, recipe(rounding), self.data[:1])
        self.labels = doc_task.labels_of(self.sides["test"])
        self.float = doc_task.logits(self.model, self.sides["test"])

    def planned(self, way: str, bits: float) -> qfx.Plan:
        """The plan of a way, at so many average bits of the weights that are not FIXED, scales counted."""
        found = self.scores[way]
        free = self.base.annotations.keys() - FIXED.keys()
        units = [unit for unit in found.units if unit.fqn in free]
        candidates = {unit.name: [Format.parse(text) for text in FORMATS] for unit in units}
        if self.refine:
            assignment = self._refined(way, bits)
        else:
            problem = Problem(predict.choices(units, candidates, found.score()))
            assignment = solve(problem, int(bits * sum(unit.elements for unit in units) / 8)).assignment
        chosen = assign.formats_of(units, assignment)
        made = copy.deepcopy(self.base)
        for fqn, formats in chosen.items():
            made.annotations[fqn]["w"] = annotation.to_json(formats)
        return made

    def _refined(self, way: str, bits: float) -> dict[str, Format]:
        """Unit -> its format, each way refined by measuring what it scores by."""
        if way == "general":
            return encoder_formats(bits, self.samples, self.refine, self.rounding)
        loss, batches = (None, self.data) if way == "own output" else ("classification", self.labelled)
        return allocated(self.model, batches, bits, refine=self.refine, rounding=self.rounding, loss=loss)

    def row(self, name: str, plan: qfx.Plan) -> Row:
        """The quantized classifier on the held-out texts."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            model = qfx.quantize(copy.deepcopy(self.model), plan)
        weights = [row for row in qfx.report(model) if row.node not in FIXED and row.node in plan.annotations]
        size = sum(row.bytes_after for row in weights)
        found = doc_task.logits(model, self.sides["test"])
        return {
            "peer": name,
            "bits": 8 * size / sum(row.elements for row in weights),
            "size_bytes": size,
            **doc_task.judged(found, self.labels),
            "kld": measure.kld(self.float, found),
        }

    def rows(self, bits: float) -> list[Row]:
        """The float model, and each way at so many average bits."""
        made: list[Row] = [{"peer": "float32", "bits": 32.0, **doc_task.judged(self.float, self.labels)}]
        return made + [self.row(way, self.planned(way, bits)) for way in self.scores]


def summary(trials: Sequence[Sequence[Row]]) -> list[Row]:
    """Mean and spread over seeds of each way, and of the difference to `general`, which is seed by seed."""
    made = []
    for rows in zip(*trials, strict=True):
        row: Row = {"peer": rows[0]["peer"], "bits": rows[0]["bits"], "size_bytes": rows[0].get("size_bytes")}
        for key in ("accuracy", "loss", "kld"):
            if key in rows[0]:
                row[key] = statistics.mean(r[key] for r in rows)
        said = []
        for key in ("accuracy", "loss"):
            gains = [own[key] - _general(trial)[key] for own, trial in zip(rows, trials, strict=True)]
            row[f"{key}_gains"] = gains
            if row["peer"] not in ("float32", "general"):
                spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
                said.append(f"{key} {statistics.mean(gains):+.4f} (spread {spread:.4f})")
        row["remarks"] = "against general: " + ", ".join(said) if said else ""
        made.append(row)
    return made


def _general(trial: Sequence[Row]) -> Row:
    return next(row for row in trial if row["peer"] == "general")


def verdict(rows: Sequence[Row]) -> str:
    """Whether the task's allocation is better than the general one, by every seed or on the mean."""
    task = next(row for row in rows if row["peer"] == "task")
    told = []
    for key, sign in (("accuracy", 1), ("loss", -1)):
        gains = [sign * gain for gain in task[f"{key}_gains"]]
        better = sum(gain > 0 for gain in gains)
        word = "holds" if statistics.mean(gains) > 0 else "MISSED"
        told.append(f"{word}: {key} is better for the task by {better} of {len(gains)} seeds")
    return "; ".join(told)


def main(
    budget: Annotated[list[float] | None, typer.Option(help="Average bits of all weights.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Splits, heads and scores.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="Modules to tell apart.")] = 16,
    most: Annotated[int, typer.Option(min=10, help="Docstrings of each.")] = doc_task.MOST,
    samples: Annotated[int, typer.Option(min=4, help="Of plain text, for the general scores.")] = 64,
    rounding: Annotated[str, typer.Option(help="rtn or mse, of scores and weights.")] = "mse",
    way: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(WAYS[1:])}; left out: both.")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Assignments measured to improve a plan.")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Compare allocations of a classifier, and print a table for each budget."""
    torch.set_num_threads(threads)
    console = table.console()
    encoder = general(4 if refine else samples, rounding)  # with --refine for the names of its units alone
    trials = [
        Trial(
            seed, encoder, classes=classes, most=most, rounding=rounding, ways=way or WAYS, refine=refine,
            samples=samples,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    runs: dict[str, list[Row]] = {}
    for bits in budget or BUDGETS:
        runs[f"{bits:g}"] = found = summary([trial.rows(bits) for trial in trials])
        console.print(table.shown(found, COLUMNS, f"{bits:g} bits a weight, {seeds} seeds"))
        console.print(verdict(found), highlight=False)
    made = {"where": table.place(threads), "runs": {name: {"rows": rows} for name, rows in runs.items()}}
    table.write(json_file, made)


if __name__ == "__main__":
    typer.run(main)
