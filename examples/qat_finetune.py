"""Fine-tune MiniLM with a classification head while it computes with few bits, and run the result in ONNX Runtime.

    python examples/qat_finetune.py                              # 4-bit weights and 8-bit activations, 2-bit weights
    python examples/qat_finetune.py --recipe w3 --steps 60 --seed 0 --seed 1 --seed 2 --json rows.json --plot curves.png

The task is that of `examples/doc_task.py`: which module of the standard library is this docstring from? For each seed
(sides of the texts, head, order) the float model is fine-tuned, rounded ("PTQ") and, from there, trained with
quantization ("QAT"), its teacher being the fine-tuned float model. Curves are of the calibration side, the table of the
test side; "recovered" is the share of what rounding costs in accuracy that training gives back. In the end the
converted models of the first seed are exported, and ONNX Runtime classifies the test side.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

if __name__ == "__main__":  # import the sibling files as `python -m examples.qat_finetune` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import qfx
from examples import doc_task
from examples.doc_task import Batches, DocClassifier, Side
from examples.qat_rows import FLOAT, PTQ, Row, parameter_groups, plot, rate_at, set_rate, shown, with_recovered
from qfx import onnx
from qfx.errors import QfxWarning
from qfx.qat import check_loss

TABLE = {"target": "embedding", "w": "i8/ch"}
RECIPES: dict[str, dict[str, Any]] = {
    "w4a8": {"rules": [{"target": "linear", "x": "i8/tok", "w": "i4/ch"}, TABLE]},
    "w3": {"rules": [{"target": "linear", "w": "u3/g64"}, TABLE], "rounding": "mse"},
    "w2": {"rules": [{"target": "linear", "w": "u2/g64"}, TABLE], "rounding": "mse"},
}
UNREAD = ("*pooler*",)  # nothing reads it


@dataclass(frozen=True)
class Settings:
    """One training run. texts: a step's; rate: the highest; ratio: how many times that scales have; distill: the share
    of the teacher's loss, 0 to 1; autocast: products in bfloat16."""

    steps: int = 66
    rate: float = 1e-4
    texts: int = 32
    distill: float = 0.0
    ratio: float = 1.0
    seed: int = 0
    checks: int = 3
    autocast: bool = True


class Trial:
    """The task of one seed, the float classifier with a trained head, and its texts."""

    def __init__(self, seed: int, *, classes: int = 16, most: int = doc_task.MOST, length: int = 32) -> None:
        self.seed = seed
        found = doc_task.task(classes=classes, seed=seed, most=most)
        self.model, self.sides = doc_task.trained(found, seed=seed, length=length)
        train = self.sides["train"]
        self.texts = {name: torch.cat([batch[name] for batch in train]) for name in train[0]}

    def accuracy(self, model: nn.Module, side: Side) -> float:
        """Share of right answers, in per cent."""
        return 100 * doc_task.judged(self.logits(model, side), doc_task.labels_of(self.sides[side]))["accuracy"]

    def logits(self, model: nn.Module, side: Side) -> Tensor:
        """f32 [texts, classes], the model in eval mode."""
        return doc_task.logits(model.eval(), trimmed(self.sides[side]))

    def calibration(self) -> Batches:
        """What recipes that need data are given."""
        return [doc_task.inputs(batch) for batch in self.sides["calibration"]]


def trimmed(batches: Batches) -> Batches:
    """Batches less the columns that are padding in every row."""
    return [_trim(batch) for batch in batches]


def _trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: value[:, :longest] if value.dim() == 2 else value for name, value in batch.items()}


def train(
    model: nn.Module, trial: Trial, settings: Settings, on_check: Callable[[int], None], wanted: Tensor | None = None
) -> None:
    """Train in place by cross-entropy and, where `wanted` [texts, classes] is given, by the teacher's logits."""
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.ratio), lr=settings.rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    every, step = max(1, settings.steps // settings.checks), 0
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)  # dropout
        while step < settings.steps:
            order = torch.randperm(len(trial.texts["labels"]), generator=generator)
            for rows in order.split(settings.texts)[: settings.steps - step]:
                model.train()
                set_rate(optimizer, rate_at(step, settings.steps, settings.rate))
                batch = _trim({name: value[rows] for name, value in trial.texts.items()})
                with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
                    logits = model(**doc_task.inputs(batch)).logits.float()
                loss = functional.cross_entropy(logits, batch["labels"]) * (1 - settings.distill)
                if wanted is not None and settings.distill:
                    loss = loss + settings.distill * qfx.distillation_loss(logits, wanted[rows])
                check_loss(loss, step, model)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                step += 1
                if step % every == 0 or step == settings.steps:
                    on_check(step)
    model.eval()


