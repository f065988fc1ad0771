"""What rounding costs: qfx's methods beside other libraries', on one model, at their true bytes.

    pip install -e ".[demo,bench,interop]" -c constraints.txt
    python examples/benchmarks/accuracy.py --threads 2 --json numbers.json --plot curve.png
    python examples/benchmarks/accuracy.py --only "qfx" --only "GPTQModel" --bits 4
    python -m venv lc && lc/bin/pip install torch llmcompressor  # wants an older transformers
    python examples/benchmarks/accuracy.py --llm-compressor lc/bin/python

Every row rounds the same linear layers (all but the output, which stays float) of the same model, by the same
calibration text where the method takes data, and is judged on text that none has seen: bits a weight with scales and
zero points counted, KL divergence to float32 in nats a token, perplexity, the share of tokens whose best guess stays.
Each library runs in a process of its own; one that is not installed or fails is a row that says why. Logits go through
a file and are judged window by window, so that a vocabulary of 50,000 needs no more than a few GB.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.accuracy` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.peers import table
from examples.benchmarks.peers.race import Entry, Race, Result
from examples.benchmarks.peers.rounding import ITERS, WINDOWS, RoundingJob, linears
from qfx.measuring import measure

LLM_COMPRESSOR = "llmcompressor_rounding"
REFERENCE = Entry("float32", "float_rounding")
PEERS: dict[int, tuple[Entry, ...]] = {
    8: (
        Entry("torchao int8/64", "torchao_rounding", "8 64"),
        Entry("quanto qint8", "quanto_rounding", "8"),
        Entry("HQQ 8/64", "hqq_rounding", "8 64"),
        Entry("HQQ 8/32", "hqq_rounding", "8 32"),
        Entry("llama.cpp Q8_0", "llama_cpp_rounding", "Q8_0"),
    ),
    7: (),  # beside llama.cpp's Q6_K, which has 8 bits where 256 does not divide the widths
    6: (
        Entry("llama.cpp Q6_K", "llama_cpp_rounding", "Q6_K"),
        Entry("llama.cpp Q6_K matrix", "llama_cpp_rounding", "Q6_K matrix"),
    ),
    5: (
        Entry("llama.cpp Q5_0", "llama_cpp_rounding", "Q5_0"),
        Entry("llama.cpp Q5_K_M", "llama_cpp_rounding", "Q5_K_M"),
        Entry("llama.cpp Q5_K_M matrix", "llama_cpp_rounding", "Q5_K_M matrix"),
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
        Entry("llama.cpp Q4_0 matrix", "llama_cpp_rounding", "Q4_0 matrix"),
        Entry("llama.cpp Q4_K_M", "llama_cpp_rounding", "Q4_K_M"),
        Entry("llama.cpp Q4_K_M matrix", "llama_cpp_rounding", "Q4_K_M matrix"),
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
METHODS = ("rtn", "mse", "mse-energy", "hqq", "gptq", "learned")  # learning finds next to nothing at 8 bits
FORMATS = {
    8: ("i8/g64/f16", "u8/g64/f16", "u8/g32/f16"),
    7: ("u7/g64/f16",),
    6: ("u6/g64/f16", "i6/ch/f16"),
    5: ("u5/g64/f16",),
    4: ("i4/g64/f16", "u4/g64/f16", "u4/g32/f16"),
    3: ("u3/g64/f16",),
    2: ("u2/g64/f16",),
}
FLOATS = {4: ("nf4/g64/f16",)}  # rounded by the methods that need no grid of even steps
PLANNED = {6: 6.03, 5: 5.33, 4: 4.31, 3: 3.3, 2: 2.28}  # formats chosen for each weight, in as many bits on average
MARKERS = "osD^vP*Xh<>p"
COLUMNS = {"bits": "bits", "weights_bytes": "MB", "kld": "KLD", "kld_error": "±", "perplexity": "perplexity",
           "top1": "same best token", "seconds": "s"}  # fmt: skip


def entries(bits: Sequence[int], only: Sequence[str], llm_compressor: str = "") -> list[Entry]:
    """The rows to be: peers and qfx's methods at each number of bits. only: by a word of the name. llm_compressor: the
    interpreter of its environment."""
    found = [REFERENCE]
    for b in bits:
        methods = METHODS if b < 8 else ("rtn", "mse", "mse-energy", "gptq")
        own = [
            Entry(f"qfx {m} {f.removesuffix('/f16')}", "qfx_rounding", f"{f} {m}") for f in FORMATS[b] for m in methods
        ]
        own += [
            Entry(f"qfx {m} {f.removesuffix('/f16')}", "qfx_rounding", f"{f} {m}")
            for f in FLOATS.get(b, ())
            for m in ("rtn", "mse-energy", "gptq")
        ]
        if b in PLANNED:
            own.append(Entry(f"qfx planned {PLANNED[b]}", "qfx_rounding", f"{PLANNED[b]} planned"))
        if b in FLOATS:
            own.append(Entry(f"qfx planned nf4 {PLANNED[b]}", "qfx_rounding", f"{PLANNED[b]} planned-nf4"))
        found += [e for e in (*PEERS[b], *own) if not only or any(word in e.name for word in only)]
    return [replace(e, python=llm_compressor) if e.module == LLM_COMPRESSOR else e for e in found]


class Judge:
    """Makes a row of each result as it comes, the reference's first; of logits one window at a time is in memory.

    ids: int64 [windows, T]. weights: how many were rounded.
    """

    def __init__(self, ids: Tensor, weights: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._ids, self._weights = ids, weights
        self._wanted: Sequence[np.ndarray] | None = None

    def __call__(self, result: Result) -> None:
        """Add the row: the reason alone where the peer failed."""
        if result.name == REFERENCE.name and not result.failed:
            self._wanted = result.outputs
        if result.failed or result.outputs is None or self._wanted is None:
            self.rows.append({"peer": result.name, "failed": result.failed or "the float model has no outputs"})
            return
        assert result.size is not None
        facts = {k: v for k, v in result.facts.items() if k != "seconds"}
        self.rows.append(
            {
                "peer": result.name,
                "bits": 8 * result.size / self._weights,
                "weights_bytes": result.size,
                **self._near(self._wanted, result.outputs),
                "seconds": result.facts.get("seconds"),
                "version": result.version,
                "remarks": "; ".join(f"{key} {value}" for key, value in facts.items()),
            }
        )

    def _near(self, wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> dict[str, float]:
        """Means over windows, which are of one length; kld_error: the standard error, as if tokens were independent."""
        klds, nlls, top1s = [], [], []
        for row, a, b in zip(self._ids, wanted, found, strict=True):
            before, after = torch.from_numpy(a), torch.from_numpy(b)
            klds.append(measure.divergences(before, after))
            nlls.append(float(measure.nll(after[None], row[None]).mean()))
            top1s.append(measure.top1_agreement(before, after))
        each = torch.cat(klds)
        near = {"kld": float(each.mean()), "kld_error": measure.standard_error(each) or 0.0}
        return {**near, "perplexity": measure.exp(fmean(nlls)), "top1": fmean(top1s)}


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


def series(found: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that did not fail by method, in order of bits: a library, of qfx a way of rounding ("qfx gptq")."""
    lines: dict[str, list[dict[str, Any]]] = {}
    good = [row for row in found if not row.get("failed") and row["peer"] != REFERENCE.name]
    for row in sorted(good, key=itemgetter("bits")):
        words = row["peer"].split(" ")
        lines.setdefault(" ".join(words[: 2 if words[0] == "qfx" else 1]), []).append(row)
    return dict(sorted(lines.items(), key=lambda line: (line[0].startswith("qfx"), line[0].lower())))


