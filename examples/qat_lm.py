"""Quantization-aware training of the tiny language model beside post-training quantization, by perplexity.

    python examples/qat_lm.py                                    # W4A8 and W2A16 in groups of 64, 140 steps each
    python examples/qat_lm.py --recipe w2a16 --steps 70 --json numbers.json --plot curves.png
    python examples/qat_lm.py --scales learned --scales observed --distill 0 --distill 1 --seed 1

The model took 1,400 steps of 2,048 tokens; a tenth of them is 140. Every row trains on the same batches of the same
text (the standard library of this Python, less every paragraph of the held-out text) and is judged on the held-out
`eval.txt`. "recovered" is the share of what rounding costs in perplexity that training gives back. With `--float` the
float model trains for as long: what the steps alone are worth.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__":  # import the sibling files as `python -m examples.qat_lm` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import qfx
from examples.lm_eval import next_token_loss, perplexity
from examples.python_text import documents, split_documents
from examples.train_tiny_lm import batches, encode, training_texts
from qfx.backends.qat import Scales
from qfx.qat import check_loss

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
RECIPES = ("w4a8", "w2a16")
Recipe = str | dict[str, Any] | None


@dataclass(frozen=True)
class Settings:
    """One training run. batch: windows of 1,024 tokens a step; distill: the share of the teacher's loss, 0 to 1."""

    steps: int = 140
    rate: float = 3e-4
    seed: int = 0
    batch: int = 2
    distill: float = 0.0
    checks: int = 7


@dataclass
class Row:
    """What one way of making the model gives; curve: (step, perplexity)."""

    recipe: str
    method: str
    perplexity: float
    recovered: float | None = None
    seconds: float | None = None
    seed: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


class Data:
    """The float model's folder, training text and held-out ids."""

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        text = (ASSETS / "eval.txt").read_text(encoding="utf-8")
        self.held_out = encode(self.tokenizer, [text])[:limit]
        self._text = text
        self._stream: Tensor | None = None

    def model(self) -> Any:
        """The float model in float32, in eval mode."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def stream(self) -> Tensor:
        """Token ids of the training text, in the order of documents; made once."""
        if self._stream is None:
            self._stream = encode(self.tokenizer, training_texts(split_documents(documents())["train"], self._text))
        return self._stream

    def batches(self, settings: Settings) -> Iterator[Tensor]:
        """`steps` batches of ids [B, T]."""
        return islice(batches(self.stream, settings.batch, settings.seed), settings.steps)

    def calibration(self, recipe: Any) -> list[dict[str, Tensor]] | None:
        """32 samples of 512 tokens of the training text, where the recipe needs data."""
        if not qfx.Recipe.parse(recipe).needs_data:
            return None
        pieces = self.stream[: 32 * 512 * 8].view(-1, 512)[::8]
        return [{"input_ids": pieces[i : i + 4]} for i in range(0, len(pieces), 4)]

    def judge(self, model: Any) -> float:
        """Perplexity on the held-out text."""
        return perplexity(model.eval(), self.held_out)


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a tenth."""
    warm = max(1, settings.steps // 20)
    done = (step - warm) / max(1, settings.steps - warm)
    return settings.rate * min((step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0.0, done)))


