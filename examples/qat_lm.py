"""Quantization-aware training of the tiny language model beside post-training quantization, by perplexity.

    python examples/qat_lm.py                                    # W4A8 and W2A16 in groups of 64, 140 steps each
    python examples/qat_lm.py --recipe w2a16 --steps 70 --json numbers.json --plot curves.png
    python examples/qat_lm.py --scales learned --scales observed --distill --seed 1

The model took 1,400 steps of 2,048 tokens; a tenth of them is 140. Every row trains on the same batches of the same
text (the standard library of this Python, less every paragraph of the held-out text) and is judged on the held-out
`eval.txt`. "recovered" is the share of what rounding costs in perplexity that training gives back. The row "float"
trains the float model for as long: what the steps alone are worth.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

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
from qfx.qat import Scales, check_loss

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
RECIPES = ("w4a8", "w2a16")


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


def trained(data: Data, recipe: str | dict[str, Any] | None, settings: Settings, scales: Scales, name: str) -> Row:
    """A row of QAT, judged after `qfx.convert`; recipe None trains the float model."""
    model = data.model()
    if recipe is not None:
        model = qfx.prepare_qat(model, recipe, data.calibration(recipe), scales=scales)
    row, started = Row(name, "", math.nan), time.perf_counter()
    row.curve.append((0, data.judge(model)))

    def check(step: int) -> None:
        row.curve.append((step, data.judge(model)))
        print(
            f"    {name} {scales} step {step}: {row.curve[-1][1]:.3f} ({time.perf_counter() - started:.0f} s)",
            flush=True,
        )

    train(model, data, settings, check, data.model() if settings.distill else None)
    row.seconds = time.perf_counter() - started
    row.perplexity = data.judge(qfx.convert(model) if recipe is not None else model)
    return row
