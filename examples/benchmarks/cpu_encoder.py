"""How fast encoders run on this machine's CPU: qfx beside other ways to quantize, in turn on the same inputs.

    pip install -e ".[demo,bench]" -c constraints.txt
    python examples/benchmarks/cpu_encoder.py --threads 2 --json numbers.json --plot bars.png
    python examples/benchmarks/cpu_encoder.py --model bert-base --batch 8 --length 512 --profile
    python examples/benchmarks/cpu_encoder.py --quick

Each peer builds the model in a process of its own; then all are called in turn, one call each a round. A row is the
median of its calls, how many times slower that is than the fastest peer of the run (qfx and the floor apart), the mean
cosine of the hidden states to float32 on text that no peer has seen, and the bytes of its weights. A peer that is not
installed or fails is a row that says why. The floor is the model's integer matrix products and nothing else. Below the
table: qfx against the fastest peer and against the best cosine of the 8-bit peers, and how busy other processes were.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.cpu_encoder` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.peers import table
from examples.benchmarks.peers.encoding import MODELS, EncoderJob
from examples.benchmarks.peers.race import Entry, Race, Result
from qfx.measuring.measure import cosine

REFERENCE = "torch eager float32"
FLOOR = "floor: integer GEMMs"
PEERS = (
    Entry(REFERENCE, "eager", "float32"),
    Entry("Inductor float32", "inductor", "float32"),
    Entry("Inductor bfloat16", "inductor", "bfloat16"),
    Entry("torchao PT2E static int8", "torchao_pt2e", "static"),
    Entry("torchao PT2E dynamic int8", "torchao_pt2e", "dynamic"),
    Entry("torchao int8 per token", "torchao_dynamic"),
    Entry("OpenVINO default", "openvino_encoder", "default"),
    Entry("OpenVINO float32", "openvino_encoder", "float32"),
    Entry("OpenVINO NNCF int8", "openvino_encoder", "nncf"),
    Entry("ORT float32", "ort_encoder"),
    Entry("ORT float32 fused", "ort_encoder", "fused"),
    Entry("ORT quantize_dynamic", "ort_encoder", "int8"),
    Entry("ORT quantize_dynamic fused", "ort_encoder", "fused int8"),
)
# The word after a space: the backend; "file" is one that OpenVINO runs without torch.
RECIPES = ("w8a8", "w8a8-smooth", "w8a8-smooth openvino", "w8a8-smooth file")
COLUMNS = {
    "call_ms": "ms",
    "best_ms": "shortest",
    "ratio": "to the fastest peer",
    "cosine": "cosine",
    "weights_bytes": "MB",
}


def entries(recipes: Sequence[str], only: Sequence[str]) -> list[Entry]:
    """The peers, qfx in its recipes, the floor. `only`: by a word of the name; float32 eager stays."""
    every = [*PEERS, *(Entry(f"qfx {recipe}", "qfx_encoder", recipe) for recipe in recipes)]
    every.append(Entry(FLOOR, "integer_gemm"))
    return [e for e in every if not only or e.name == REFERENCE or any(word in e.name for word in only)]


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One dict for each result, with ratio and cosine; those that failed with the reason alone."""
    judged = {r.name: r for r in results if not r.failed}
    others = [r.seconds["call"] for r in judged.values() if r.name != FLOOR and not r.name.startswith("qfx ")]
    made: list[dict[str, Any]] = []
    for result in results:
        if result.failed:
            made.append({"peer": result.name, "failed": result.failed})
            continue
        seconds = result.seconds["call"]
        remarks = "; ".join(f"{key} {value}" for key, value in result.facts.items())
        made.append(
            {
                "peer": result.name,
                "call_ms": seconds * 1e3,
                "best_ms": result.best.get("call", seconds) * 1e3,
                "ratio": seconds / min(others) if others else None,
                "cosine": _cosine(judged.get(REFERENCE), result),
                "weights_bytes": result.size,
                "version": result.version,
                "remarks": remarks,
            }
        )
    return made


