"""What a mix of formats over the heads of an attention costs to run, as they stand and put in order.

    python examples/benchmarks/head_order.py --json numbers.json

The projections of one attention, some heads in 8 bits and the others in 4, drawn by a seed. Four forms of them:
everything in 4 bits, everything in 8 bits, the mix with heads as they stand, and the mix after `permute-heads`. The
graph of the reference backend and the file for ONNX Runtime tell how many calls there are; then the forms take turns in
one process, a single token and a whole prompt each. Times are medians, relative to 4 bits for everything.
"""

from __future__ import annotations

import functools
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import typer
from torch import Tensor, nn

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.head_order` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.peers import table
from examples.benchmarks.peers.turns import in_turn
from qfx import Recipe, Rule, graph
from qfx.capture import capture_export
from qfx.pipeline import apply_plan, prepare
from qfx.storage.files import write_text

HIGH, LOW = "i8/g32", "u4/g32"
FORMS = ("4 bits", "8 bits", "mix", "mix in order")
PARTS = ("Slice", "Concat", "Split", "Gather", "slice", "cat", "index_select")
COLUMNS = {
    "products": "products", "parts": "cuts and joins", "file_products": "products in the file",
    "file_parts": "cuts and joins in the file", "kilobytes": "kB", "token": "one token", "prompt": "prompt",
}  # fmt: skip


class Attention(nn.Module):
    """The projections of one attention with grouped heads, and the attention itself."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head_dim, wide = head_dim, heads * head_dim
        self.q_proj, self.o_proj = (nn.Linear(wide, wide, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(wide, kv_heads * head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        split = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in split)
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(z.transpose(1, 2).flatten(2))
        return out


def recipe(form: str, heads: int, kv_heads: int, share: float, seed: int) -> Recipe:
    """The formats of the projections in one of FORMS; `share` of the KV heads, and all that read them, have 8 bits."""
    rng = random.Random(seed)
    high = set(rng.sample(range(kv_heads), round(share * kv_heads)))
    if not form.startswith("mix"):
        high = set(range(kv_heads)) if form == "8 bits" else set()
    kv = [HIGH if head in high else LOW for head in range(kv_heads)]
    query = [kv[head * kv_heads // heads] for head in range(heads)]
    rules = [Rule(target=f"{name}_proj", w=w) for name, w in (("q", query), ("k", kv), ("v", kv))]
    ordered = ("permute-heads",) if form == "mix in order" else ()
    return Recipe(name=form, rules=(*rules, Rule(target="o_proj", w=query, along="columns")), rewrites=ordered)


def calls(model: nn.Module, x: Tensor, asked: Recipe) -> Counter[str]:
    """How often each operator is called in the graph of the reference backend."""
    captured = capture_export(model, (x,), {})
    prepare(captured.gm)
    assert apply_plan(captured.gm, None, asked) == []
    return Counter(graph.op_name(n) for n in captured.gm.graph.nodes if n.op == "call_function")


def session(path: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(one: Any, x: np.ndarray[Any, Any]) -> None:
    one.run(None, {one.get_inputs()[0].name: x})


def run(
    sizes: tuple[int, int, int], share: float, prompt: int, rounds: int, threads: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """A row for each form. sizes: query heads, KV heads, channels of a head."""
    heads, kv_heads, head_dim = sizes
    model, x = Attention(heads, kv_heads, head_dim).eval(), torch.randn(2, prompt, heads * head_dim)
    rows: list[dict[str, Any]] = []
    sessions = {}
    for form in FORMS:
        asked = recipe(form, heads, kv_heads, share, seed)
        path = folder / f"{form.replace(' ', '_')}.onnx"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*float activations were asked", qfx.QfxWarning)
            qfx.export_onnx(model, (x,), path, recipe=asked)
        found = calls(model, x, asked)
        nodes = Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node)
        sessions[form] = session(path, threads)
        rows.append({
            "peer": form, "products": found["linear"], "parts": sum(found[name] for name in PARTS),
            "file_products": nodes["MatMulNBits"], "file_parts": sum(nodes[name] for name in PARTS),
            "kilobytes": sum(f.stat().st_size for f in folder.glob(f"{path.stem}.onnx*")) / 1000,
        })  # fmt: skip
    for part, tokens in (("token", x[:1, :1]), ("prompt", x[:1])):
        given = tokens.numpy()
        runs = {form: functools.partial(_run, one, given) for form, one in sessions.items()}
        seconds = in_turn(runs, rounds, 200 if part == "token" else 5)
        for row in rows:
            row[part] = seconds[row["peer"]] / seconds[FORMS[0]]
    return rows


def main(
    heads: Annotated[int, typer.Option(min=1)] = 16,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=32, help="A multiple of 32.")] = 64,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the KV heads that have 8 bits.")] = 0.5,
    prompt: Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Draws the heads that have 8 bits.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Count the calls of each form, time them, and print a table."""
    console = table.console()
    with tempfile.TemporaryDirectory() as folder:
        rows = run((heads, kv_heads, head_dim), share, prompt, rounds, threads, seed, Path(folder))
    title = f"{heads} query and {kv_heads} KV heads of {head_dim}; times relative to 4 bits for everything"
    console.print(table.shown(rows, COLUMNS, title))
    if json_file is not None:
        write_text(json_file, json.dumps({"where": table.place(threads), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
