"""Memory of quantizing a model that stays on disk: `qfx.quantize(folder, ...)` and `qfx.save`.

    python examples/benchmarks/stream_memory.py --json numbers.json

A random model of Llama's structure is written in bfloat16 shards, and quantized and saved in a process of its own. A
tiny model goes through the same before, so that everything is imported; from there on the growth of the process is
measured: anonymous memory (what it has made) and pages of files (what it has mapped, which the system can take back at
any time), sampled every 5 ms, and the peak of both as the kernel counts it (VmHWM). The goal is 2.5 x the largest block
(a decoder layer or a table, as stored) plus the activations that are kept between two blocks. `--scaling` measures
models of more and more layers instead: seconds grow with them, the peak by the graph alone. Linux only.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
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
from examples.benchmarks.memory import resident
from qfx.storage import streamed
from qfx.storage.files import write_text
from qfx.storage.spill import give_back

GOAL = 2.5  # times the largest block
LAYERS = (2, 4, 8, 16)  # of --scaling
METHODS = {"rtn": "rtn", "mse": "mse", "gptq": "gptq"}
_STEP = 0.005  # seconds between two samples


def write(folder: Path, layers: int, hidden: int, vocabulary: int) -> None:
    """A random model in bfloat16 shards."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 256, 1),
        tie_word_embeddings=False,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")


class Sampler(threading.Thread):
    """Peaks of this process's memory while it runs, in bytes: anonymous, of files, and of both together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = False
        self.peaks = dict.fromkeys(("anonymous", "files", "both"), 0)

    def run(self) -> None:
        """Sample until `done`."""
        while not self.done:
            anonymous, files = now()
            for name, value in (("anonymous", anonymous), ("files", files), ("both", anonymous + files)):
                self.peaks[name] = max(self.peaks[name], value)
            time.sleep(_STEP)


def now() -> tuple[int, int]:
    """Bytes of anonymous memory and of files' pages in this process."""
    return resident("RssAnon"), resident("RssFile")


def batches(samples: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Random token ids, 4 samples a batch."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (samples, length), generator=random)
    return [{"input_ids": part} for part in ids.split(4)]


def measure(folder: Path, out: Path, method: str, samples: int, length: int) -> dict[str, Any]:
    """Quantize the model of a folder and save it; sizes in bytes, the growth at the peak, seconds."""
    write(out / "tiny", 1, 64, 320)
    work(out / "tiny", out / "tiny-quantized", method, batches(4, 16, 320))
    gc.collect()
    give_back()
    before, sampler = now(), Sampler()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    highest = resident("VmHWM")
    sampler.start()
    started, cpu = time.perf_counter(), time.process_time()
    sizes = work(folder, out / "quantized", method, batches(samples, length, 320))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    sampler.done = True
    sampler.join()
    peaks = sampler.peaks
    return {
        **sizes,
        "anonymous": peaks["anonymous"] - before[0],
        "files": peaks["files"] - before[1],
        "both": peaks["both"] - sum(before),
        "highest": resident("VmHWM") - highest,
        "before": sum(before),
        "seconds": seconds,
        "cpu": cpu,
    }


def work(folder: Path, out: Path, method: str, data: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """What is measured. Sizes in bytes: of the model, of its largest block, of the activations between two blocks."""
    model: Any = streamed.load(folder).model
    blocks = [model.lm_head, model.model.embed_tokens, *model.model.layers]
    tokens = sum(batch["input_ids"].numel() for batch in data)
    sizes = {
        "model": sum(p.nbytes for p in model.parameters()),
        "layer": sum(p.nbytes for p in model.model.layers[0].parameters()),
        "block": max(sum(p.nbytes for p in block.parameters()) for block in blocks),
        "activations": tokens * model.config.hidden_size * 2 if method == "gptq" else 0,
    }
    quantized = qfx.quantize(model, "w4a16", data if method == "gptq" else None, rounding=METHODS[method])
    qfx.save(quantized, out)
    return sizes


def run(stage: str, *options: object) -> dict[str, Any]:
    """The numbers of a stage, from a process of its own."""
    command = [sys.executable, __file__, "--stage", stage, *map(str, options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(
    method: Annotated[list[str], typer.Option(help=", ".join(METHODS))] = ["rtn", "gptq"],  # noqa: B006
    layers: int = 22,
    hidden: int = 2048,
    vocabulary: int = 32000,
    samples: Annotated[int, typer.Option(help="of the calibration set")] = 16,
    length: Annotated[int, typer.Option(help="tokens of a sample")] = 128,
    scaling: Annotated[bool, typer.Option("--scaling", help="memory and seconds over layers")] = False,
    at: Annotated[Path | None, typer.Option(help="folder for the models; left out: one that goes afterwards")] = None,
    stage: Annotated[str, typer.Option(help="of a process of its own: write or measure")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="write the numbers there")] = None,
) -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    torch.set_num_threads(1)
    if stage:
        assert at is not None, "a stage needs its folder"
        found: dict[str, Any] = {}
        if stage == "write":
            write(at / "model", layers, hidden, vocabulary)
        else:
            found = measure(at / "model", at, method[0], samples, length)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows = []
    for count in LAYERS if scaling else (layers,):
        with tempfile.TemporaryDirectory(dir=at) as folder:
            options = ["--at", folder, "--layers", count, "--hidden", hidden, "--vocabulary", vocabulary]
            run("write", *options)
            for one in method:
                found = run("measure", *options, "--samples", samples, "--length", length, "--method", one)
                rows.append({"method": one, "layers": count, **found})
    if output is not None:
        write_text(output, json.dumps(rows, indent=1) + "\n")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the numbers as a table."""
    names = ("model", "layer", "block", "activations", "anonymous", "files", "both", "highest")
    table = Table("method", "layers", *(f"{name} MB" for name in names), "goal MB", "x block", "s", "CPU s")
    for row in rows:
        goal = GOAL * row["block"] + row["activations"]
        ratio = (row["both"] - row["activations"]) / row["block"]
        sizes = [f"{row[name] / 1e6:.0f}" for name in names]
        times = (f"{row['seconds']:.1f}", f"{row['cpu']:.1f}")
        table.add_row(row["method"], str(row["layers"]), *sizes, f"{goal / 1e6:.0f}", f"{ratio:.2f}", *times)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