def _cosine(reference: Result | None, other: Result) -> float | None:
    if reference is None or reference.outputs is None or other.outputs is None:
        return None
    pairs = zip(reference.outputs, other.outputs, strict=True)
    return sum(cosine(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs) / len(other.outputs)


def verdicts(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row of qfx: how many times faster than the fastest peer, its cosine against the 8-bit peers'."""
    good = [row for row in found if not row.get("failed")]
    ours = [row for row in good if row["peer"].startswith("qfx ")]
    peers = [row for row in good if row not in ours and row["peer"] != FLOOR]
    eight = [row for row in peers if _has_8_bits(row["peer"]) and row["cosine"] is not None]
    lines = []
    for row in ours:
        line = row["peer"] + ":"
        if peers:
            fastest = min(peers, key=lambda other: other["call_ms"])
            line += f" {fastest['call_ms'] / row['call_ms']:.2f} times as fast as the fastest peer ({fastest['peer']})"
        if eight and row["cosine"] is not None:
            best = max(eight, key=lambda other: other["cosine"])
            line += f", cosine {row['cosine']:.5f} (best of 8 bits: {best['cosine']:.5f}, {best['peer']})"
        lines.append(line if peers else f"{line} no peer to compare with")
    return lines


def _has_8_bits(name: str) -> bool:
    return "int8" in name or "quantize_dynamic" in name


def profiled(result: Result, recipe: str, kind: str = "operator", floor: float | None = None) -> Table:
    """Milliseconds of a call by operator or by part, the longest first. floor: those of the integer products alone."""
    shown = Table(kind, "nodes", "ms", "share", title=f"where {recipe} spends its time", title_justify="left")
    kinds: dict[str, list[float]] = result.facts.get(f"{kind}s", {})
    total = sum(ms for _, ms in kinds.values())
    for name, (count, ms) in sorted(kinds.items(), key=lambda item: -item[1][1]):
        shown.add_row(name, f"{count:g}", f"{ms:.3f}", f"{ms / total:.1%}")
    shown.add_row("all of them", "", f"{total:.3f}", "") if kinds else shown.add_row(table.reason(result.failed))
    if kinds and floor is not None:
        shown.add_row(FLOOR, "", f"{floor:.3f}", f"{floor / total:.1%}")
    return shown


def _shape(job: EncoderJob, chosen: Sequence[Entry], rounds: int, profile: Sequence[str]) -> dict[str, Any]:
    """Race one shape and print what came out; what the JSON holds of it. profile: the recipes to profile."""
    console = table.console()
    with Race(chosen, job, job.path, table.say) as race:
        found = rows(race.run(rounds))
    console.print(table.shown(found, COLUMNS, f"{job.model}, {job.batch} x {job.length} tokens, median of {rounds}"))
    for line in (*verdicts(found), str(race.load)):
        table.say(line)
    floor = next((row["call_ms"] for row in found if row["peer"] == FLOOR and not row.get("failed")), None)
    for name in profile:
        with Race([Entry(f"profile {name}", "qfx_profile", name)], job, job.path, table.say) as one:
            result = one.run(1)[0]
        console.print(profiled(result, name, "part", floor), profiled(result, name))
    return {"rows": found, "others_busy": race.load.cores}


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(MODELS)}; default: all but tiny.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch sizes; left out: 1 and 8.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Sequence lengths; left out: 128 and 512.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each peer and shape.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each peer.")] = 2,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes of qfx.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Peers whose name holds this word.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep what the peers write here, for the next run.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw bars into this file.")] = None,
    profile: Annotated[bool, typer.Option(help="Show where the time of qfx goes, by part and by operator.")] = False,
    quick: Annotated[bool, typer.Option(help="The tiny model, 2 x 16 tokens, 2 rounds: to see that it runs.")] = False,
) -> None:
    """Time encoders in every way there is, and print a table for each shape."""
    if quick:
        model, batch, length, rounds = model or ["tiny"], batch or [2], length or [16], 2
    models = model or [name for name in MODELS if name != "tiny"]
    table.check(models, MODELS, "--model")
    where, recipes = table.place(threads), recipe or RECIPES
    own = [name for name in recipes if " " not in name]  # by ONNX Runtime, whose profile is read
    table.say(where)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, b, n in itertools.product(models, batch or (1, 8), length or (128, 512)):
            job = EncoderJob(name, b, n, threads, str(folder or scratch))
            runs[job.path.name] = _shape(job, entries(recipes, only or ()), rounds, own if profile else ())
    table.write(json_file, {"where": where, "rounds": rounds, "runs": runs})
    table.plot(plot_file, runs, "call_ms", "ms for a call")


if __name__ == "__main__":
    typer.run(main)
