"""Recipes beside each other on one model in one run: size, accuracy, latency, memory. Every number is measured.

found = compare_recipes(model, ["w8a8", "w4a16-gptq"], evaluation, data=calibration)
found.to_json()
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from qfx import data as batches
from qfx.data import Call
from qfx.errors import UnsupportedError, first_line
from qfx.hf.hub import is_causal_lm
from qfx.inputs import example_inputs
from qfx.measuring import compare
from qfx.measuring.compare import Accuracy, Latency
from qfx.quantize import evaluating, quantize
from qfx.recipe import Recipe
from qfx.save import save
from qfx.storage.files import json_text, write_text

FLOAT = "float"
Metric = Callable[[Callable[..., Any], Sequence[Call]], float]
Budget = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One recipe; the first row is the float model.

    nbytes: of all parameters and buffers as they are held. compression: of a model in 16 bits to that. bits: 8 nbytes
    over the number of the model's parameters. seconds: that quantizing took. latency: of one call on the first batch.
    speed: the float model's median over its own, both timed in the same turns. memory: peak of a process that loads and
    calls it, in bytes. metric: of the user's. failed: why it has no numbers.
    """

    recipe: str
    nbytes: int | None = None
    compression: float | None = None
    bits: float | None = None
    seconds: float | None = None
    latency: Latency | None = None
    memory: int | None = None
    accuracy: Accuracy | None = None
    metric: float | None = None
    failed: str = ""
    speed: float | None = None


@dataclass(frozen=True)
class Matrix:
    """The rows, with what they were measured on: the shape of the first batch, number of batches, float baseline."""

    rows: tuple[Row, ...]
    shape: tuple[int, ...]
    batches: int
    baseline: str
    metric: str = ""

    def to_json(self) -> str:
        """All numbers as JSON text; seconds, bytes, nats. What is infinite or was not measured is null."""
        return json_text(asdict(self))

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        write_text(path, self.to_json())


