"""Whole models on this GPU: tokens one by one in w4a16, prompts in w8a8, beside torch.compile in bf16.

    python examples/benchmarks/gpu_models.py --json numbers.json
    python examples/benchmarks/gpu_models.py --model llama-1b --layers 4
    TRITON_INTERPRET=1 python examples/benchmarks/gpu_models.py --check       without a GPU: a tiny model's results

A decoder of Llama's structure with random weights is made on the device. Decoding: batch 1, a static cache of 1,024
places of which 256 are filled; both models are compiled with CUDA graphs (mode "reduce-overhead"); time on the host of
64 steps, each of which feeds its token to the next. Prompts: 2,048 tokens in one call, no cache. Every linear layer has
the recipe's formats; with --early both are measured once more with kernels that are launched before the one before them
has ended (Inductor's setting triton.enable_pdl), with --launched decoding also without CUDA graphs. What a compiled
quantized model gives is compared with its reference arithmetic, then timed. Exit code 1 where a result is wrong, 2
without a GPU.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor

if __name__ == "__main__":  # the package beside this file, installed or not
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import qfx
from examples.benchmarks.gpu_kernels import place
from qfx.backends.triton import timing
from qfx.compile import backend
from qfx.format import Format
from qfx.live.modules import QuantLinear
from qfx.packing import pack_weight
from qfx.storage.files import write_text

MODELS = {  # layers, hidden size, its inner size, heads, heads of keys and values, rows of the tables
    "llama-2-7b": (32, 4096, 11008, 32, 32, 32000),
    "llama-1b": (16, 2048, 8192, 32, 8, 128256),
    "tiny": (1, 32, 48, 4, 2, 40),
}
RECIPES = {"w4a16": ("", "u4/g128/f16"), "w8a8": ("i8/tok", "i8/ch")}
GOALS = {"decode": ("w4a16", 2.5), "prefill": ("w8a8", 1.5)}
PLACES, FILLED, STEPS, PROMPT = 1024, 256, 64, 2048
_LAUNCHED = ", no CUDA graphs"
WRONG = 0.1  # relative error of logits: rounding of bf16 and of activations adds up over the layers


@dataclass(frozen=True)
class Sizes:
    """places: of the static cache, of which `filled` are. steps: that are timed. prompt: tokens of a prompt.

    before: steps whose results are compared: a graph of CUDA is captured at the second, and replayed from the third on.
    """

    places: int = PLACES
    filled: int = FILLED
    steps: int = STEPS
    prompt: int = PROMPT
    before: int = 5


def made(name: str, layers: int | None, where: torch.device, dtype: torch.dtype) -> Any:
    """A random decoder on the device, in eval mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    count, hidden, inner, heads, groups, rows = MODELS[name]
    config = LlamaConfig(
        vocab_size=rows, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers or count,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    with where:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(requires_grad=False)


def quantized(model: nn.Module, recipe: str, dtype: torch.dtype) -> Any:
    """The model with every linear layer packed in the formats of a recipe, where it is; one by one."""
    x_format, w_format = RECIPES[recipe]
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                packed = pack_weight(layer.weight.float(), Format.parse(w_format))
                setattr(parent, name, QuantLinear(packed, layer.bias, x_format=x_format, dtype=dtype).eval())
    return model


class Decoding:
    """Steps of a model with a static cache. run: what is called in the place of the model."""

    def __init__(self, model: Any, run: Callable[..., Any], sizes: Sizes) -> None:
        from transformers import StaticCache

        where = next(itertools.chain(model.parameters(), model.buffers())).device
        self.run, self.sizes = run, sizes
        self.cache = StaticCache(config=model.config, max_cache_len=sizes.places)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(model.config.vocab_size, (1, sizes.filled), generator=generator).to(where)
        model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = ids[:, -1:].clone()
        self.at = torch.full((1, 1), sizes.filled, device=where)

    def step(self) -> Tensor:
        """Logits [1, V] behind one more token; the most likely one becomes the next input."""
        if self.token.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        found = self.run(input_ids=self.token, position_ids=self.at, past_key_values=self.cache, use_cache=True)
        logits: Tensor = found.logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        self.at.add_(1)
        return logits

    def first(self) -> Tensor:
        """Logits [steps, V] of the first steps, whose inputs are always the same tokens."""
        found = []
        for i in range(self.sizes.before):
            self.token.fill_(7 * i + 1)
            found.append(self.step().clone())
        return torch.cat(found)

    def seconds(self) -> float:
        """Of a step, after those that compile and capture."""
        return _wall(self.step, self.sizes.steps)


def _wall(call: Callable[[], object], count: int) -> float:
    """Seconds of one of `count` calls in a row, on the host's clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


class Prompt:
    """Prompts that a model reads. run: what is called in the place of the model."""

    def __init__(self, model: Any, run: Callable[..., Any], sizes: Sizes) -> None:
        where = next(itertools.chain(model.parameters(), model.buffers())).device
        self.run, self.sizes = run, sizes
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(model.config.vocab_size, (1, sizes.prompt), generator=generator).to(where)

    def step(self) -> Tensor:
        """Logits [1, V] behind the prompt."""
        logits: Tensor = self.run(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits

    def first(self) -> Tensor:
        """The same, of a call that compiles."""
        return self.step().clone()

    def seconds(self) -> float:
        """Of a prompt."""
        self.step()
        return _wall(self.step, 10 if self.ids.device.type == "cuda" else 1)


def compiled(model: Any, *, own: bool, graphs: bool) -> Callable[..., Any]:
    """The model by qfx, or by torch's compiler."""
    on_gpu = next(itertools.chain(model.parameters(), model.buffers())).device.type == "cuda"
    how: dict[str, Any] = {"mode": "reduce-overhead"} if graphs and on_gpu else {}
    if own:
        how["backend"] = backend
        if not on_gpu:
            how["options"] = {"backend": "triton", "cache": False}
    elif not on_gpu:
        how = {"backend": "eager"}
    found: Callable[..., Any] = torch.compile(model, fullgraph=True, dynamic=False, **how)
    return found


def measured(model: Any, phase: str, sizes: Sizes, *, own: bool, graphs: bool) -> dict[str, Any]:
    """Seconds of a step or of a prompt; of a quantized model also the error against its reference, and its kernels."""
    torch._dynamo.reset()
    run = compiled(model, own=own, graphs=graphs)
    make = Decoding if phase == "decode" else Prompt
    started = time.perf_counter()
    timed = make(model, run, sizes)
    found = timed.first()
    row: dict[str, Any] = {"first": time.perf_counter() - started}
    if own:
        row["error"] = timing.relative_error(found, make(model, model, sizes).first())
        row["kernels"] = counted(model)
    row["seconds"] = timed.seconds()
    return row


def counted(model: nn.Module) -> dict[str, int]:
    """How many nodes of the compiled model run by each kernel."""
    found: dict[str, int] = {}
    for row in qfx.report(model).rows:
        found[row.kernel] = found.get(row.kernel, 0) + 1
    return found


def ways_of(phase: str, *, early: bool, launched: bool) -> dict[str, tuple[bool, bool]]:
    """How a phase is measured, by a name: (with early launches, with CUDA graphs)."""
    decodes = phase == "decode"
    ways = {"": (False, decodes)}
    if early:
        ways[", early launches"] = (True, decodes)
    if launched and decodes:
        ways[_LAUNCHED] = (False, False)
    return ways


def rows_of(
    name: str, layers: int | None, phases: list[str], where: torch.device, sizes: Sizes, *, early: bool = False,
    launched: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The float model's times, then the quantized one's, of each phase, in all of its ways."""
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    for phase in phases:
        recipe, goal = GOALS[phase]
        model = made(name, layers, where, dtype)
        seconds: dict[str, float] = {}
        for own in (False, True):
            model = quantized(model, recipe, dtype) if own else model
            for way, (soon, graphs) in ways_of(phase, early=early, launched=launched).items():
                with torch.no_grad(), inductor.patch({"triton.enable_pdl": soon}):
                    row = measured(model, phase, sizes, own=own, graphs=graphs)
                row["by"] = f"qfx {recipe}{way}" if own else f"torch.compile {str(dtype)[6:]}{way}"
                if own:
                    row["ratio"] = seconds[way] / row["seconds"]
                    if way != _LAUNCHED:
                        row["goal"] = goal
                else:
                    seconds[way] = row["seconds"]
                yield {"model": name, "phase": phase, **row}
        del model
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """The table, the kernels, the goals."""
    table = Table("model", "phase", "by", "ms", "first call s", "error", "times faster")
    for row in rows:
        error, ratio = row.get("error"), row.get("ratio")
        table.add_row(row["model"], row["phase"], row["by"], f"{row['seconds'] * 1e3:.3f}", f"{row['first']:.0f}",
                      "" if error is None else f"{error:.1e}", "" if ratio is None else f"{ratio:.2f}")  # fmt: skip
    console.print(table)
    for row in rows:
        if "kernels" in row:
            shown = ", ".join(f"{count} x {kernel}" for kernel, count in row["kernels"].items())
            console.print(f"{row['model']} {row['phase']} {row['by']}: {shown}", soft_wrap=True, markup=False)
    for row in rows:
        if "goal" in row:
            state = "reached" if row["ratio"] >= row["goal"] else "missed"
            what = f"{row['model']} {row['phase']}, {row['by']}: times torch.compile"
            console.print(
                f"goal: {what} >= {row['goal']:g}: {row['ratio']:.3f}, {state}", markup=False, highlight=False
            )


def profiled(name: str, layers: int | None, phase: str, where: torch.device, sizes: Sizes) -> str:
    """Which kernels the time of a quantized model goes to, as torch's profiler tells."""
    from torch.profiler import ProfilerActivity, profile

    recipe, _ = GOALS[phase]
    model = quantized(made(name, layers, where, torch.bfloat16), recipe, torch.bfloat16)
    with torch.no_grad():
        torch._dynamo.reset()
        run = compiled(model, own=True, graphs=phase == "decode")
        call = (Decoding if phase == "decode" else Prompt)(model, run, sizes).step
        for _ in range(5):
            call()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Out of {', '.join(MODELS)}; left out: llama-2-7b.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="decode or prefill; left out: both.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Left out: as many as the model has.")] = None,
    check: Annotated[bool, typer.Option("--check", help="A tiny model's results, also without a GPU.")] = False,
    early: Annotated[
        bool, typer.Option("--early", help="Also with launches before the kernel before has ended.")
    ] = False,
    launched: Annotated[bool, typer.Option("--launched", help="Decoding also without CUDA graphs.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Show the kernels that the time goes to instead.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file too.")] = None,
) -> None:
    """Measure, print."""
    for asked, known in ((model, MODELS), (only, GOALS)):
        if unknown := set(asked or ()) - set(known):
            raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(known)}")
    where = place(check)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    console = Console(width=150)
    sizes = Sizes(32, 8, 1, 12, 2) if check else Sizes()
    names, phases = ["tiny"] if check else model or ["llama-2-7b"], only or list(GOALS)
    if profile:
        for name, phase in itertools.product(names, phases):
            print(profiled(name, layers, phase, where, sizes))
        return
    rows: list[dict[str, Any]] = []
    folder = os.environ.get("OUT")
    path = json_file or (Path(folder) / "gpu_models.json" if folder else None)
    try:
        for name in names:
            for row in rows_of(name, layers, phases, where, sizes, early=early, launched=launched):
                rows.append(row)
                if path is not None:  # one after the other: the process may be ended before the last
                    write_text(path, json.dumps(rows, indent=1) + "\n")
    finally:  # what was measured before one fails, too
        show(console, rows)
    wrong = [row for row in rows if not row.get("error", 0.0) <= WRONG]
    if wrong:
        console.print(f"{len(wrong)} wrong: a relative error of more than {WRONG}", style="red")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
