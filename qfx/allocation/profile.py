"""A measured profile of this CPU: how fast it reads memory, and how fast qfx's own exports run on it.

Products are timed as ONNX Runtime computes what `qfx.export_onnx` writes, so that the rate of `w4` is that of the
kernel which serves 4-bit weights here, packing and rounding of inputs included:

    seconds of a linear = (a chain of LONG linears - a chain of SHORT ones) / (LONG - SHORT)

In the same way two small decoders, of few layers and of more, tell what a call costs beside its work, and attention.
Each time is the least of several, taken in turn for both chains: other work on the machine only ever adds time.
"""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import qfx.onnx
from qfx import processor
from qfx.allocation.costs import Costs
from qfx.allocation.devices import Curve, Device, between
from qfx.allocation.model_costs import costs_of
from qfx.allocation.sizes import numbers
from qfx.errors import QfxWarning, explain
from qfx.export import export_onnx
from qfx.plan import versions
from qfx.storage.spill import give_back

KERNELS: Mapping[str, str | None] = {
    "f32": None,
    "w2": "w2a16",
    "w4": "w4a16",
    "w8": "w8a16",
    "w8a8": "w8a8",
}  # recipes
ROWS = (1, 4, 16, 64, 256)
SIZES = tuple(1 << power for power in (18, 20, 22, 24, 26, 28))  # bytes that are read over and over
WIDTHS = (2, 4, 8)  # bits in which ONNX Runtime's kernels hold codes
_SHORT, _LONG = 2, 8
_LAYERS = (2, 6)  # of the decoders that tell what attention and starting a call cost
_TOKENS, _CONTEXT = (1, 64, 256, 512), 1024  # new tokens of attention, and cached ones behind which one token comes


@dataclass(frozen=True)
class Effort:
    """What is measured. width: of the linears, a multiple of 128; seconds: for each time that is taken, about."""

    width: int = 768
    rows: tuple[int, ...] = ROWS
    sizes: tuple[int, ...] = SIZES
    seconds: float = 0.3

    def __post_init__(self) -> None:
        if self.width < 128 or self.width % 128:
            raise ValueError(f"width must be a multiple of 128, found {self.width}")
        if not self.rows or not self.sizes or min(*self.rows, *self.sizes, 1) < 1 or self.seconds <= 0:
            raise ValueError(f"rows and sizes are positive and not empty, and so are the seconds, found {self}")


def measure(
    *, threads: int | None = None, name: str | None = None, effort: Effort | None = None,
    told: Callable[[str], object] = lambda what: None,
) -> Device:  # fmt: skip
    """This CPU as a device. threads: of each session; None is torch's number. told: called with what is measured next.

    About half a minute; nothing else should run. Raises ValueError for threads below 1.
    """
    count = torch.get_num_threads() if threads is None else threads
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"threads must be 1 or more, found {threads!r}")
    how = effort or Effort()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        told("memory bandwidth")
        bandwidth = tuple((size, _bandwidth(size, how.seconds)) for size in sorted(how.sizes))
        rates = {}
        for kernel, recipe in KERNELS.items():
            told(f"products, {kernel}")
            rates[kernel] = _linears(recipe, how, count)
        told("products, bf16")
        rates["bf16"] = tuple((rows, _halves(rows, how)) for rows in sorted(how.rows))
        told("time to start a call")
        overhead = _overhead(count, how.seconds)
        told("attention")
        rates["attention"] = _attention(how, rates["f32"], overhead, count)
    finally:
        torch.set_num_threads(before)
    return Device(
        name=name or f"{_cpu()}, {count} thread{'s' if count > 1 else ''}",
        memory=_memory(),
        bandwidth=bandwidth,
        rates=rates,
        dtype="f32",
        overhead=overhead,
        widths=WIDTHS,
        source="measured by qfx profile",
        measured=True,
        facts={"threads": count, "instruction_sets": processor.instruction_sets(), "versions": versions()},
    )