def compare_recipes(
    model: nn.Module, recipes: Sequence[str | Recipe], evaluation: Iterable[Any], *, data: Iterable[Any] | None = None,
    budget: Budget | None = None, repeats: int = 20, metric: Metric | None = None, baseline: str = "eager",
    folder: Path | None = None, told: Callable[[str], object] = lambda what: None,
) -> Matrix:  # fmt: skip
    """Quantize a copy of `model` by each recipe and measure all of them on the same batches; `model` stays as it is.

    evaluation: batches to measure on, as for qfx.quantize. data: calibration, for the recipes that need it; it should
    be other text. budget: for recipes that plan bits, such as {"avg_bits": 4}. metric: a function of a model and calls
    ((args, kwargs) each) that gives a number, such as an accuracy. baseline: the float model runs "eager" or compiled
    by "inductor". folder: of the float model's files; given, the peak memory of each is measured in a process of its
    own. A recipe that cannot be had is a row that says why.

    Held at once: the float model and one recipe's copy, calibration and evaluation batches, and the logits of both for
    one batch; a recipe is made, timed, judged and let go before the next. Each is timed in turn with the float model,
    whose own time is the median over all of them: of two recipes compare `speed`, which a slow moment of the machine
    changes less than seconds. Raises ValueError for no recipe, one that is there twice, repeats below 1 and bad data.
    """
    names = [str(getattr(recipe, "name", recipe)) for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected recipes, each once, found {', '.join(names) or 'none'}")
    if baseline not in ("eager", "inductor"):
        raise ValueError(f"the float model runs 'eager' or by 'inductor', found {baseline!r}")
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, found {repeats}")
    calls = batches.calls(model, evaluation)
    held = None if data is None else list(data)
    example = [calls[0][0] or calls[0][1]] if example_inputs(model) is None else None
    run = model if baseline == "eager" else torch.compile(model)
    bench = _Bench(model, run, calls, repeats, metric, baseline, folder, told)
    rows: list[Row] = []
    with evaluating(model):
        with torch.no_grad():
            cold = compare.seconds_of(run, calls[0])
        for name, recipe in zip(names, recipes, strict=True):
            told(f"quantize by {name}")
            row, made = _quantized(model, name, recipe, held, example, budget)
            rows.append(row if made is None else bench.measured(row, made))
            del made
            gc.collect()  # a compiled model is in cycles with what compiled it
        rows.insert(0, bench.of_float(_sized(Row(FLOAT), model, model), cold))
    return Matrix(tuple(rows), _shape(calls[0]), len(calls), baseline, getattr(metric, "__name__", ""))


@dataclass
class _Bench:
    """What each recipe is measured with. times: the float model's median in the turns with each recipe."""

    model: nn.Module
    run: Callable[..., Any]
    calls: Sequence[Call]
    repeats: int
    metric: Metric | None
    baseline: str
    folder: Path | None
    told: Callable[[str], object]
    times: list[float] = field(default_factory=list)

    def measured(self, row: Row, made: nn.Module) -> Row:
        """Latency in turn with the float model, then accuracy; a model that cannot run is a row that says why."""
        name, run = row.recipe, torch.compile(alone(made), backend="qfx")
        self.told(f"time {name} and float in turn")
        try:
            with torch.no_grad():
                cold = compare.seconds_of(run, self.calls[0])
        except (ValueError, UnsupportedError) as error:
            return replace(row, failed=first_line(error))
        found = compare.latency({FLOAT: self.run, name: run}, self.calls[0], repeats=self.repeats)
        self.times.append(found[FLOAT].warm)
        speed = found[FLOAT].warm / found[name].warm
        row = self._judged(replace(row, latency=Latency(cold, found[name].warm), speed=speed), run)
        return replace(row, memory=self._memory(name, made))

    def of_float(self, row: Row, cold: float) -> Row:
        """The float model's own row, cold: seconds of its first call."""
        if not self.times:
            self.times.append(compare.latency({FLOAT: self.run}, self.calls[0], repeats=self.repeats)[FLOAT].warm)
        row = replace(row, latency=Latency(cold, statistics.median(self.times)), speed=1.0)
        return replace(self._judged(row, self.run), memory=self._memory(FLOAT, None))

    def _judged(self, row: Row, run: Callable[..., Any]) -> Row:
        self.told(f"accuracy of {row.recipe}")
        near = compare.accuracy(self.run, run, self.calls, next_token=is_causal_lm(self.model))
        return replace(row, accuracy=near, metric=None if self.metric is None else float(self.metric(run, self.calls)))

    def _memory(self, name: str, made: nn.Module | None) -> int | None:
        """Peak memory of a process that loads it from its folder; of the float model where `made` is None."""
        if self.folder is None:
            return None
        self.told(f"peak memory of {name}")
        tensors = {key: value for key, value in self.calls[0][1].items() if isinstance(value, Tensor)}
        device = str(next(iter(tensors.values())).device)
        if made is None:
            return compare.peak_of(self.folder, tensors, "float", self.baseline, device)
        with TemporaryDirectory() as scratch:
            save(made, scratch)
            return compare.peak_of(Path(scratch), tensors, "quantized", self.baseline, device)


def alone(model: nn.Module) -> Callable[..., Any]:
    """The model as a function with code of its own: torch.compile makes eight versions of one code, whichever model of
    the class runs it, and leaves the next to eager Python."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    run.__code__ = run.__code__.replace()
    return run


def _quantized(
    model: nn.Module, name: str, recipe: str | Recipe, data: Any, example: Any, budget: Budget | None
) -> tuple[Row, nn.Module | None]:
    """example: a batch, for a model whose inputs are not known otherwise."""
    try:
        parsed = Recipe.parse(recipe)
        more = dict(budget or {}) if parsed.allocation is not None and not parsed.allocation.budgets else {}
        given = data if parsed.needs_data or parsed.allocation is not None else example
        name = " ".join([name, *(f"{key}={value}" for key, value in more.items())])
        started = time.perf_counter()
        made = quantize(copy.deepcopy(model), parsed, given, **more)
        row = Row(name, seconds=time.perf_counter() - started)
    except (ValueError, UnsupportedError) as error:
        return Row(name, failed=first_line(error)), None
    return _sized(row, made, model), made


def _sized(row: Row, made: nn.Module, model: nn.Module) -> Row:
    count = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    nbytes = bytes_of(made)
    return replace(row, nbytes=nbytes, compression=2 * count / nbytes, bits=8 * nbytes / count)


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that are saved with a model; those that share memory count once."""
    return sum({t.data_ptr() or id(t): t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor)}.values())


def _shape(call: Call) -> tuple[int, ...]:
    tensors = [v for v in (*call[0], *call[1].values()) if isinstance(v, Tensor)]
    return tuple(tensors[0].shape)


def pareto(matrix: Matrix) -> list[str]:
    """Recipes that no other beats in both bytes and error (see `error_of`), smallest first."""
    found = [(row.nbytes, error_of(row), row.recipe) for row in matrix.rows[1:] if row.nbytes and row.accuracy]
    front, least = [], math.inf
    for _, error, name in sorted(found, key=lambda one: (one[0] or 0, one[1])):
        if error < least:
            front.append(name)
            least = error
    return front


def error_of(row: Row) -> float:
    """KL divergence in nats; for a model without logits noise over signal (amplitudes)."""
    assert row.accuracy is not None
    kld = row.accuracy.kld
    return 10 ** (-row.accuracy.sqnr_db / 20) if kld is None else kld