def train(model: Any, data: Data, settings: Settings, on_check: Callable[[int], None], teacher: Any = None) -> None:
    """Train `model` in place, by next-token loss and, with a teacher, by its divergence from the teacher's logits."""
    named = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    every = max(1, settings.steps // settings.checks)
    for step, ids in enumerate(data.batches(settings)):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        logits = model(ids, use_cache=False).logits
        loss = next_token_loss(logits, ids) * (1 - settings.distill)
        if teacher is not None and settings.distill:
            with torch.no_grad():
                wanted = teacher(ids, use_cache=False).logits
            loss = loss + settings.distill * qfx.distillation_loss(logits, wanted)
        check_loss(loss, step, model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named, 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            on_check(step + 1)


def trained(
    data: Data, recipe: Recipe, settings: Settings, scales: Scales, say: Callable[[str], None], start: Any = None
) -> Row:
    """A row of QAT, judged after `qfx.convert`. recipe None trains the float model; start: another recipe, of equal
    formats, whose rounding says where training begins."""
    model = data.model()
    asked = recipe if start is None else start
    if asked is not None:
        model = qfx.prepare_qat(model, asked, data.calibration(asked), scales=scales)
    how = f"QAT, {scales}" if recipe is not None else "float, trained on"
    how += f", from {start}" if start is not None else ""
    how += f", distilled {settings.distill:g}" if settings.distill else ""
    row, started = Row(name_of(recipe), how, math.nan, seed=settings.seed), time.perf_counter()
    row.curve.append((0, data.judge(model)))

    def check(step: int) -> None:
        row.curve.append((step, data.judge(model)))
        say(f"{row.recipe}, {how}: step {step}, {row.curve[-1][1]:.3f}, {time.perf_counter() - started:.0f} s")

    train(model, data, settings, check, data.model() if settings.distill else None)
    row.seconds = time.perf_counter() - started
    row.perplexity = data.judge(qfx.convert(model) if recipe is not None else model)
    return row


def rounded(data: Data, recipe: Recipe) -> Row:
    """A row of post-training quantization."""
    model = qfx.quantize(data.model(), recipe, data.calibration(recipe))
    return Row(name_of(recipe), "PTQ", data.judge(model))


def name_of(recipe: Recipe) -> str:
    """What a row is called."""
    return "fp32" if recipe is None else qfx.Recipe.parse(recipe).name


def with_recovered(rows: Sequence[Row], reference: float) -> None:
    """Fill in what share of the loss of PTQ each row of the same recipe gives back."""
    for row in rows:
        base = next((r.perplexity for r in rows if r.recipe == row.recipe and r.method == "PTQ"), None)
        if base is not None and row.method != "PTQ" and base != reference:
            row.recovered = (base - row.perplexity) / (base - reference)


def shown(rows: Sequence[Row], title: str) -> Table:
    """The table."""
    table = Table("recipe", "method", "seed", "perplexity", "recovered", "seconds", title=title)
    for row in rows:
        recovered = "" if row.recovered is None else f"{row.recovered:.0%}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        table.add_row(row.recipe, row.method, str(row.seed), f"{row.perplexity:.3f}", recovered, seconds)
    return table


def plot(path: Path, rows: Sequence[Row], reference: float) -> None:
    """Perplexity over steps, a picture for each recipe."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    recipes = list(dict.fromkeys(r.recipe for r in rows if r.curve and r.recipe != "fp32"))
    figure, axes = plt.subplots(1, len(recipes), figsize=(6 * len(recipes), 4.5), squeeze=False)
    for axis, recipe in zip(axes[0], recipes, strict=True):
        for row in rows:
            if row.recipe == recipe and row.curve:
                axis.plot(*zip(*row.curve, strict=True), marker="o", ms=3, label=f"{row.method}, seed {row.seed}")
            elif row.recipe == recipe:
                axis.axhline(row.perplexity, ls=":", color="black", label=row.method)
        axis.axhline(reference, color="grey", label="fp32")
        axis.set(title=recipe, xlabel="step", ylabel="perplexity of held-out text")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")] = ASSETS / "tiny_lm",
    recipe: Annotated[list[str] | None, typer.Option(help="Presets or files; left out: w4a8 and w2a16.")] = None,
    start: Annotated[
        str | None, typer.Option(help="A preset of these formats, whose rounding training begins at.")
    ] = None,
    scales: Annotated[list[str] | None, typer.Option(help="learned, observed; left out: learned.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 140,
    rate: Annotated[float, typer.Option(help="Highest rate of AdamW.")] = 3e-4,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens a step.")] = 2,
    seed: Annotated[list[int] | None, typer.Option(help="Order of the text; several are several rows.")] = None,
    distill: Annotated[list[float] | None, typer.Option(help="Shares of the teacher's loss, 0 to 1.")] = None,
    floating: Annotated[bool, typer.Option("--float", help="Train the float model, too.")] = False,
    tokens: Annotated[int | None, typer.Option(min=2, help="Held-out tokens; left out: all.")] = None,
    checks: Annotated[int, typer.Option(min=1, help="Points of the curve.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this file.")] = None,
) -> None:
    """Train the quantized model, and print a table."""
    console = Console()
    disable_progress_bar()
    torch.set_num_threads(threads)
    data = Data(model, tokens)
    reference = data.judge(data.model())
    rows = [Row("fp32", "", reference)]

    def say(text: str) -> None:
        console.print(text, highlight=False)

    for number, share in product(seed or [0], distill or [1.0]):
        settings = Settings(steps, rate, number, batch, share, checks)
        if floating:
            rows.append(trained(data, None, settings, "learned", say))
        for asked in recipe or RECIPES:
            if not any(row.recipe == name_of(asked) for row in rows):
                rows.append(rounded(data, asked))
            for kind in scales or ["learned"]:
                if kind not in get_args(Scales):
                    raise typer.BadParameter(
                        f"{kind!r} is none of {', '.join(get_args(Scales))}", param_hint="--scales"
                    )
                rows.append(trained(data, asked, settings, cast(Scales, kind), say, start))
    with_recovered(rows, reference)
    console.print(shown(rows, f"{model.name}, {steps} steps of {batch * 1024:,} tokens, rate {rate:g}"))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(plot_file, rows, reference)


if __name__ == "__main__":
    typer.run(main)
