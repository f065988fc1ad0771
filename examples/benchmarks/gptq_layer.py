"""GPTQ of one layer: qfx's time and error against GPTQModel's own class, Hessian included.

    python examples/benchmarks/gptq_layer.py --json numbers.json

Both get the same weight [N, K] and the same inputs [samples, tokens, K], whose channels are correlated and differ in
energy, and round to 4 bits in groups of 128 with the same settings (activation order, static groups, dampening 0.01).
GPTQModel is timed where it can be imported; the error is ||(W - Q) X||^2 / ||W X||^2 over all inputs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

if __name__ == "__main__":  # the repository this file lies in, where qfx is not installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from qfx.format import Format
from qfx.packing import pack_weight
from qfx.passes._hessian import Hessian
from qfx.passes.gptq import round_by
from qfx.rounding.method_options import GptqOptions
from qfx.storage.files import write_text

GROUP = 128


def inputs(samples: int, tokens: int, channels: int) -> list[Tensor]:
    """Inputs [1, tokens, channels] from few hidden directions and noise."""
    torch.manual_seed(0)
    hidden = torch.randn(max(channels // 8, 1), channels)
    energy = torch.logspace(-1, 0.5, channels)[torch.randperm(channels)]
    made = []
    for _ in range(samples):
        base = torch.randn(1, tokens, len(hidden)) @ hidden / len(hidden) ** 0.5
        made.append((base + 0.5 * torch.randn(1, tokens, channels)) * energy)
    return made


def with_qfx(weight: Tensor, data: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The rounded weight as published, without a search of scales or sweeps, and seconds of its parts."""
    started = time.perf_counter()
    seen = Hessian(weight.shape[1])
    for x in data:
        seen.add(x)
    middle = time.perf_counter()
    packed, _ = round_by(weight, [seen], Format.parse(f"u4/g{GROUP}"), GptqOptions(clip=False, sweeps=0), name="layer")
    done = time.perf_counter()
    return packed.dequantize(), {"hessian": middle - started, "rounding": done - middle, "seconds": done - started}


def with_gptqmodel(weight: Tensor, data: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The same by GPTQModel."""
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    settings = {"bits": 4, "group_size": GROUP, "desc_act": True, "static_groups": True, "sym": False}
    config = QuantizeConfig(**settings, damp_percent=0.01)
    started = time.perf_counter()
    with torch.no_grad():
        task = GPTQ(layer, config)
        task.quantizer.configure(perchannel=True)
        for number, x in enumerate(data):
            task.add_batch(x, x, batch_index=number)
        middle = time.perf_counter()
        rounded = task.quantize()[0]
    done = time.perf_counter()
    return rounded, {"hessian": middle - started, "rounding": done - middle, "seconds": done - started}


def error(weight: Tensor, rounded: Tensor, data: list[Tensor]) -> float:
    """||(W - Q) X||^2 / ||W X||^2."""
    noise = signal = 0.0
    for x in data[:16]:
        noise += float((x @ (weight - rounded).T).square().sum())
        signal += float((x @ weight.T).square().sum())
    return noise / signal


def measure(size: int, samples: int, tokens: int, rounds: int) -> dict[str, Any]:
    """The quietest of several rounds, in which both take turns."""
    data = inputs(samples, tokens, size)
    weight = torch.randn(size, size) / size**0.5
    methods = {"qfx": with_qfx}
    if importlib.util.find_spec("gptqmodel") is not None:
        methods["GPTQModel"] = with_gptqmodel
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, method in methods.items():
            rounded, seconds = method(weight, data)
            if name not in found or seconds["seconds"] < found[name]["seconds"]:
                found[name] = {**seconds, "error": error(weight, rounded.to(torch.float32), data)}
    nearest = pack_weight(weight, Format.parse(f"u4/g{GROUP}")).dequantize()
    found["nearest"] = {"seconds": 0.0, "hessian": 0.0, "rounding": 0.0, "error": error(weight, nearest, data)}
    return {"size": size, "samples": samples, "tokens": tokens, "threads": torch.get_num_threads(), "methods": found}


def main(
    size: Annotated[int, typer.Option(help="Rows and columns of the weight.")] = 4096,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = 512,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here too.")] = None,
) -> None:
    """Time GPTQ of one layer."""
    numbers = measure(size, samples, tokens, rounds)
    table = Table("", "Hessian s", "rounding s", "total s", "error")
    for name, row in numbers["methods"].items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in ("hessian", "rounding", "seconds")), f"{row['error']:.3e}")
    Console().print(f"{size} x {size}, {samples} x {tokens} tokens, {numbers['threads']} threads", table)
    if json_file is not None:
        write_text(json_file, json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
