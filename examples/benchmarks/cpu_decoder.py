"""How fast decoders run on this machine's CPU: prompt in, tokens out, qfx beside other ways to quantize.

    pip install -e ".[demo,bench]" -c constraints.txt
    python examples/benchmarks/cpu_decoder.py --model llama-1b --threads 2 --json numbers.json --plot bars.png
    python examples/benchmarks/cpu_decoder.py --model tiny_lm
    python examples/benchmarks/cpu_decoder.py --quick

Each peer builds the same checkpoint in a process of its own; then all take a turn in each round: the whole prompt in
one step, then greedy decoding. Peers of large models are in memory one at a time (`--alone`): each is started again for
each turn. A row is the median of the rounds in tokens/s and as a multiple of the fastest peer of the run (qfx apart),
the bytes of the model's files, and the mean KL divergence of the next-token distributions from float32 on given tokens,
in nats: after half of them, read at once, then after each of the others. Random weights serve for speed; `tiny_lm` is
a small trained model on held-out text, where the divergence means something. A peer that is not installed or fails is a
row that says why. Below the table: qfx against the peers that are no larger and no further from float32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.cpu_decoder` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.peers import table
from examples.benchmarks.peers.decoding import MODELS, DecoderJob
from examples.benchmarks.peers.race import Entry, Race, Result
from qfx.measuring.measure import kld, top1_agreement

REFERENCE = "torch eager float32"
PEERS = (
    Entry(REFERENCE, "eager_decoder", "float32"),
    Entry("torch eager bfloat16", "eager_decoder", "bfloat16"),
    Entry("genai int4/32", "genai_decoder", "int4"),
    Entry("genai int4/128", "genai_decoder", "int4/128"),
    Entry("genai int8", "genai_decoder", "int8"),
    Entry("OpenVINO int4/128", "openvino_decoder", "int4/128"),
    Entry("OpenVINO int8", "openvino_decoder", "int8"),
    Entry("llama.cpp Q4_0", "llama_cpp_decoder", "Q4_0"),
    Entry("llama.cpp Q4_K_M", "llama_cpp_decoder", "Q4_K_M"),
    Entry("llama.cpp Q8_0", "llama_cpp_decoder", "Q8_0"),
    Entry("llama.cpp Q2_K", "llama_cpp_decoder", "Q2_K"),
)
RECIPES = ("w4a16", "w4a16 prefill", "w8a16", "w2a16")
ALONE = ("llama-1b",)  # too large to keep a dozen of them in memory
COLUMNS = {
    "prefill_per_s": "prefill tokens/s",
    "prefill_ratio": "of the fastest",
    "decode_per_s": "decode tokens/s",
    "decode_ratio": "of the fastest",
    "weights_bytes": "MB",
    "kld": "KLD",
    "top1": "same best token",
}


def entries(recipes: Sequence[str], only: Sequence[str], without: Sequence[str] = ()) -> list[Entry]:
    """The peers, and qfx in its recipes, under its own runner and under onnxruntime-genai.

    `only`, `without`: by a word of the name; float32 eager stays.
    """
    ours = [f"{recipe}{how}" for recipe in recipes for how in ("", " genai")]
    every = [*PEERS, *(Entry(f"qfx {option}", "qfx_decoder", option) for option in ours)]
    chosen = [e for e in every if not only or e.name == REFERENCE or any(word in e.name for word in only)]
    return [e for e in chosen if e.name == REFERENCE or not any(word in e.name for word in without)]


def rows(results: Sequence[Result], job: DecoderJob) -> list[dict[str, Any]]:
    """One dict for each result, with ratios and divergence; those that failed with the reason alone."""
    good = [r for r in results if not r.failed]
    peers = [r for r in good if not r.name.startswith("qfx ")]
    best = {part: min((r.seconds[part] for r in peers), default=None) for part in ("prefill", "decode")}
    reference = next((r for r in good if r.name == REFERENCE), None)
    made: list[dict[str, Any]] = []
    for result in results:
        row: dict[str, Any] = {"peer": result.name}
        if result.failed:
            row["failed"] = result.failed
        else:
            for part, tokens in (("prefill", job.prompt), ("decode", job.generate)):
                seconds, fastest = result.seconds[part], best[part]
                row[f"{part}_per_s"] = tokens / seconds
                row[f"{part}_ratio"] = None if fastest is None else fastest / seconds
            row |= _near(reference, result)
            row |= {"weights_bytes": result.size, "version": result.version}
            row["remarks"] = "; ".join(f"{key} {value}" for key, value in result.facts.items())
        made.append(row)
    return made


def _near(reference: Result | None, other: Result) -> dict[str, float | None]:
    if reference is None or reference.outputs is None or other.outputs is None:
        return {"kld": None, "top1": None}
    wanted, found = torch.from_numpy(reference.outputs[0]), torch.from_numpy(other.outputs[0])
    return {"kld": kld(wanted, found), "top1": top1_agreement(wanted, found)}


def verdicts(found: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each row of qfx: how fast it decodes and reads the prompt against the peers that it is to beat."""
    good = [row for row in found if not row.get("failed")]
    ours = [row for row in good if row["peer"].startswith("qfx ")]
    peers = [row for row in good if row not in ours]
    groups = {"the fastest": peers, "the fastest of llama.cpp": [p for p in peers if p["peer"].startswith("llama.cpp")]}
    lines = []
    for row in ours:
        parts: dict[str, str] = {}
        for part in ("decode", "prefill"):
            for name, rivals in groups.items():
                if rivals:
                    best = max(rivals, key=lambda other: other[f"{part}_per_s"])
                    ratio = row[f"{part}_per_s"] / best[f"{part}_per_s"]
                    parts.setdefault(f"{part} {ratio:.2f}x {best['peer']}", f" ({name})")
        said = ", ".join(text + of for text, of in parts.items()) or "no peer to compare with"
        lines.append(f"{row['peer']}: {said}{_beaten(row, peers)}")
    return lines


