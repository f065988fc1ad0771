"""What rounding costs: qfx's methods beside other libraries', on one model, at their true bytes.

    pip install -e ".[demo,bench,interop]" -c constraints.txt
    python examples/benchmarks/accuracy.py --threads 2 --json numbers.json --plot curve.png
    python examples/benchmarks/accuracy.py --only "qfx" --only "GPTQModel" --bits 4
    python -m venv lc && lc/bin/pip install torch llmcompressor  # wants an older transformers
    python examples/benchmarks/accuracy.py --llm-compressor lc/bin/python

Every row rounds the same linear layers (all but the output, which stays float) of the same model, by the same
calibration text where the method takes data, and is judged on text that none has seen: bits a weight with scales and
zero points counted, KL divergence to float32 in nats a token, perplexity, the share of tokens whose best guess stays.
Each library runs in a process of its own; one that is not installed or fails is a row that says why.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.accuracy` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.peers import table
from examples.benchmarks.peers.race import Entry, Race, Result
from examples.benchmarks.peers.rounding import RoundingJob, linears
from qfx import measure

LLM_COMPRESSOR = "llmcompressor_rounding"
REFERENCE = Entry("float32", "float_rounding")
PEERS: dict[int, tuple[Entry, ...]] = {
    8: (
        Entry("torchao int8/64", "torchao_rounding", "8 64"),
        Entry("quanto qint8", "quanto_rounding", "8"),
        Entry("HQQ 8/64", "hqq_rounding", "8 64"),
        Entry("llama.cpp Q8_0", "llama_cpp_rounding", "Q8_0"),
    ),
    4: (
        Entry("torchao int4/64", "torchao_rounding", "4 64"),
        Entry("quanto qint4", "quanto_rounding", "4"),
        Entry("HQQ 4/64", "hqq_rounding", "4 64"),
        Entry("bitsandbytes NF4", "bnb_rounding"),
        Entry("bitsandbytes NF4 double", "bnb_rounding", "double"),
        Entry("GPTQModel 4/64", "gptqmodel_rounding", "4 64"),
        Entry("llm-compressor 4/64", LLM_COMPRESSOR, "4 64"),
        Entry("AutoRound 4/64", "auto_round_rounding", "4 64"),
        Entry("llama.cpp Q4_0", "llama_cpp_rounding", "Q4_0"),
        Entry("llama.cpp Q4_1", "llama_cpp_rounding", "Q4_1"),
    ),
    3: (
        Entry("HQQ 3/64", "hqq_rounding", "3 64"),
        Entry("GPTQModel 3/64", "gptqmodel_rounding", "3 64"),
        Entry("llm-compressor 3/64", LLM_COMPRESSOR, "3 64"),
        Entry("AutoRound 3/64", "auto_round_rounding", "3 64"),
    ),
    2: (
        Entry("quanto qint2", "quanto_rounding", "2"),
        Entry("HQQ 2/64", "hqq_rounding", "2 64"),
        Entry("GPTQModel 2/64", "gptqmodel_rounding", "2 64"),
        Entry("llm-compressor 2/64", LLM_COMPRESSOR, "2 64"),
        Entry("AutoRound 2/64", "auto_round_rounding", "2 64"),
    ),
}
METHODS = ("rtn", "mse", "hqq", "gptq", "learned")  # at 8 bits the searches find next to nothing: rtn, mse, gptq
FORMATS = {8: ("i8/g64/f16",), 4: ("i4/g64/f16", "u4/g64/f16", "u4/g32/f16"), 3: ("u3/g64/f16",), 2: ("u2/g64/f16",)}
COLUMNS = {"bits": "bits", "weights_bytes": "MB", "kld": "KLD", "perplexity": "perplexity", "top1": "same best token",
           "seconds": "s"}  # fmt: skip


def entries(bits: Sequence[int], only: Sequence[str], llm_compressor: str = "") -> list[Entry]:
    """The rows to be: peers and qfx's methods at each number of bits. only: by a word of the name. llm_compressor: the
    interpreter of its environment."""
    found = [REFERENCE]
    for b in bits:
        methods = METHODS if b < 8 else ("rtn", "mse", "gptq")
        own = [
            Entry(f"qfx {m} {f.removesuffix('/f16')}", "qfx_rounding", f"{f} {m}") for f in FORMATS[b] for m in methods
        ]
        found += [e for e in (*PEERS[b], *own) if not only or any(word in e.name for word in only)]
    return [replace(e, python=llm_compressor) if e.module == LLM_COMPRESSOR else e for e in found]


def rows(results: Sequence[Result], ids: Tensor, weights: int) -> list[dict[str, Any]]:
    """One dict for each result; those that failed with the reason alone. weights: how many were rounded."""
    reference = next((r for r in results if r.name == REFERENCE.name and r.outputs is not None), None)
    found: list[dict[str, Any]] = []
    for result in results:
        if result.failed or result.outputs is None or reference is None or reference.outputs is None:
            found.append({"peer": result.name, "failed": result.failed or "the float model has no outputs"})
            continue
        logits, wanted = (torch.stack([torch.from_numpy(a) for a in o]) for o in (result.outputs, reference.outputs))
        assert result.size is not None
        facts = {k: v for k, v in result.facts.items() if k != "seconds"}
        found.append(
            {
                "peer": result.name,
                "bits": 8 * result.size / weights,
                "weights_bytes": result.size,
                "kld": measure.kld(wanted, logits),
                "perplexity": measure.perplexity(logits, ids),
                "top1": measure.top1_agreement(wanted, logits),
                "seconds": result.facts.get("seconds"),
                "version": result.version,
                "remarks": "; ".join(f"{key} {value}" for key, value in facts.items()),
            }
        )
    return found


def verdicts(found: Sequence[dict[str, Any]]) -> list[str]:
    """For each peer: qfx's row of the least KL divergence among those with no more bytes."""
    good = [row for row in found if not row.get("failed") and row["peer"] != REFERENCE.name]
    ours = [row for row in good if row["peer"].startswith("qfx ")]
    lines = []
    for row in good:
        fitting = [own for own in ours if own["weights_bytes"] <= row["weights_bytes"]]
        if row in ours:
            continue
        if not fitting:
            lines.append(f"{row['peer']}: no row of qfx has as few bytes")
            continue
        best = min(fitting, key=lambda own: own["kld"])
        lines.append(
            f"{row['peer']} ({row['bits']:.3f} bits, KLD {row['kld']:.5f}): "
            f"{best['peer']} ({best['bits']:.3f} bits) has {best['kld'] / row['kld']:.2f} of it"
        )
    return lines


