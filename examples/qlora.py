"""QLoRA on the tiny language model: adapters above packed weights, and what is left of them once they are merged.

    python examples/qlora.py                                     # NF4, rank 16, 100 steps
    python examples/qlora.py --recipe w4a16 --recipe w3a16-gptq --rank 8 --steps 60 --json numbers.json

Trains the adapters on the text on which the model was trained (see `qat_lm.py`), packed weights and everything else
frozen, and judges by perplexity on the held-out `eval.txt`. "recovered" is the share of what quantization costs that a
row gives back. Merging rounds the weights again: to the nearest codes of the best scales ("mse"), or by GPTQ on
32 x 512 tokens of the training text; "low-rank" keeps the adapters as float factors beside the codes. "adapters inside"
train within the fake quantization of a prepared model, so that nothing is lost where they are merged.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

if __name__ == "__main__":  # import the sibling files as `python -m examples.qlora` does
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import qfx
from examples.qat_lm import ASSETS, Data, Settings, train
from examples.qat_rows import FLOAT, PTQ, Row, shown, with_recovered

INSIDE = "adapters inside, converted"
Asked = str | dict[str, Any]
MERGES: dict[str, dict[str, Any]] = {
    "merged, mse": {"rounding": "mse"},
    "merged, gptq": {"rounding": "gptq"},
    "merged, low-rank": {"into": "low-rank"},
}


def adapted(data: Data, recipe: Asked, rank: int, settings: Settings) -> tuple[Any, list[Row]]:
    """A packed model with trained adapters, and its rows: packed alone, and with adapters."""
    asked = qfx.Recipe.parse(recipe)
    model: Any = qfx.quantize(data.model(), asked, data.calibration() if asked.needs_data else None)
    rows = [Row(asked.name, PTQ, data.judge(model))]
    torch.manual_seed(settings.seed)
    model, started = qfx.add_adapters(model, config_of(rank)), time.perf_counter()
    row = Row(asked.name, f"adapters, rank {rank}", 0.0, settings.seed)

    def check(step: int) -> None:
        row.curve.append((step, data.judge(model)))

    train(model, data, settings, check)
    row.seconds, row.score = time.perf_counter() - started, row.curve[-1][1]
    return model, [*rows, row]


def inside(data: Data, recipe: Asked, rank: int, settings: Settings) -> Row:
    """A row of adapters inside fake quantization, merged and converted: that loses nothing."""
    asked = qfx.Recipe.parse(recipe)
    model: Any = qfx.prepare_qat(data.model(), asked, data.calibration() if asked.needs_data else None)
    torch.manual_seed(settings.seed)
    model, started = qfx.add_adapters(model, config_of(rank)), time.perf_counter()
    row = Row(asked.name, INSIDE, 0.0, settings.seed)
    train(model, data, settings, lambda step: row.curve.append((step, data.judge(model))))
    row.seconds = time.perf_counter() - started
    row.score = data.judge(qfx.convert(model.merge_and_unload()))
    return row


def config_of(rank: int) -> LoraConfig:
    """Adapters on all linears but the head."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def merged(data: Data, model: Any, recipe: Asked, seed: int) -> list[Row]:
    """A row for each way of merging; `model` stays as it is."""
    rows = []
    for how, fields in MERGES.items():
        given = data.calibration() if fields.get("rounding") == "gptq" else None
        found = qfx.merge_adapters(copy.deepcopy(model), given, **fields)
        rows.append(Row(qfx.Recipe.parse(recipe).name, how, data.judge(found.model), seed))
    return rows


def run(data: Data, recipes: Sequence[Asked], rank: int, settings: Settings) -> list[Row]:
    """All rows, those of the float model first."""
    rows = [Row(FLOAT, "", data.judge(data.model()))]
    for recipe in recipes:
        model, own = adapted(data, recipe, rank, settings)
        rows += [*own, *merged(data, model, recipe, settings.seed), inside(data, recipe, rank, settings)]
    with_recovered(rows)
    return rows


def main(
    model: Annotated[Path, typer.Option(help="Folder of a causal language model.")] = ASSETS / "tiny_lm",
    recipe: Annotated[list[str] | None, typer.Option(help="Presets; left out: nf4.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    rate: Annotated[float, typer.Option(help="Highest rate of AdamW.")] = 1e-3,
    batch: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens a step.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the adapters and the order of the text.")] = 0,
    tokens: Annotated[int | None, typer.Option(min=2, help="Held-out tokens; left out: all.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
) -> None:
    """Train adapters, merge them in three ways, and print a table."""
    disable_progress_bar()
    torch.set_num_threads(threads)
    settings = Settings(steps, rate, seed=seed, batch=batch, checks=4, autocast=False)
    rows = run(Data(model, tokens), recipe or ["nf4"], rank, settings)
    title = f"{model.name}, {steps} steps of {batch * 1024:,} tokens, rate {rate:g}"
    Console().print(shown(rows, "perplexity", title))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
