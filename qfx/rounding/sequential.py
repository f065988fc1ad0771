"""Round the weights of a graph block by block, each behind what is rounded already, by a method that sees data.

A method is a module of METHODS with `method(recipe) -> Method`; it is given one `qfx.rounding.blocks.Block` after the
other and puts every part of it. What it puts goes into the plan (`qfx.rounding.rounded`), and into a folder where the
work shall be taken up again after an interruption (`qfx.storage.resume`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from rich.progress import TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, fx

from qfx import graph
from qfx.errors import Note
from qfx.packing import Packed
from qfx.passes.calibrate import progress_bar
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.rounding import rounded
from qfx.rounding.blocks import Block, Cut, Linear, Part, cuts, find
from qfx.rounding.lanes import Lane, Program
from qfx.storage.resume import Resume

METHODS: dict[str, str] = {"gptq": "qfx.passes.gptq", "learned": "qfx.passes.learned"}  # Recipe.rounding -> module
TOLD = "rounding"  # in Plan.sensitivities: name -> what the method tells about a weight


class Method(Protocol):
    """How the weights of a block are rounded. A method that has `round_table`, too, rounds tables that are tied to a
    linear: it is given the part, its float weight, and the linear's inputs in the float model, batch by batch."""

    @property
    def needs_float(self) -> bool:
        """The method asks for values of the float model, too."""

    @property
    def reads_all(self) -> bool:
        """A weight that is read in several places is rounded by what all of them see, not the first alone."""

    def round(self, block: Block) -> list[Note]:
        """Put every part of the block's sites. Returns what did not go as asked."""


def round_weights(
    gm: fx.GraphModule, plan: Plan, batches: Sequence[Sequence[Any]], *, progress: bool = True,
    resume: str | os.PathLike[str] | None = None, memory: int | None = None, method: Method | None = None,
    keep: bool = True,
) -> list[Note]:  # fmt: skip
    """Round the annotated weights of a prepared float graph by `plan.recipe.rounding`, into `plan.tensors`.

    batches: the graph's inputs, in placeholder order. resume: a folder for finished blocks; what it holds of the same
    work is not done again, and the result is the same to the bit. memory: bytes of activations to hold, the rest goes
    to a temporary file. keep: False lets go of what a block put into the plan once the block is left.
    `plan.sensitivities["rounding"]` tells about each weight. Returns what did not go as asked.
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
    tables = _Tables(program, batches, memory)
    columns = TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with progress_bar(progress, *columns, period=600.0) as bar, torch.no_grad():
        done = [store is not None and store.has(number) for number in range(len(work))]
        left = [linears for known, (_, linears) in zip(done, work, strict=True) if not known]
        task = bar.add_task("rounding", total=sum(_cost(linear, tokens) for linears in left for linear in linears))
        for number, (cut, linears) in enumerate(work):
            bar.update(task, description=f"rounding {cut.name}")
            block = Block(cut, linears, lane, wanted, plan.tensors, told)
            if not done[number]:  # the time that is left is told by what is done now
                block.on_put = lambda part: bar.advance(task, _cost(part.linear, tokens) / len(part.linear.parts))
            notes += _round(block, chosen, plan.recipe, store, number, tables)
            if number + 1 < len(work):
                block.leave()
                if not keep:
                    plan.tensors.clear()
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


def _round(
    block: Block, method: Method, recipe: Recipe, store: Resume | None, number: int, tables: _Tables
) -> list[Note]:
    """Round one block, or take it from the folder."""
    if store is not None and (notes := store.load(number, block)) is not None:
        return notes
    for part in (part for linear in block.linears if linear.table for part in linear.parts):
        weight, reader = block.weight(part), tables.reader(part.linear)
        if reader is not None and isinstance(method, RoundsTables):
            block.put(part, *method.round_table(part, weight, tables.inputs(reader)))
        else:
            block.put(part, rounded.pack({}, weight, part.format, recipe.rounding, name=part.name))
    notes = [*_tied(block, method), *method.round(block)]
    missing = [part.name for linear in block.linears for part in linear.parts if not block.has(part)]
    assert not missing, f"{type(method).__name__} left {missing}"
    if store is not None:
        store.save(number, block, notes)
    return notes


@runtime_checkable
class RoundsTables(Protocol):
    """A method that rounds tables by what the linear reads that they are tied to."""

    def round_table(self, part: Part, weight: Tensor, inputs: Iterable[Tensor]) -> tuple[Packed, dict[str, Any]]:
        """The table [V, K] rounded, and what is told about it. inputs: [.., K] of the float model."""


class _Tables:
    """Tables that a linear reads, too, later: its inputs are those of the float model, which is run once for them."""

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]], memory: int | None) -> None:
        self.program, self.batches, self.memory = program, batches, memory

    def reader(self, linear: Linear) -> fx.Node | None:
        """The first linear that reads a table."""
        return next((node for node in linear.readers if graph.schema_name(node) == "aten::linear"), None)

    def inputs(self, reader: fx.Node) -> Iterator[Tensor]:
        """What a linear reads, batch by batch."""
        x = reader.args[0]
        assert isinstance(x, fx.Node)
        lane = Lane(self.program, self.batches, rounded=False, memory=self.memory)
        lane.advance(self.program.position[reader])
        for batch in range(len(self.batches)):
            yield lane.rows(batch, x, lane.value(batch, x))


def _tied(block: Block, method: Method) -> list[Note]:
    """One note for each weight that is read in several places, and rounded once."""
    notes, seen = [], "by what both see" if method.reads_all else "by what the first one sees"
    for linear in block.linears:
        others = {id(node.args[0]): node for node in linear.readers if node.args[0] is not linear.node.args[0]}
        if others and len(linear.parts[0].names) > 1:
            how = "as an embedding and as a linear" if linear.table else seen
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