class Maker:
    """Makes the rows of one trial."""

    def __init__(self, trial: Trial, say: Callable[[str], None]) -> None:
        self.trial, self.say = trial, say
        self.rows: list[Row] = []
        self.model: DocClassifier = trial.model
        self.wanted: Tensor | None = None

    def _run(self, model: nn.Module, settings: Settings, row: Row, wanted: Tensor | None = None) -> None:
        started = time.perf_counter()
        row.curve.append((0, self.trial.accuracy(model, "calibration")))

        def check(step: int) -> None:
            row.curve.append((step, self.trial.accuracy(model, "calibration")))
            seconds = time.perf_counter() - started
            self.say(
                f"seed {row.seed}, {row.recipe} {row.method}: step {step}, {row.curve[-1][1]:.1f} %, {seconds:.0f} s"
            )

        train(model, self.trial, settings, check, wanted)
        row.seconds = time.perf_counter() - started

    def floating(self, settings: Settings) -> None:
        """The float row: head and encoder fine-tuned; the model stays as the start and the teacher of the others."""
        row = Row(FLOAT, "", 0.0, self.trial.seed)
        self._run(self.model, settings, row)
        row.score = self.trial.accuracy(self.model, "test")
        self.wanted = self.trial.logits(self.model, "train")
        self.rows.append(row)

    def recipe(self, name: str, settings: Settings) -> nn.Module:
        """The rows of a recipe, PTQ and QAT; returns the converted model."""
        asked, data = recipe(name), self.trial.calibration()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)  # the table of positions has a format, but nothing to win
            rounded = qfx.quantize(copy.deepcopy(self.model), asked, data)
            model = qfx.prepare_qat(copy.deepcopy(self.model), asked, data)
        row = Row(name, PTQ, self.trial.accuracy(rounded, "test"), self.trial.seed)
        row.curve.append((0, self.trial.accuracy(rounded, "calibration")))
        self.rows.append(row)
        how = "QAT" + (f", distilled {settings.distill:g}" if settings.distill else "")
        row = Row(name, how, 0.0, self.trial.seed)
        self._run(model, settings, row, self.wanted)
        model = qfx.convert(model)
        row.score = self.trial.accuracy(model, "test")
        self.rows.append(row)
        return model


def recipe(name: str) -> dict[str, Any]:
    """One of RECIPES, else a preset or a file, less what nothing reads."""
    found = {"name": name, **RECIPES[name]} if name in RECIPES else qfx.Recipe.parse(name).to_dict()
    return {**found, "ignore": (*found.get("ignore", ()), *UNREAD)}


def exported(model: nn.Module, trial: Trial, path: Path) -> tuple[float, float]:
    """Write the model to `path`, let ONNX Runtime classify the test side: its accuracy in per cent, and the share of
    texts (in per cent, too) to which it gives the answer that torch gives."""
    batches = [doc_task.inputs(batch) for batch in trimmed(trial.sides["test"])]
    qfx.export_onnx(model, batches[0], path)
    session: Any = onnx.load(path)
    logits = torch.cat([next(iter(session(**batch).values())) for batch in batches])
    labels = doc_task.labels_of(trial.sides["test"])
    same = (logits.argmax(-1) == trial.logits(model, "test").argmax(-1)).double().mean()
    return 100 * doc_task.judged(logits, labels)["accuracy"], 100 * float(same)


def main(
    recipe: Annotated[list[str] | None, typer.Option(help="w4a8, w3, w2 or presets; left out: w4a8 and w2.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training with quantization.")] = 66,
    float_steps: Annotated[int, typer.Option(min=1, help="Of fine-tuning the float model before.")] = 66,
    rate: Annotated[float, typer.Option(help="Highest rate of AdamW, of the weights.")] = 2e-4,
    float_rate: Annotated[float, typer.Option(help="The same, of the float model.")] = 1e-4,
    distill: Annotated[float, typer.Option(min=0, max=1, help="Share of the teacher's loss.")] = 1.0,
    seed: Annotated[
        list[int] | None, typer.Option(help="Sides of the texts, head, order; several for a spread.")
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Modules to tell apart.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens; longer texts are cut.")] = 32,
    autocast: Annotated[bool, typer.Option("--bf16/--f32", help="Products of the training.")] = True,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Folder for the ONNX files; left out: they are not kept.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this file.")] = None,
) -> None:
    """Fine-tune, round, train with quantization, export, and print a table."""
    console = Console()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    trials: list[Trial] = []
    models: dict[str, nn.Module] = {}
    for number in seed or [0]:
        trial = Trial(number, classes=classes, length=length)
        maker = Maker(trial, lambda text: console.print(text, highlight=False))
        maker.floating(Settings(float_steps, float_rate, seed=number, autocast=autocast))
        for name in recipe or ("w4a8", "w2"):
            own = Settings(steps, rate, distill=distill, seed=number, autocast=autocast)
            model = maker.recipe(name, own)
            models.setdefault(name, model)
        rows += maker.rows
        trials.append(trial)
    with_recovered(rows)
    labels = len(doc_task.labels_of(trials[0].sides["test"]))
    console.print(shown(rows, "accuracy, %", f"MiniLM, {classes} modules, {labels} texts, {steps} steps", ".1f"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            accuracy, same = exported(model, trials[0], (out or Path(folder)) / f"{name}.onnx")
            console.print(
                f"{name} in ONNX Runtime: accuracy {accuracy:.1f} %, the answer of torch to {same:.1f} % of texts"
            )
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(plot_file, rows, "accuracy on the calibration side, %")


if __name__ == "__main__":
    typer.run(main)
