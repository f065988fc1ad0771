"""What attention of rounded operands loses and costs, format by format.

    python examples/benchmarks/attention_formats.py --json numbers.json

Normal random q, k and v; then the same with one channel of the keys far from zero, as trained models have it, and with
such keys rounded as they are instead of centred over the tokens. SQNR of the result, 6 dB a bit. Then the forms take
turns in ONNX Runtime, over a causal prompt and for a single query over as many keys. Times are medians, relative to
those of f32.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

if __name__ == "__main__":  # import the sibling files as `python -m examples.benchmarks.attention_formats` does
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from examples.benchmarks.peers import table
from examples.benchmarks.peers.turns import in_turn
from qfx import Format
from qfx.backends import onnx
from qfx.capture import capture_export
from qfx.measuring.measure import sqnr_db
from qfx.numerics import fake_quantize
from qfx.storage.files import write_text

FORMS = (
    "", "q=i8/tok k=i8/tok", "k=i8/tok v=i8/tok", "q=i8/tok k=i8/tok v=i8/head/dyn p=u8/tok",
    "q=i8/dyn k=i8/dyn v=i8/dyn p=u8", "q=f8e4m3/tok k=f8e4m3/tok v=f8e4m3/tok p=f8e4m3/tok",
)  # fmt: skip
COLUMNS = {
    "random": "random dB", "outlier": "outlier channel dB", "as_it_is": "not centred dB", "prompt": "prompt",
    "token": "one query",
}  # fmt: skip
FAR = 50.0  # where the mean of a channel of the keys lies
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(formats: str, *, causal: bool = False) -> Call:
    """Attention between operands of these formats: "k=i8/tok v=i8/tok"; "" for floats."""
    given = dict(word.split("=") for word in formats.split())
    texts = [given.get(role, "") for role in "qkvp"]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rest = (q.shape[-1] ** -0.5, causal, 0.0)
        y: Tensor = torch.ops.qfx.quantized_attention(q, k, v, None, None, [], [], [], [], [], [], *rest, *texts)
        return y

    return call


def as_it_is(formats: str) -> Call:
    """The same, its keys rounded without taking off their mean."""
    words = dict(word.split("=") for word in formats.split())
    key = words.pop("k", "f32")
    call = attention(" ".join(f"{role}={fmt}" for role, fmt in words.items()))
    return lambda q, k, v: call(q, fake_quantize(k, Format.parse(key), activation=True), v)


class Module(nn.Module):
    """A call as a module."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.call(q, k, v)


def measured(forms: dict[str, Call], given: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Seconds of one call in ONNX Runtime, the median over rounds in which all take turns."""
    graphs = {name: capture_export(Module(call), given, {}, dynamic=False).gm for name, call in forms.items()}
    lowered = {name: onnx.lower(gm, strict=True) for name, gm in graphs.items()}
    return in_turn({name: functools.partial(one, *given) for name, one in lowered.items()}, rounds)


def run(heads: int, kv_heads: int, head_dim: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each of FORMS."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, tokens, head_dim, generator=generator) for h in (heads, kv_heads, kv_heads))
    far = k.clone()
    far[..., 3] += FAR
    exact = {"random": attention("")(q, k, v), "outlier": attention("")(q, far, v)}
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        row: dict[str, Any] = {"peer": form or "f32"}
        if form:
            call = attention(form)
            row["random"] = sqnr_db(exact["random"], call(q, k, v))
            row["outlier"] = sqnr_db(exact["outlier"], call(q, far, v))
            row["as_it_is"] = sqnr_db(exact["outlier"], as_it_is(form)(q, far, v))
        rows.append(row)
    for part, queries in (("prompt", q), ("token", q[:, :, -1:].contiguous())):
        forms = {form: attention(form, causal=part == "prompt") for form in FORMS}
        seconds = measured(forms, (queries, k, v), rounds)
        for row, form in zip(rows, FORMS, strict=True):
            row[part] = seconds[form] / seconds[FORMS[0]]
    return rows


def main(
    heads: Annotated[int, typer.Option(min=1)] = 8,
    kv_heads: Annotated[int, typer.Option(min=1)] = 2,
    head_dim: Annotated[int, typer.Option(min=4)] = 64,
    tokens: Annotated[int, typer.Option(min=2)] = 1024,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Measure the error of each form, time them, and print a table."""
    rows = run(heads, kv_heads, head_dim, tokens, rounds)
    title = f"{heads} query and {kv_heads} KV heads of {head_dim}, {tokens} tokens; times relative to f32"
    table.console().print(table.shown(rows, COLUMNS, title))
    if json_file is not None:
        where = table.place(torch.get_num_threads())
        write_text(json_file, json.dumps({"where": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