def _beaten(row: dict[str, Any], peers: Sequence[dict[str, Any]]) -> str:
    """The peer that decodes fastest among those that are no larger and no further from float32 than `row`."""
    if row["kld"] is None:
        return ""
    as_good = [p for p in peers if p["weights_bytes"] <= row["weights_bytes"] and p["kld"] <= row["kld"]]
    if not as_good:
        return "; no peer is as small and as near"
    best = max(as_good, key=lambda other: other["decode_per_s"])
    ratio = row["decode_per_s"] / best["decode_per_s"]
    return f"; decode {ratio:.2f}x the fastest that is as small and as near ({best['peer']})"


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(MODELS)}; default: all but tiny.")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    generate: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 128,
    judged: Annotated[int, typer.Option(min=2, help="Tokens on which the divergence is measured.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each peer.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each peer.")] = 2,
    recipe: Annotated[list[str] | None, typer.Option(help="Recipes of qfx; `prefill` behind: by integers.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Peers whose name holds this word.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave out peers whose name holds this word.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep what the peers write here, for the next run.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw bars of decoding into this file.")] = None,
    alone: Annotated[bool | None, typer.Option(help="One peer in memory at a time; left out: for large ones.")] = None,
    quick: Annotated[bool, typer.Option(help="The tiny model, 16 tokens in, 4 out, 1 round: to see it run.")] = False,
) -> None:
    """Time decoders in every way there is, and print a table for each model."""
    if quick:
        model, prompt, generate, judged, rounds = model or ["tiny"], 16, 4, 12, 1
    chosen = model or [name for name in MODELS if name != "tiny"]
    table.check(chosen, MODELS, "--model")
    console, where = table.console(), table.place(threads)
    console.print(where)
    runs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            job = DecoderJob(name, prompt, generate, judged, threads, str(folder or scratch))
            job.checkpoint()
            listed = entries(recipe or RECIPES, only or (), without or ())
            one = name in ALONE if alone is None else alone
            with Race(listed, job, job.path, lambda text: console.print(text, highlight=False), alone=one) as race:
                found = rows(race.run(rounds), job)
            runs[name] = {"rows": found, "others_busy": race.load.cores}
            title = f"{name}: {prompt} tokens in, {generate} out, median of {rounds}"
            console.print(table.shown(found, COLUMNS, title))
            for line in (*verdicts(found), str(race.load)):
                console.print(line, highlight=False)
    table.write(json_file, {"where": where, "rounds": rounds, "runs": runs})
    table.plot(plot_file, runs, "decode_per_s", "tokens/s while decoding")


if __name__ == "__main__":
    typer.run(main)
