"""What `qfx.quantize` costs: memory beside the model's own, and the time of the passes as the model grows.

    python examples/benchmarks/quantize_cost.py --json numbers.json

Memory: a random model of Llama's structure (8 layers, hidden size 1024) is quantized in a process of its own; the peak
is compared with what the model takes and with its largest layer. Time: the same structure with 4 to 32 small layers;
seconds of this process from the captured graph to the quantized one (normalization, annotation, packing), without the
session of ONNX Runtime, and beside it those of the capture, which is torch.export's tracing for the most part.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.memory import resident
from qfx.capture import capture_export
from qfx.inputs import example_inputs
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from qfx.storage.files import write_text

LAYERS = (4, 8, 16, 32)


def llama(layers: int, hidden: int, vocabulary: int) -> nn.Module:
    """A random model of Llama's structure in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        tie_word_embeddings=False,
    )
    model: nn.Module = LlamaForCausalLM(config).eval()
    return model


def memory(layers: int, hidden: int, vocabulary: int, recipe: str) -> dict[str, Any]:
    """Bytes of the model, of its largest layer, and by how much the process grew at the peak while it was quantized."""
    qfx.quantize(llama(1, 64, 128), recipe)  # everything is imported
    model = llama(layers, hidden, vocabulary)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    gc.collect()
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    start = time.perf_counter()
    qfx.quantize(model, recipe)
    seconds = time.perf_counter() - start
    after = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    grown = resident("VmHWM") - before
    return {"model": sum(sizes), "largest": max(sizes), "grown": grown, "quantized": after, "seconds": seconds}


def timing(layers: int) -> dict[str, Any]:
    """Seconds (of this process) for a small model of so many layers, by stage, and the number of its nodes."""
    model = llama(layers, 64, 128)
    recipe = Recipe.parse("w8a8")
    with torch.no_grad():
        marks = [time.process_time()]
        captured = capture_export(model, (), example_inputs(model))
        nodes = len(captured.gm.graph.nodes)
        marks.append(time.process_time())
        prepare(captured.gm)
        marks.append(time.process_time())
        apply_plan(captured.gm, None, recipe)
        marks.append(time.process_time())
    names = ("capture", "normalize", "quantize")
    return {
        "layers": layers,
        "nodes": nodes,
        **dict(zip(names, (b - a for a, b in pairwise(marks)), strict=True)),
    }


def main(
    layers: Annotated[int, typer.Option(help="layers of the model whose memory is measured")] = 8,
    hidden: Annotated[int, typer.Option(help="its hidden size")] = 1024,
    vocabulary: Annotated[int, typer.Option(help="rows of its tables")] = 32000,
    recipe: str = "w8a8",
    only: Annotated[str, typer.Option(help="memory or time; empty for both")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="write the numbers there")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    if only == "memory":
        found["memory"] = memory(layers, hidden, vocabulary, recipe)
    elif not only:
        sizes = ["--layers", str(layers), "--hidden", str(hidden), "--vocabulary", str(vocabulary), "--recipe", recipe]
        command = [sys.executable, __file__, "--only", "memory", *sizes, "--json", "/dev/stdout"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found["memory"] = json.loads(text[text.index("{") :])["memory"]
    if only in ("", "time"):
        timing(1)  # everything is imported
        found["time"] = [timing(n) for n in LAYERS]
    if output is not None:
        if output.is_char_device() or output.is_fifo():
            output.write_text(json.dumps(found), encoding="utf-8")
        else:
            write_text(output, json.dumps(found, indent=1) + "\n")
        return
    show(found)


def show(found: dict[str, Any]) -> None:
    """Print the numbers as text and a table."""
    console = Console()
    if "memory" in found:
        m = {key: value / 2**20 for key, value in found["memory"].items() if key != "seconds"}
        console.print(
            f"memory: model {m['model']:.0f} MiB, quantized {m['quantized']:.0f} MiB in "
            f"{found['memory']['seconds']:.1f} s; grew by {m['grown']:.0f} MiB at the peak, "
            f"{m['grown'] / m['largest']:.2f} of the largest layer ({m['largest']:.0f} MiB)"
        )
    if "time" in found:
        table = Table("layers", "nodes", "capture s", "normalize s", "quantize s", "s per 1,000 nodes without capture")
        for row in found["time"]:
            ours = row["normalize"] + row["quantize"]
            cells = (f"{row[name]:.2f}" for name in ("capture", "normalize", "quantize"))
            table.add_row(str(row["layers"]), str(row["nodes"]), *cells, f"{1000 * ours / row['nodes']:.2f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
