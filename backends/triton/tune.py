"""Measuring the configurations of kernels, for `qfx tune`.

A `Work` (see `tune_works`) is lowered as any graph is and called with rows of random data: the kernels that are
launched say between what configurations they choose (`tuning.watched`). Each of these is tried, its result compared
with that of the work's module, its time measured with copies of the weights that pass the L2 cache, and the fastest
goes to the file of the GPU where it beats what runs without one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qfx.backends.triton import device, lowering, timing, tuning
from qfx.backends.triton.launch import Config
from qfx.backends.triton.tune_works import Work
from qfx.backends.triton.tuning import Choice
from qfx.capture import capture_export
from qfx.errors import explain

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
ERRORS = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 5e-3}  # relative, Frobenius; f32 may run in tf32
_BUDGET = 0.05  # seconds of replays of one configuration
_WORTH = 0.98  # of the time without a file that a configuration must not pass, so that noise writes nothing


Measure = Callable[[Sequence[timing.Call]], float]


@dataclass
class Tuned:
    """What came of one choice. before: seconds without a file. seconds: of the fastest. dropped: config -> why not."""

    work: str
    choice: Choice
    tried: int = 0
    before: float | None = None
    seconds: float | None = None
    best: Config | None = None
    dropped: list[tuple[Config, str]] = field(default_factory=list)


def tune(work: Work, rows: int, measure: Measure | None = None, *, known: Collection[Choice] = ()) -> Iterator[Tuned]:
    """Measure every choice that a work makes for a number of rows, but those `known`; yields each as it is done.

    measure: seconds of a call out of several that take turns; left out, `timing.seconds`. Raises UnsupportedError where
    the device has no kernels, ValueError where what runs without a file is wrong already.
    """
    found = device.find(work.where)
    x = _random_rows(rows, work)
    with torch.no_grad():
        expected = _flat(work.module(x))
        gm = capture_export(work.module, (x,), dynamic=False).gm
        lowered = lowering.lower(gm, mode="eager")
        with tuning.watched() as choices:
            error = _error(lowered, x, expected)
        if not error <= ERRORS[work.dtype]:
            raise ValueError(
                explain(
                    f"the kernels of {work.name} give a wrong result for {rows} rows on {found.name}",
                    expected=f"a relative error of at most {ERRORS[work.dtype]:g}",
                    found=f"{error:.2e}",
                    next_step="this is a fault of qfx: report the layer, its formats and the GPU",
                )
            )
        asked = {choice: configs for choice, configs in choices.items() if not work.only or choice[0] in work.only}
        choices = {choice: configs for choice, configs in asked.items() if choice not in known}
        count = timing.copies(work.read, timing.cache_bytes(work.where)) if choices else 1
        others = (lowering.lower(gm, mode="eager") for _ in range(count - 1))  # each packs the weights for itself
        calls = [_call(one, x) for one in (lowered, *others)]
        measure = measure or partial(timing.seconds, on=timing.CudaGraphs(work.where), budget=_BUDGET)
        for choice, configs in choices.items():
            yield _best(work, choice, configs, calls, expected, measure)


def _best(
    work: Work, choice: Choice, configs: Sequence[Config], calls: Sequence[timing.Call], expected: list[Tensor],
    measure: Measure,
) -> Tuned:  # fmt: skip
    told = Tuned(work.name, choice, len(configs), measure(calls))
    for config in configs:
        with tuning.trying(choice, config):
            try:
                with timing.poisoned():
                    error = max(map(timing.relative_error, _flat(calls[0]()), expected), default=0.0)
                if not error <= ERRORS[work.dtype]:
                    told.dropped.append((config, f"wrong result: relative error {error:.2e}"))
                    continue
                took = measure(calls)
            except Exception as failed:  # of Triton's compiler, or of the device: any kind
                if timing.is_lost(work.where):
                    raise
                told.dropped.append((config, timing.said(failed)))
                continue
        if told.seconds is None or took < told.seconds:
            told.seconds, told.best = took, config
    if told.before is not None and told.seconds is not None and told.seconds > _WORTH * told.before:
        told.best = None
    return told


def _random_rows(rows: int, work: Work) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, work.width, generator=generator).to(work.where, work.dtype)


def _call(lowered: Callable[..., Any], x: Tensor) -> timing.Call:
    return lambda: lowered(x)


def _flat(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def _error(lowered: Callable[..., Any], x: Tensor, expected: list[Tensor]) -> float:
    with timing.poisoned():
        found = _flat(lowered(x))
    assert len(found) == len(expected), (len(found), len(expected))
    return max(map(timing.relative_error, found, expected), default=0.0)


def table_of(found: Iterable[Tuned]) -> dict[Choice, Config]:
    """What is to be written: choices for which something was found that is faster."""
    return {one.choice: one.best for one in found if one.best is not None}
