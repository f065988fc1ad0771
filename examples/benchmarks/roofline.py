"""Predicted against measured: the time of prompts and of tokens of exported decoders on this CPU.

    qfx profile -o cpu.json --threads 1
    python examples/benchmarks/roofline.py --profile cpu.json --model llama-0.1b --json numbers.json

Each model is exported under each recipe and run by `qfx.onnx.load`: a prompt is read in one call, then tokens are
written one by one. All take a turn in each round; what counts is the fastest, as in the profile. The prediction comes
from the symbolic costs of the model's graph and from the profile, and has seen none of these times.
error: predicted / measured - 1. gain: how many times faster than float32, predicted and measured.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
import qfx.onnx
from examples.benchmarks.peers.decoding import MODELS, DecoderJob
from qfx.allocation.devices import device
from qfx.allocation.model_costs import costs_of, formats_of_plan
from qfx.allocation.profile import measure
from qfx.allocation.roofline import predict
from qfx.storage.files import write_text

RECIPES = ("float32", "w8a8", "w8a16", "w4a16", "w2a16")
COLUMNS = ("model", "recipe", "phase", "predicted ms", "measured ms", "error", "bound by", "gain predicted", "measured")


def timed(model: Any, prompt: list[int], tokens: int) -> dict[str, float]:
    """Seconds of the prompt, and of one token after it (the median)."""
    with torch.no_grad():
        times = [time.perf_counter()]
        found = model(torch.tensor([prompt]))
        times.append(time.perf_counter())
        for _ in range(tokens):
            found = model(found.logits[:, -1:].argmax(-1), past_key_values=found.past_key_values)
            times.append(time.perf_counter())
    first, *others = (after - before for before, after in itertools.pairwise(times))
    return {"prefill": first, "decode": statistics.median(others)}


def rows(name: str, job: DecoderJob, on: Any, recipes: list[str], rounds: int) -> list[dict[str, Any]]:
    """One dict for each recipe and phase."""
    costs = costs_of(job.module())
    runs: dict[str, Any] = {}
    predicted: dict[str, Any] = {}
    for recipe in recipes:
        asked = None if recipe == "float32" else recipe
        at = job.path / f"roofline_{recipe}"
        formats = {} if asked is None else formats_of_plan(qfx.plan(job.module(), asked), costs)
        predicted[recipe] = predict(costs, formats, on, sequence=job.prompt, context=job.prompt + job.generate // 2)
        if not at.exists():
            module = job.module()
            qfx.export_onnx(module, None, at, recipe=asked)
            module.config.save_pretrained(at)  # type: ignore[operator, union-attr]
        runs[recipe] = qfx.onnx.load(at, threads=job.threads)
    prompt = job.tokens(job.prompt)
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for recipe, model in runs.items():
            for phase, seconds in timed(model, prompt, job.generate).items():
                if turn:  # the first one warms up
                    times.setdefault((recipe, phase), []).append(seconds)
    found = []
    for recipe in recipes:
        for phase in ("prefill", "decode"):
            told = getattr(predicted[recipe], phase)
            seconds = min(times[recipe, phase])
            first = recipes[0]
            gains = (
                getattr(predicted[first], phase).seconds / told.seconds,
                min(times[first, phase]) / seconds,
            )
            found.append(
                {
                    "model": name, "recipe": recipe, "phase": phase, "predicted": told.seconds, "measured": seconds,
                    "error": told.seconds / seconds - 1, "bound": told.bound, "parts": dict(told.parts),
                    "gain": {"predicted": gains[0], "measured": gains[1]},
                }
            )  # fmt: skip
    return found


def main(
    model: Annotated[list[str], typer.Option(help=f"Out of {', '.join(MODELS)}.")] = ["tiny_lm", "llama-0.1b"],  # noqa: B006
    recipe: Annotated[list[str] | None, typer.Option(help="float32 or presets; gains count from the first.")] = None,
    profile: Annotated[Path | None, typer.Option(help="A file of `qfx profile`; left out: measured now.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 256,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each model.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each session.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Predict, measure, print both."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    on = measure(threads=threads) if profile is None else device(profile)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in model:
            job = DecoderJob(name, prompt, generate, 2, threads, folder)
            found += rows(name, job, on, recipe or list(RECIPES), rounds)
    table = Table(*COLUMNS)
    for row in found:
        times = [f"{row[key] * 1e3:.2f}" for key in ("predicted", "measured")]
        gains = [f"{row['gain'][key]:.2f}x" for key in ("predicted", "measured")]
        table.add_row(row["model"], row["recipe"], row["phase"], *times, f"{row['error']:+.0%}", row["bound"], *gains)
    Console(width=140).print(table)
    if json_file is not None:
        write_text(json_file, json.dumps({"device": on.name, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