def plot(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """KL divergence over bits a weight, both as they are, on a logarithmic axis."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 7))
    good = [row for row in found if not row.get("failed") and row["peer"] != REFERENCE.name]
    for own, colour, marker in ((False, "tab:blue", "o"), (True, "tab:orange", "s")):
        chosen = [row for row in good if row["peer"].startswith("qfx") == own]
        axis.scatter([r["bits"] for r in chosen], [r["kld"] for r in chosen], c=colour, marker=marker,
                     label="qfx" if own else "others")  # fmt: skip
    for row in good:
        axis.annotate(row["peer"], (row["bits"], row["kld"]), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axis.set(yscale="log", xlabel="bits a weight, scales included", ylabel="KL divergence to float32, nats a token")
    axis.grid(visible=True, which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _say(text: str) -> None:
    table.console().print(text, highlight=False)


def main(
    model: Annotated[str, typer.Option(help="tiny_lm, or the folder of a causal language model.")] = "tiny_lm",
    bits: Annotated[list[int] | None, typer.Option(help="Out of 2, 3, 4, 8; left out: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples of 512 tokens.")] = 128,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each peer.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name holds this word; float32 stays.")] = None,
    llm_compressor: Annotated[str, typer.Option(help="Python of an environment that has it, if not this one.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Keep what the peers write here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw KL divergence over bits into this file.")
    ] = None,
) -> None:
    """Round one model in every way there is, and print a table."""
    chosen = bits or [8, 4, 3, 2]
    if unknown := [b for b in chosen if b not in PEERS]:
        raise typer.BadParameter(f"{unknown[0]} is none of {', '.join(map(str, PEERS))}", param_hint="--bits")
    console, where = table.console(), table.place(threads)
    _say(where)
    with tempfile.TemporaryDirectory() as scratch:
        job = RoundingJob(model, samples, threads, str(folder or scratch))
        with Race(entries(chosen, only or (), llm_compressor), job, job.path, _say, alone=True) as race:
            weights = sum(m.weight.numel() for m in linears(job.module()).values())
            found = rows(race.results, job.evaluation(), weights)
    console.print(table.shown(found, COLUMNS, f"{model}, {samples} x 512 tokens of calibration"))
    for line in verdicts(found):
        _say(line)
    if json_file is not None:
        table.write(json_file, None, {"where": where, "model": model, "samples": samples, "rows": found}, "", "")
    if plot_file is not None:
        plot(plot_file, found)


if __name__ == "__main__":
    typer.run(main)
