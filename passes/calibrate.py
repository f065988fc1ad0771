"""Run data through a graph with observers in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from torch import fx

from qfx import annotation
from qfx.calibration.padding import attended
from qfx.data import check_batch, telling
from qfx.errors import Note, QfxWarning, explain
from qfx.passes.observe import Make, Observers, Roles, insert_observers, remove_observers
from qfx.storage.spill import Resting


def observed(
    gm: fx.GraphModule, batches: Sequence[Sequence[Any]], make: Make, *, roles: Roles = annotation.get,
    alike: Callable[[str], str] = str, progress: bool = True,
) -> tuple[Observers, list[Note]]:  # fmt: skip
    """What the observers that `make` wishes saw of the batches, and notes as `calibrate` gives; `gm` is as before.

    roles, alike: see `insert_observers`.
    """
    observers = insert_observers(gm, make, roles, alike=alike)
    try:
        notes = calibrate(gm, batches, observers, total=len(batches), progress=progress) if observers else []
    finally:
        remove_observers(gm)
    return observers, notes


def calibrate(
    gm: fx.GraphModule,
    batches: Iterable[Sequence[Any]],
    observers: Observers,
    *,
    total: int | None = None,
    progress: bool = True,
) -> list[Note]:
    """Feed the observers of `gm` (see `insert_observers`). Each batch is the graph's inputs in placeholder order.

    Positions that its attention mask leaves out are not observed (see `qfx.calibration.padding`).

    Runs without gradients and lets go of each value after its last use. `total` is for the progress bar, which shows
    only on a terminal. Returns notes about nodes that no data reached, and warns about them (QfxWarning). Raises
    ValueError where there is no batch, where one does not run or has another number of inputs, and where a watched
    value is NaN or Inf.
    """
    inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    count = 0  # batches are counted from 1
    with torch.no_grad(), progress_bar(progress) as bar:
        task = bar.add_task("calibrating", total=total)
        for batch in batches:
            count += 1
            check_batch(batch, inputs, count)
            observers.batch, observers.attended = count, attended(inputs, batch)
            with telling(count):
                Resting(gm).run(*batch)
            bar.advance(task)
    observers.batch, observers.attended = None, {}
    if count == 0:
        raise ValueError(
            explain(
                "cannot calibrate without data",
                expected="at least one batch",
                found="an empty iterable (an iterator that was used before is empty, too)",
                next_step="pass a list of batches",
            )
        )
    notes = observers.notes()
    for note in notes:
        warnings.warn(str(note), QfxWarning, stacklevel=2)
    return notes


def progress_bar(shown: bool, *columns: ProgressColumn, period: float = 30.0) -> Progress:
    """A transient bar on stderr, off where that is no terminal.

    columns: behind the bar, left out: how many of how many, and the time left. period: seconds that tell the speed.
    """
    console = Console(stderr=True)
    console.quiet = not (shown and console.is_terminal)  # rich 14.1 ends even a disabled bar with a line
    behind = columns or (MofNCompleteColumn(), TimeRemainingColumn())
    every = (TextColumn("{task.description}"), BarColumn(), *behind)
    return Progress(*every, console=console, transient=True, disable=console.quiet, speed_estimate_period=period)
