"""Round the weights of a graph block by block, each behind what is rounded already, by a method that sees data.

A method is a module of METHODS with `method(recipe) -> Method`; it is given one `qfx.blocks.Block` after the other and
puts every part of it. What it puts goes into the plan (`qfx.rounded`), and into a folder where the work shall be taken
up again after an interruption (`qfx.resume`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import fx

from qfx import rounded
from qfx.blocks import Block, Cut, Linear, cuts, find
from qfx.errors import Note
from qfx.lanes import Lane, Program
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.resume import Resume

METHODS: dict[str, str] = {"gptq": "qfx.passes.gptq"}  # Recipe.rounding -> module
TOLD = "rounding"  # in Plan.sensitivities: name -> what the method tells about a weight


class Method(Protocol):
    """How the weights of a block are rounded."""

    @property
    def needs_float(self) -> bool:
        """The method asks for values of the float model, too."""

    def round(self, block: Block) -> list[Note]:
        """Put every part of the block's sites. Returns what did not go as asked."""


def round_weights(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool = True,
    resume: str | os.PathLike[str] | None = None, memory: int | None = None, method: Method | None = None,
) -> list[Note]:  # fmt: skip
    """Round the annotated weights of a prepared float graph by `plan.recipe.rounding`, into `plan.tensors`.

    batches: the graph's inputs, in placeholder order. resume: a folder for finished blocks; what it holds of the same
    work is not done again, and the result is the same to the bit. memory: bytes of activations to hold, the rest goes
    to a temporary file. `plan.sensitivities["rounding"]` tells about each weight. Returns what did not go as asked.
    Raises ValueError for data on which the model does not run or gives NaN, and where the folder holds other work.
    """
    chosen = method if method is not None else _method(plan.recipe)
    program = Program(gm, plan.tensors)
    work = _work(program)
    store = None if resume is None else Resume.open(resume, plan, batches)
    lane = Lane(program, batches, rounded=True, memory=memory)
    wanted = Lane(program, batches, rounded=False, memory=memory) if chosen.needs_float else None
    told = plan.sensitivities.setdefault(TOLD, {})
    tokens = sum(_rows(batch) for batch in batches)
    notes: list[Note] = []
    with _bar(progress) as bar, torch.no_grad():
        task = bar.add_task("rounding", total=sum(_cost(linear, tokens) for _, linears in work for linear in linears))
        for number, (cut, linears) in enumerate(work):
            bar.update(task, description=f"rounding {cut.name}")
            block = Block(cut, linears, lane, wanted, plan.tensors, told)
            block.on_put = lambda part: bar.advance(task, _cost(part.linear, tokens) / len(part.linear.parts))
            notes += _round(block, chosen, plan.recipe, store, number)
            if number + 1 < len(work):
                block.leave()
    return notes


def _method(recipe: Recipe) -> Method:
    found: Method = importlib.import_module(METHODS[recipe.rounding]).method(recipe)
    return found


def _work(program: Program) -> list[tuple[Cut, list[Linear]]]:
    """Blocks and their weights, up to the last block that has any."""
    linears = find(program)
    work = [
        (cut, [one for one in linears if cut.start <= program.position[one.node] < cut.stop]) for cut in cuts(program)
    ]
    while work and not work[-1][1]:
        work.pop()
    return work


def _round(block: Block, method: Method, recipe: Recipe, store: Resume | None, number: int) -> list[Note]:
    """Round one block, or take it from the folder."""
    if store is not None and (notes := store.load(number, block)) is not None:
        return notes
    for part in (part for linear in block.linears if linear.table for part in linear.parts):
        block.put(part, rounded.pack({}, block.weight(part), part.format, recipe.rounding, name=part.name))
    notes = [*_tied(block), *method.round(block)]
    missing = [part.name for linear in block.linears for part in linear.parts if not block.has(part)]
    assert not missing, f"{type(method).__name__} left {missing}"
    if store is not None:
        store.save(number, block, notes)
    return notes


def _tied(block: Block) -> list[Note]:
    """One note for each weight that is read in several places: it is rounded once, by what the first one sees."""
    notes = []
    for linear in block.linears:
        others = {id(node.args[0]): node for node in linear.readers if node.args[0] is not linear.node.args[0]}
        if others and len(linear.parts[0].names) > 1:
            how = "to nearest, since an embedding reads it first" if linear.table else "by what that one sees"
            reason = f"{linear.parts[0].names[-1]!r} reads the same weight, which is rounded once, {how}"
            notes.append(Note(linear.fqn, reason, "untie them (rewrite 'untie') to round each by itself", minor=True))
    return notes


def _rows(batch: Sequence[Any]) -> int:
    """Tokens of a batch, about: the size of its first tensor of integers, else the number of its samples."""
    for value in batch:
        if isinstance(value, torch.Tensor) and value.dim():
            return value.numel() if not value.is_floating_point() else value.shape[0]
    return 1


def _cost(linear: Linear, tokens: int) -> float:
    """Products of a weight's rounding, for the time that is left: statistics, and errors passed on."""
    shape = linear.node.meta["val"].shape
    columns = linear.node.args[0].meta["val"].shape[-1] if not linear.table else 1  # type: ignore[union-attr]
    outputs = shape[-1] if isinstance(shape[-1], int) else 1
    return float(columns) * (tokens + outputs) * (float(columns) + outputs) if not linear.table else 1.0


def _bar(shown: bool) -> Progress:
    """A transient bar on stderr with the time that is left, off where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    off = not (shown and console.is_terminal)
    return Progress(*columns, console=console, transient=True, disable=off, speed_estimate_period=600.0)
