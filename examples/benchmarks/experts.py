"""A mixture of experts in ONNX Runtime: com.microsoft QMoE against one product per expert over its rows.

    python examples/benchmarks/experts.py --json numbers.json

A block of Mixtral's structure with random weights is exported twice, its weights in 4-bit groups: as it is lowered, and
with one MatMulNBits per expert. Both run in turns; the quietest round of each counts. SQNR is to the quantized graph
in torch, whose activations are floats.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from qfx.backends.onnx import lower, qmoe
from qfx.backends.onnx.lowering import OnnxLowered
from qfx.capture import capture_export
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from qfx.storage.files import write_text


def block(experts: int, top: int, hidden: int, inner: int) -> torch.nn.Module:
    """A router and its experts."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    config = MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=top)
    config._experts_implementation = "grouped_mm"
    model: torch.nn.Module = MixtralSparseMoeBlock(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def measure(sizes: tuple[int, int, int, int], tokens: int, weights: str, rounds: int) -> dict[str, Any]:
    """Milliseconds and SQNR of both forms for so many tokens."""
    x = torch.randn(1, tokens, sizes[2])
    with torch.no_grad():
        gm = capture_export(block(*sizes), (x,), {}).gm
        prepare(gm)
        rule = {"target": "experts", "w": weights}
        apply_plan(gm, None, Recipe.parse({"name": "experts", "rules": [rule]}))
        reference = gm(x)[0]
        forms = {"qmoe": lower(gm)}
        with mock.patch.object(qmoe, "fits", return_value=False):
            forms["loop"] = lower(gm)
        return {"tokens": tokens, **{name: _timed(form, x, reference, rounds) for name, form in forms.items()}}


def _timed(form: OnnxLowered, x: torch.Tensor, reference: torch.Tensor, rounds: int) -> dict[str, float]:
    noise = (form(x)[0] - reference).square().sum()
    quality = float(10 * torch.log10(reference.square().sum() / noise))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        form(x)
        best = min(best, time.perf_counter() - start)
    return {"ms": 1e3 * best, "sqnr_db": quality}


def main(
    experts: int = 8,
    top: Annotated[int, typer.Option(help="experts of each token")] = 2,
    hidden: int = 512,
    inner: int = 1024,
    weights: Annotated[str, typer.Option(help="format of the experts' weights")] = "i4/g128",
    tokens: Annotated[str, typer.Option(help="numbers of tokens, by commas")] = "1,32,512",
    threads: int = 2,
    rounds: int = 30,
    output: Annotated[Path | None, typer.Option("--json", help="write the numbers there")] = None,
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = [measure((experts, top, hidden, inner), int(n), weights, rounds) for n in tokens.split(",")]
    table = Table("tokens", "QMoE ms", "dB", "loop ms", "dB", title=f"{experts} experts, {top} each, {weights}")
    for row in found:
        pairs = [(row[form]["ms"], row[form]["sqnr_db"]) for form in ("qmoe", "loop")]
        table.add_row(str(row["tokens"]), *[text for ms, db in pairs for text in (f"{ms:.3f}", f"{db:.1f}")])
    Console().print(table)
    if output is not None:
        write_text(output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
