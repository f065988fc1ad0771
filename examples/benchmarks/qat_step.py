"""What a training step with fake quantization costs beside the float step: time and memory, compiled and eager.

    python examples/benchmarks/qat_step.py --threads 2 --json numbers.json
    python examples/benchmarks/qat_step.py --model llama-0.1b --shape 1x512 --mode compiled --only w4a8 --rounds 3
    python examples/benchmarks/qat_step.py --python "torchao=/path/of/another/environment/bin/python"
    python examples/benchmarks/qat_step.py --quick

A step is loss, gradients and AdamW. Each row is a model in a process of its own; then all take one step in turn, round
after round. A row shows the median of its steps by the clock and in processor time (of all threads; that holds where
other processes keep the machine busy, too), the peak of memory (all that stays, and what a step needs beside it), and
all over the float model's of the same mode: under torch.compile (one graph, Inductor), or eager. Tokens are random:
their loss says that the rows do the same, and nothing of their accuracy.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.qat_step` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.memory import MODELS
from examples.benchmarks.peers import table
from examples.benchmarks.peers.race import Entry, Race, Result
from examples.benchmarks.peers.training import TrainJob

MODES = ("compiled", "eager")
FLOAT = "float32"
ROWS = {  # name: file under peers/, what its option says after the mode
    FLOAT: ("qfx_training", ""),
    "qfx w4a8 learned": ("qfx_training", "w4a8 learned"),
    "qfx w4a8 observed": ("qfx_training", "w4a8 observed"),
    "qfx w8a8 learned": ("qfx_training", "w8a8 learned"),
    "qfx w2a16 learned": ("qfx_training", "w2a16 learned"),
    "qfx int8-int4 learned": ("qfx_training", "int8-int4 learned"),
    "qfx int8-int4 observed": ("qfx_training", "int8-int4 observed"),
    "torchao int8-int4": ("torchao_training", ""),
}
COLUMNS = {
    "step_ms": "ms",
    "ratio": "time",
    "processor_ms": "processor ms",
    "processor_ratio": "processor time",
    "peak_bytes": "MB",
    "memory_ratio": "memory",
}


def entries(modes: Sequence[str], only: Sequence[str], pythons: dict[str, str]) -> list[Entry]:
    """The rows of each mode, the float model's first. only: by a word of the name; the float model stays."""
    return [
        Entry(f"{name}, {mode}", module, f"{mode} {option}".strip(), pythons.get(module.split("_")[0], ""))
        for mode in modes
        for name, (module, option) in ROWS.items()
        if not only or name == FLOAT or any(word in name for word in only)
    ]


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict for each result, with its ratios to the float model of the same mode; those that failed with why."""
    good = {r.name: r for r in results if not r.failed}
    made: list[dict[str, Any]] = []
    for result in results:
        if result.failed:
            made.append({"peer": result.name, "failed": result.failed})
            continue
        base = good.get(f"{FLOAT}, {result.name.rsplit(', ', 1)[1]}")
        seconds, peak = result.seconds, result.facts["peak_bytes"]
        made.append(
            {
                "peer": result.name,
                "step_ms": seconds["step"] * 1e3,
                "best_ms": result.best["step"] * 1e3,
                "ratio": None if base is None else seconds["step"] / base.seconds["step"],
                "processor_ms": seconds["processor"] * 1e3,
                "processor_ratio": None if base is None else seconds["processor"] / base.seconds["processor"],
                "peak_bytes": peak,
                "memory_ratio": None if base is None else peak / base.facts["peak_bytes"],
                "version": result.version,
                "remarks": f"loss {result.facts['loss']}, first step {result.facts['first_step_s']} s",
            }
        )
    return made


def shape_of(text: str) -> tuple[int, int]:
    """Batch and length of "2x512". Raises typer.BadParameter for any other text."""
    batch, _, length = text.partition("x")
    if not (batch.isdecimal() and length.isdecimal() and int(batch) >= 1 and int(length) >= 2):
        raise typer.BadParameter(f"batch x length such as 2x512 is expected, found {text!r}", param_hint="--shape")
    return int(batch), int(length)


def pythons_of(texts: Sequence[str]) -> dict[str, str]:
    """Interpreters by library, of "library=path". Raises typer.BadParameter for any other text."""
    for text in texts:
        if "=" not in text:
            raise typer.BadParameter(f"library=path is expected, found {text!r}", param_hint="--python")
    return dict(text.split("=", 1) for text in texts)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"tiny_lm (the default), {', '.join(MODELS)}.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Batch x tokens; left out: 2x512 and 4x256.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="compiled, eager; left out: both.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name holds this word.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each row.")] = 9,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each row.")] = 2,
    python: Annotated[list[str] | None, typer.Option(help="library=interpreter that has it.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw bars into this file.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny model, 2 x 16 tokens, 2 rounds: to see that it runs.")] = False,
) -> None:
    """Time steps of training in every way there is, and print a table for each model and shape."""
    if quick:
        model, shape, rounds = model or ["tiny"], shape or ["2x16"], 2
    modes, names, known = mode or MODES, model or ["tiny_lm"], ("tiny_lm", *MODELS)
    table.check(modes, MODES, "--mode")
    table.check(names, known, "--model")
    shapes, pythons = [shape_of(text) for text in shape or ("2x512", "4x256")], pythons_of(python or ())
    console, where = table.console(), table.place(threads)
    console.print(where, highlight=False)
    runs: dict[str, dict[str, Any]] = {}
    for name in names:
        for batch, length in shapes:
            with (
                tempfile.TemporaryDirectory() as folder,
                Race(
                    entries(modes, only or (), pythons), TrainJob(name, batch, length, threads), Path(folder),
                    lambda text: console.print(text, highlight=False),
                ) as race,
            ):  # fmt: skip
                found_rows = rows(race.run(rounds))
            title = f"{name}, {batch} x {length} tokens, median of {rounds} steps"
            console.print(table.shown(found_rows, COLUMNS, title), str(race.load), highlight=False)
            runs[f"{name}_{batch}x{length}"] = {"rows": found_rows, "others_busy": race.load.cores}
    table.write(json_file, {"where": where, "rounds": rounds, "runs": runs})
    table.plot(plot_file, runs, "step_ms", "ms for a step")


if __name__ == "__main__":
    typer.run(main)