def _bandwidth(size: int, seconds: float) -> float:
    """bytes/s at which a product with a vector reads a matrix of so many bytes."""
    matrix = torch.ones(max(1, size // 4096), 1024)
    vector, out = torch.ones(1024), torch.empty(len(matrix))
    return matrix.nbytes / _least([lambda: torch.mv(matrix, vector, out=out)], seconds)[0]


def _linears(recipe: str | None, how: Effort, threads: int) -> Curve:
    """Operations/s of a linear under a recipe, by rows."""
    with _seeded():
        linears = [nn.Linear(how.width, how.width, bias=False) for _ in range(_LONG)]
    chains = [nn.Sequential(*linears[:count]) for count in (_SHORT, _LONG)]
    with TemporaryDirectory() as folder:
        x, at = torch.ones(2, how.width), Path(folder)
        runs = [_session(chain, x, at / f"{len(chain)}.onnx", recipe, threads) for chain in chains]
        found = []
        for rows in sorted(how.rows):
            x = torch.linspace(-1, 1, rows * how.width).reshape(rows, how.width)
            short, long = _least([_with(run, x) for run in runs], how.seconds)
            each = max(long - short, 0.02 * long) / (_LONG - _SHORT)
            found.append((rows, 2 * rows * how.width**2 / each))
    give_back()
    return tuple(found)


def _overhead(threads: int, seconds: float) -> float:
    """Seconds of one call beyond its work: of a decoder's that is too small to have any, by its number of layers."""
    config = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    with TemporaryDirectory() as folder:
        made = [_decoder(layers, config, Path(folder), threads) for layers in _LAYERS]
        few, many = _least([_next_token(model, 8) for model, _ in made], seconds)
    count = [sum(node.kind != "view" for node in costs.nodes) for _, costs in made]
    return max(many - few, 0.0) / (count[1] - count[0])


def _attention(how: Effort, linear: Curve, overhead: float, threads: int) -> Curve:
    """Operations/s of attention in a decoder, by the number of new tokens; one token has a long cache behind it."""
    config = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 8, "head_dim": 64}
    with TemporaryDirectory() as folder:
        made = [_decoder(layers, config, Path(folder), threads) for layers in _LAYERS]
        found = []
        for tokens in _TOKENS:
            prompt = torch.ones(1, tokens, dtype=torch.int64)
            context = _CONTEXT if tokens == 1 else 0
            works = [_next_token(m, context) if context else _with(m, prompt) for m, _ in made]
            few, many = _least(works, how.seconds)
            sums = [_work(costs, tokens, context) for _, costs in made]
            inside, beside, calls = (after - before for before, after in zip(*sums, strict=True))
            each = many - few - calls * overhead - 2 * beside / between(linear, tokens)
            found.append((tokens, 2 * inside / max(each, 0.1 * (many - few), 1e-9)))
    return tuple(found)


def _work(costs: Costs, tokens: int, context: int) -> tuple[float, float, int]:
    """Multiply-accumulates of attention and of all else, and the number of calls."""
    given = {"batch": 1, "sequence": tokens, "context": context}
    macs = numbers([node.macs for node in costs.nodes], given)
    inside = sum(n for n, node in zip(macs, costs.nodes, strict=True) if node.kind == "attention")
    return inside, sum(macs) - inside, sum(node.kind != "view" for node in costs.nodes)


def _decoder(layers: int, config: Mapping[str, int], folder: Path, threads: int) -> tuple[Any, Costs]:
    """A small decoder of Llama's structure as it is exported, and its costs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with _seeded():
        model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=32, num_hidden_layers=layers)).eval()
    path = folder / f"{layers}-{config['hidden_size']}"
    export_onnx(model, None, path)
    model.config.save_pretrained(path)
    return qfx.onnx.load(path, threads=threads), costs_of(model)


def _next_token(model: Any, context: int) -> Callable[[], object]:
    """One more token behind so many cached ones, again and again."""
    cache = model(torch.ones(1, context, dtype=torch.int64)).past_key_values
    token = torch.ones(1, 1, dtype=torch.int64)

    def work() -> None:
        cache.crop(context)
        model(token, past_key_values=cache)

    return work


@contextmanager
def _seeded() -> Iterator[None]:
    """Always the same random numbers; none of the caller's is used up."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


def _session(model: nn.Module, x: Tensor, path: Path, recipe: str | None, threads: int) -> Callable[[Tensor], object]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)  # about the roundings of kernels, which are no news here
        export_onnx(model.eval(), x, path, recipe=recipe)
    loaded: Any = qfx.onnx.load(path, threads=threads)
    (name,) = loaded.inputs
    return lambda value: loaded(**{name: value})


def _with(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def _halves(rows: int, how: Effort) -> float:
    """Operations/s of torch's product in bf16."""
    x, w = (torch.ones(size, how.width, dtype=torch.bfloat16) for size in (rows, how.width))
    return 2 * rows * how.width**2 / _least([lambda: torch.mm(x, w)], how.seconds)[0]


def _least(works: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """The least time of each, in turn until they took `seconds` in all, five times at least."""
    for work in works:
        work()
    best = [math.inf] * len(works)
    stop, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < stop:
        rounds += 1
        for i, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


def _cpu() -> str:
    """What the processor is called."""
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def _memory() -> int:
    """Bytes of memory of this machine."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(
            explain("this system does not tell how much memory it has", next_step="give memory= in the profile's file")
        ) from error