def plot(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """KL divergence over bits a weight, both logarithmic; a line for each method, those of qfx drawn through."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 6.5))
    lines = series(found)
    count = {own: sum(name.startswith("qfx") == own for name in lines) for own in (False, True)}
    drawn = {False: 0, True: 0}
    for name, rows_ in lines.items():
        own = name.startswith("qfx")
        share = drawn[own] / max(count[own] - 1, 1)
        colour = mpl.colormaps["autumn" if own else "viridis"](0.8 * share)
        style: dict[str, Any] = {"ls": ":", "lw": 1, "ms": 6, "mfc": "none"}
        if own:
            style = {"ls": "-", "lw": 1.8, "ms": 7, "zorder": 3}
        axis.plot([r["bits"] for r in rows_], [r["kld"] for r in rows_], label=name, color=colour,
                  marker=MARKERS[drawn[own] % len(MARKERS)], **style)  # fmt: skip
        drawn[own] += 1
    ticks = [2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9]
    axis.set(xscale="log", yscale="log", xlabel="bits a weight, scales and zero points included",
             ylabel="KL divergence to float32, nats a token")  # fmt: skip
    axis.set_xticks(ticks, [f"{b:g}" for b in ticks])
    axis.minorticks_off()
    axis.grid(visible=True, alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    model: Annotated[str, typer.Option(help="tiny_lm, or the folder of a causal language model.")] = "tiny_lm",
    bits: Annotated[list[int] | None, typer.Option(help="Out of 2 to 8; left out: all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples of 512 tokens.")] = 128,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to judge on.")] = WINDOWS,
    iters: Annotated[int, typer.Option(min=1, help="AutoRound's steps a block.")] = ITERS,
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
    chosen = bits or list(PEERS)
    table.check(chosen, PEERS, "--bits")
    console, where = table.console(), table.place(threads)
    table.say(where)
    with tempfile.TemporaryDirectory() as scratch:
        job = RoundingJob(model, samples, threads, str(folder or scratch), windows, iters)
        judge = Judge(job.evaluation(), sum(m.weight.numel() for m in linears(job.module()).values()))
        with Race(entries(chosen, only or (), llm_compressor), job, job.path, table.say, alone=True, judge=judge):
            found = judge.rows
    console.print(table.shown(found, COLUMNS, f"{model}, {samples} x 512 tokens of calibration"))
    for line in verdicts(found):
        table.say(line)
    table.write(json_file, {"where": where, "model": model, "samples": samples, "rows": found})
    if plot_file is not None:
        plot(plot_file, found)


if __name__ == "__main__":
    typer.run(main)
