"""Quantization-aware training of the tiny language model beside post-training quantization, by perplexity.

    python examples/qat_lm.py                                    # W4A8 and W2A16 in groups of 64, 140 steps each
    python examples/qat_lm.py --seed 0 --seed 1 --seed 2 --json numbers.json --plot curves.png
    python examples/qat_lm.py --recipe w2a16 --scales learned --scales observed --distill 0 --distill 1
    python examples/qat_lm.py --recipe w2a16 --rate 5e-4 --steps 70 --text validation    # to choose a rate
    python examples/qat_lm.py --plan-bits 3                      # formats planned for each head, too

The model took 1,400 steps of 2,048 tokens; a tenth of them is 140. Every row trains on the same batches of the same
text (the standard library of this Python, less every paragraph of the held-out text) and is judged on the held-out
`eval.txt`, or on the validation side of that text, by which the rates were chosen. Training begins at what `--start`
rounds (GPTQ), its teacher is the float model. "recovered" is the share of what rounding to nearest costs in perplexity
(the row PTQ) that training gives back. With `--float` the float model trains for as long: what the steps alone are
worth.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__":  # import the sibling files as `python -m examples.qat_lm` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import qfx
from examples.lm_eval import next_token_loss, perplexity
from examples.python_text import documents, sample, split_documents
from examples.qat_rows import FLOAT, PTQ, Row, parameter_groups, plot, rate_at, set_rate, shown, with_recovered
from examples.train_tiny_lm import batches, encode, training_texts
from qfx.backends.qat import Scales
from qfx.qat import check_loss

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
TIED = {"target": "tied", "w": "u4/g128"}
W3: dict[str, Any] = {
    "name": "w3a16",
    "rules": [{"target": "linear", "w": "u3/g64"}, {"target": "embedding", "w": "i8/ch"}, TIED],
    "rounding": "mse",
}
RATES = {"w4a8": 2e-4, "w3a16": 3e-4, "w2a16": 5e-4}  # by 70 steps on validation text; of 3 bits: between
OTHER_RATE = 2e-4
HIDDEN = 4.0
Recipe = str | dict[str, Any] | qfx.Plan
Text = Literal["eval", "validation"]
Start = Literal["gptq", "learned", "nearest"]


@dataclass(frozen=True)
class Settings:
    """One training run. batch: windows of 1,024 tokens a step; rate, ratio: the highest of weights, and how many times
    that scales have; distill: the share of the teacher's loss, 0 to 1; hidden: what its hidden states weigh beside its
    logits; autocast: products in bfloat16."""

    steps: int = 140
    rate: float = 3e-4
    ratio: float = 1.0
    seed: int = 0
    batch: int = 2
    distill: float = 0.0
    hidden: float = 0.0
    checks: int = 4
    autocast: bool = True


class Data:
    """The float model's folder, training text and the ids that judge."""

    def __init__(self, folder: Path, limit: int | None = None, text: Text = "eval") -> None:
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        self._eval = (ASSETS / "eval.txt").read_text(encoding="utf-8")
        judging = self._eval if text == "eval" else sample(split_documents(documents())["validation"], 60_000)
        self.held_out = encode(self.tokenizer, [judging])[:limit]
        self._stream: Tensor | None = None

    def model(self) -> Any:
        """The float model in float32, in eval mode."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def stream(self) -> Tensor:
        """Token ids of the training text, in the order of documents; made once."""
        if self._stream is None:
            self._stream = encode(self.tokenizer, training_texts(split_documents(documents())["train"], self._eval))
        return self._stream

    def batches(self, settings: Settings) -> Iterator[Tensor]:
        """`steps` batches of ids [B, T]."""
        return islice(batches(self.stream, settings.batch, settings.seed), settings.steps)

    def calibration(self) -> list[dict[str, Tensor]]:
        """32 samples of 512 tokens of the training text (fewer where it is shorter)."""
        pieces = self.stream[: len(self.stream) // 512 * 512][: 32 * 512 * 8].view(-1, 512)[::8]
        return [{"input_ids": pieces[i : i + 4]} for i in range(0, len(pieces), 4)]

    def judge(self, model: Any) -> float:
        """Perplexity on the held-out text."""
        return perplexity(model.eval(), self.held_out)


def train(model: Any, data: Data, settings: Settings, on_check: Callable[[int], None], teacher: Any = None) -> None:
    """Train `model` in place, by next-token loss and, with a teacher, by its divergence from the teacher's logits."""
    groups = parameter_groups(model, settings.ratio)
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    every = max(1, settings.steps // settings.checks)
    for step, ids in enumerate(data.batches(settings)):
        model.train()
        set_rate(optimizer, rate_at(step, settings.steps, settings.rate))
        states = settings.distill > 0 and settings.hidden > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            found = model(ids, use_cache=False, output_hidden_states=states)
            with torch.no_grad():
                wanted = None if teacher is None else teacher(ids, use_cache=False, output_hidden_states=states)
        loss = next_token_loss(found.logits, ids) * (1 - settings.distill)
        if wanted is not None:
            followed = qfx.distillation_loss(found.logits, wanted.logits)
            if states:  # the first is that of the table
                own = qfx.hidden_state_loss(found.hidden_states[1:], wanted.hidden_states[1:])
                followed = followed + settings.hidden * own
            loss = loss + settings.distill * followed
        check_loss(loss, step, model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            on_check(step + 1)


def begun(data: Data, recipe: Recipe, start: Start) -> qfx.Plan:
    """What `start` rounds, with the formats of a recipe: a plan from which training begins."""
    if isinstance(recipe, qfx.Plan):
        return recipe
    asked = qfx.Recipe.parse(recipe)
    fields: dict[str, Any] = {} if start == "nearest" else {"rounding": start}
    if start == "gptq":
        fields["gptq"] = {"sweeps": 0, "act_order": False}
    return qfx.plan(data.model(), asked, data.calibration() if fields or asked.needs_data else None, **fields)


def trained(data: Data, plan: qfx.Plan | None, settings: Settings, scales: Scales, say: Callable[[str], None]) -> Row:
    """A row of QAT, judged after `qfx.convert`. plan: where training begins; None trains the float model."""
    model = data.model()
    how = f"QAT, {scales} scales" if plan is not None else "trained on"
    how += f", {loss_of(settings)}"
    if plan is not None:
        model = qfx.prepare_qat(model, plan, scales=scales)
    row, started = (
        Row(FLOAT if plan is None else plan.recipe.name, how, math.nan, seed=settings.seed),
        time.perf_counter(),
    )
    row.curve.append((0, data.judge(model)))

    def check(step: int) -> None:
        row.curve.append((step, data.judge(model)))
        seconds = time.perf_counter() - started
        say(f"{row.recipe}, {how}, seed {row.seed}: step {step}, {row.curve[-1][1]:.3f}, {seconds:.0f} s")

    train(model, data, settings, check, data.model() if settings.distill else None)
    row.seconds = time.perf_counter() - started
    row.score = data.judge(model if plan is None else qfx.convert(model))
    return row


def loss_of(settings: Settings) -> str:
    """What a run is trained by, in words."""
    if not settings.distill:
        return "plain loss"
    share = "" if settings.distill == 1 else f" {settings.distill:g}"
    return f"distilled{share}" + ("" if settings.hidden else " by logits alone")


def rounded(data: Data, plan: qfx.Plan, method: str = PTQ) -> Row:
    """A row of post-training quantization."""
    return Row(plan.recipe.name, method, data.judge(qfx.quantize(data.model(), plan)))


def planned(data: Data, bits: float, refine: int = 60) -> qfx.Plan:
    """Formats of 2 to 8 bits for each head and layer, `bits` on average (scales counted), by qfx's planner."""
    rules = [{"target": target, "w": "u4/g32/f16"} for target in ("linear", "embedding", "tied")]
    recipe = {"name": f"planned, {bits:g} bits", "rules": rules, "rounding": "mse", "allocation": {"refine": refine}}
    return qfx.plan(data.model(), recipe, data.calibration(), units="heads", avg_bits=bits)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")] = ASSETS / "tiny_lm",
    recipe: Annotated[list[str] | None, typer.Option(help="w3a16, presets or files; left out: w4a8 and w2a16.")] = None,
    plan_bits: Annotated[float | None, typer.Option(help="A plan for each head of so many bits, too.")] = None,
    start: Annotated[str, typer.Option(help="gptq, learned or nearest: where training begins.")] = "gptq",
    scales: Annotated[list[str] | None, typer.Option(help="learned, observed; left out: learned.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 140,
    rate: Annotated[float | None, typer.Option(help="Highest rate of AdamW; left out: that of the recipe.")] = None,
    ratio: Annotated[float, typer.Option(help="How many times that rate scales have.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens a step.")] = 2,
    seed: Annotated[list[int] | None, typer.Option(help="Order of the text; several for mean and spread.")] = None,
    distill: Annotated[list[float] | None, typer.Option(help="Shares of the teacher's loss; left out: 1.")] = None,
    hidden: Annotated[float, typer.Option(min=0, help="What the teacher's hidden states weigh in it.")] = HIDDEN,
    floating: Annotated[bool, typer.Option("--float", help="Train the float model, too.")] = False,
    text: Annotated[str, typer.Option(help="eval or validation: what judges.")] = "eval",
    tokens: Annotated[int | None, typer.Option(min=2, help="Tokens of it; left out: all.")] = None,
    checks: Annotated[int, typer.Option(min=1, help="Points of the curve.")] = 4,
    autocast: Annotated[bool, typer.Option("--bf16/--f32", help="Products of the training.")] = True,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves into this file.")] = None,
) -> None:
    """Train the quantized model, and print a table."""
    console = Console()
    disable_progress_bar()
    torch.set_num_threads(threads)
    kinds = [_one_of(kind, Scales, "--scales") for kind in scales or ["learned"]]
    begin: Start = _one_of(start, Start, "--start")
    first = Settings(steps, ratio=ratio, batch=batch, checks=checks, hidden=hidden, autocast=autocast)
    data = Data(model, tokens, _one_of(text, Text, "--text"))
    rows = [Row(FLOAT, "", data.judge(data.model()))]
    recipes: list[Recipe] = [W3 if name == W3["name"] else name for name in recipe or ["w4a8", "w2a16"]]
    if plan_bits is not None:
        recipes.append(planned(data, plan_bits))
    plans = [begun(data, asked, begin) for asked in recipes]
    for asked, plan in zip(recipes, plans, strict=True):
        nearest = begun(data, asked, "nearest")
        rows.append(rounded(data, nearest))
        if plan.recipe.rounding != nearest.recipe.rounding:
            rows.append(rounded(data, plan, f"{PTQ} by {plan.recipe.rounding}"))

    def say(line: str) -> None:
        console.print(line, highlight=False)

    for number, share in product(seed or [0], distill or [1.0]):
        settings = replace(first, seed=number, distill=share, rate=rate or OTHER_RATE)
        if floating:
            rows.append(trained(data, None, settings, "learned", say))
        for plan, kind in product(plans, kinds):
            own = replace(settings, rate=rate or RATES.get(plan.recipe.name, OTHER_RATE))
            rows.append(trained(data, plan, own, kind, say))
    with_recovered(rows)
    console.print(shown(rows, "perplexity", f"{model.name}, {text}, {steps} steps of {batch * 1024:,} tokens"))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(plot_file, rows, f"perplexity, {text} text")


def _one_of(value: str, known: Any, option: str) -> Any:
    if value not in get_args(known):
        raise typer.BadParameter(f"{value!r} is none of {', '.join(get_args(known))}", param_hint=option)
    return value


if __name__ == "__main__":
    typer.run(main)
