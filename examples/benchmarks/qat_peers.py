"""Quantization-aware training by qfx and by torchao: held-out perplexity of the tiny language model after equal steps.

    python examples/benchmarks/qat_peers.py --rate 1e-4 --rate 3e-4 --rate 1e-3 --text validation    # to choose rates
    python examples/benchmarks/qat_peers.py --method torchao --rate 3e-4 --seed 0 --seed 1 --json numbers.json

All train one format, torchao's int8-dynamic-activation int4-weight: the weights of all linears in 4 bits in groups of
32, their inputs in 8 bits per token with zero points. Model, batches, optimizer, schedule, loss (`--distill`: the share
of the float model's logits in it) and rates are the same; they come from `examples/qat_lm.py`. A row is judged after
the conversion; "recovered" is the share of what the same library's rounding alone costs.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.qat_peers` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.peers import table
from examples.benchmarks.peers.training import INT8_INT4
from examples.qat_lm import ASSETS, Data, Settings, Text, train
from examples.qat_rows import FLOAT, PTQ, Row, by_method, mean_and_spread, shown, with_recovered
from qfx.backends.qat import Scales
from qfx.storage.files import write_text

METHODS = ("qfx learned", "qfx observed", "torchao")


def prepared(method: str, model: Any) -> Any:
    """The model with fake quantization, in place."""
    if method == "torchao":
        from examples.benchmarks.peers.torchao_training import prepared as by_torchao

        return by_torchao(model)
    return qfx.prepare_qat(model, INT8_INT4, scales=cast(Scales, method.split(" ")[1]))


def converted(method: str, model: Any) -> Any:
    """The quantized model that a prepared one trained."""
    if method == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        from examples.benchmarks.peers.torchao_training import config

        quantize_(model, QATConfig(config(), step="convert"))
        return model
    return qfx.convert(model)


def rounded(method: str, model: Any) -> Any:
    """The model rounded without training: what "recovered" is measured from."""
    if method == "torchao":
        from torchao.quantization import quantize_

        from examples.benchmarks.peers.torchao_training import config

        quantize_(model, config())
        return model
    return qfx.quantize(model, INT8_INT4)


def run(data: Data, method: str, settings: Settings, say: Callable[[str], None]) -> Row:
    """Train by one method, convert and judge."""
    model = prepared(method, data.model())
    row, started = Row(method, f"rate {settings.rate:g}", math.nan, seed=settings.seed), time.perf_counter()

    def check(step: int) -> None:
        row.curve.append((step, data.judge(model)))
        say(f"{method}, rate {settings.rate:g}, seed {settings.seed}: step {step}, {row.curve[-1][1]:.3f}")

    train(model, data, settings, check, data.model() if settings.distill else None)
    row.seconds = time.perf_counter() - started
    row.score = data.judge(converted(method, model))
    return row


def best(rows: Sequence[Row]) -> list[str]:
    """A line for each method: the rate that is best in the mean over seeds, and that mean."""
    ways = [(recipe, method, [row.score for row in own]) for (recipe, method), own in by_method(rows).items()]
    lines = []
    for name in dict.fromkeys(row.recipe for row in rows if row.method not in ("", PTQ)):
        own = [(sum(scores) / len(scores), method, scores) for recipe, method, scores in ways if recipe == name]
        _, method, scores = min(way for way in own if way[1] != PTQ)
        lines.append(f"{name}: {mean_and_spread(scores, '.3f')} at its best, {method}")
    return lines


def main(
    method: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(METHODS)}; left out: all.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    rate: Annotated[list[float] | None, typer.Option(help="Rates of AdamW; left out: 1e-4, 3e-4, 1e-3.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Orders of the text; left out: 0.")] = None,
    distill: Annotated[float, typer.Option(min=0, max=1, help="The share of the teacher's loss.")] = 1.0,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens a step.")] = 2,
    text: Annotated[str, typer.Option(help="eval or validation: what judges.")] = "eval",
    tokens: Annotated[int | None, typer.Option(min=2, help="Held-out tokens; left out: all.")] = None,
    checks: Annotated[int, typer.Option(min=1, help="Points of the curve.")] = 1,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
) -> None:
    """Train by each method, and print a table."""
    table.check(method or (), METHODS, "--method")
    table.check([text], get_args(Text), "--text")
    warnings.filterwarnings("ignore", message="(lm_head|model.embed_tokens). ")  # their table is tied
    console = table.console()
    disable_progress_bar()
    torch.set_num_threads(threads)
    data = Data(ASSETS / "tiny_lm", tokens, cast(Text, text))
    rows = [Row(FLOAT, "", data.judge(data.model()))]
    first = Settings(steps, batch=batch, distill=distill, checks=checks, autocast=False)
    for name in method or METHODS:
        rows.append(Row(name, PTQ, data.judge(rounded(name, data.model()))))
        for number, one in product(seed or [0], rate or [1e-4, 3e-4, 1e-3]):
            settings = replace(first, rate=one, seed=number)
            rows.append(run(data, name, settings, lambda text: console.print(text, highlight=False)))
    with_recovered(rows)
    console.print(shown(rows, "perplexity", f"{steps} steps of {batch * 1024:,} tokens, distilled {distill:g}"))
    for line in best(rows):
        console.print(line, highlight=False)
    if json_file is not None:
        write_text(json_file, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
