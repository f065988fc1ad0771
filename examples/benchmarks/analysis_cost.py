"""What an analysis costs, beside the forward and backward passes of the same model on the same tokens.

    python examples/benchmarks/analysis_cost.py --threads 2 --json cost.json
    python examples/benchmarks/analysis_cost.py --layers 2 --samples 8 --threads 2          smaller, quicker

A Llama architecture of random weights, 100 million parameters. The passes are those of training without an update:
model(**batch).logits, cross-entropy, backward with gradients of all weights. The analysis has all default formats, with
and without measurements. Each is run as many times as there are rounds, in turn; the medians count.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.analysis_cost` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.peers import table

VOCABULARY = 16384
Batches = list[dict[str, Any]]


def model_of(hidden: int, layers: int) -> nn.Module:
    """A Llama of random weights; 100 M parameters with 768 and 12."""
    import transformers as tf

    config = tf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 192, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = tf.LlamaForCausalLM(config).eval()
    return model


def batches_of(samples: int, length: int) -> Batches:
    """Random token ids, 4 samples a batch."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (samples, length), generator=random)
    return [{"input_ids": part, "use_cache": False} for part in ids.split(4)]


def passes(model: nn.Module, batches: Batches) -> None:
    """Forward and backward over every batch."""
    for batch in batches:
        logits = model(**batch).logits
        targets = batch["input_ids"][:, 1:]
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    model.zero_grad()


def analysis(model: nn.Module, batches: Batches, measure: int) -> None:
    """All default formats by the default method."""
    qfx.analyze(model, batches, measure=measure, progress=False)


def seconds(run: Callable[[], None]) -> float:
    """Of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def timed(model: nn.Module, batches: Batches, rounds: int, measure: int) -> list[dict[str, Any]]:
    """Rows of seconds, and of times the passes."""
    runs: dict[str, Callable[[], None]] = {
        "forward and backward": lambda: passes(model, batches),
        "analysis, no measurements": lambda: analysis(model, batches, 0),
    }
    if measure:
        runs[f"analysis, {measure} units of each kind measured"] = lambda: analysis(model, batches, measure)
    passes(model, batches[:1])
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    middle = {name: statistics.median(each) for name, each in times.items()}
    whole = middle["forward and backward"]
    return [{"peer": name, "seconds": value, "times": value / whole} for name, value in middle.items()]


def main(
    hidden: Annotated[int, typer.Option(min=192, help="Width, a multiple of 192.")] = 768,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 12,
    samples: Annotated[int, typer.Option(min=1, help="Samples.")] = 64,
    length: Annotated[int, typer.Option(min=8, help="Tokens of a sample.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 1,
    measure: Annotated[
        int, typer.Option(min=0, help="Units of each kind that the last run measures; 0: no such run.")
    ] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Time the analysis of one model and print a table."""
    console, where = table.console(), table.place(threads)
    torch.set_num_threads(threads)
    model = model_of(hidden, layers)
    found = timed(model, batches_of(samples, length), rounds, measure)
    count = sum(p.numel() for p in model.parameters())
    title = f"{count / 1e6:.0f} M parameters, {samples} x {length} tokens"
    console.print(where)
    console.print(table.shown(found, {"seconds": "s", "times": "times the passes"}, title))
    table.write(json_file, {"where": where, "title": title, "rows": found})


if __name__ == "__main__":
    typer.run(main)
