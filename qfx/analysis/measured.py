"""What a model loses when some of its units are quantized, measured by running it.

    measure = Measure(gm, batches, outputs=captured.outputs)
    measure.kld({"model.layers.0.mlp.up_proj": Format.parse("u3/g64")})      # nats per position

The values at the borders of the layers are kept, so that a change in layer L runs the model from L on only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qfx import annotation
from qfx.analysis.caches import Cache, CachedProgram
from qfx.analysis.units import Unit
from qfx.analysis.units import units as find_units
from qfx.analysis.weights import Assignment, Weights
from qfx.calibration.importance import Importance
from qfx.data import telling
from qfx.errors import explain
from qfx.format import Format
from qfx.rounding.blocks import Cut, cuts
from qfx.rounding.lanes import Env, Lane, Program

_ELEMENTS = 1 << 22  # logits that are compared at once


class Measure:
    """Runs a prepared graph on batches with any assignment of formats to its units.

    gm: prepared; its weights are the float ones. batches: its inputs in placeholder order, each. units: those that may
    have formats (None: all, by heads). tensors: scales of static inputs, as plans hold them. rounding, seen: how
    weights are rounded, see `Weights`. outputs: names of the graph's outputs, as `Captured.outputs`.

    Inputs of linears are rounded where the graph's annotations ask for it, whether their weight has a format or not:
    `kld({})` tells what that alone costs, and is 0 for weights alone. Raises ValueError for batches that do not fit,
    and where the float model gives NaN or Inf.
    """

    def __init__(
        self, gm: fx.GraphModule, batches: Sequence[Sequence[Any]], *, units: Sequence[Unit] | None = None,
        caches: Sequence[Cache] = (), tensors: Mapping[str, Tensor] | None = None, rounding: str = "mse",
        seen: Mapping[str, Importance] | None = None, outputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if not batches:
            raise ValueError("there is nothing to measure on: no batch was given")
        self.program = CachedProgram(gm, tensors)
        self.batches = batches
        self.units: list[Unit] = list(find_units(gm)[0] if units is None else units)
        self.caches = {cache.unit.name: cache for cache in caches}
        self.program.kept = {cache.node: cache.kept for cache in caches if cache.kept is not None}
        self.weights = Weights(gm, self.units, rounding=rounding, seen=seen)
        self.output, self.main = main_output(gm, outputs)
        self.is_kld = self.output == "logits"
        self.what = what_of(self.output)
        self.rounded = any("x" in annotation.get(node) for node in self.program.nodes)
        self.measured: dict[str, dict[str, float]] = {}
        self.evaluations = 0
        self._cuts = cuts(self.program)
        self._starts = [cut.start for cut in self._cuts] or [0]
        self._cut_of = _first_cuts(self.weights, self.caches, self.program, self._cuts)
        floating: Assignment = {}
        self._anchors = [(floating, self._borders(floating, rounded=self.rounded))]
        self._kept = [positions(self.program, batch) for batch in batches]
        self._wanted = [self._reference(i) for i in range(len(batches))]

    def kld(self, assignment: Assignment) -> float:
        """Mean KL(float || with these formats) in nats per position of the logits; positions that an attention mask
        of the batch leaves out do not count. Of a model without logits: squared error of its main output relative to
        its squares (see `what`). Raises ValueError for names that are no unit's.
        """
        total = weight = 0.0
        for number, found in enumerate(self.outputs(assignment)):
            difference, size = self.distance(number, found)
            total, weight = total + difference, weight + size
        return total / weight if weight else 0.0

    def distance(self, number: int, found: Tensor) -> tuple[float, float]:
        """(sum of differences, what it is to be divided by) of the main output of batch `number`, counted from 0."""
        kept = self._kept[number]
        kept = kept if kept is not None and kept.shape == found.shape[:-1] else None
        return _distance(self._wanted[number], found, kept, logits=self.is_kld)

    def single(self, unit: str | Unit, fmt: Format) -> float:
        """`kld` where this unit alone is quantized. Measured once."""
        name = unit if isinstance(unit, str) else unit.name
        found = self.measured.setdefault(name, {})
        if str(fmt) not in found:
            found[str(fmt)] = self.kld({name: fmt})
        return found[str(fmt)]

    def outputs(self, assignment: Assignment) -> Iterator[Tensor]:
        """The main output of each batch with these formats."""
        for (value,) in self.values(assignment, [self.main]):
            yield value

    def values(self, assignment: Assignment, nodes: Sequence[Any]) -> Iterator[list[Any]]:
        """What these outputs of the graph are, for each batch, with these formats; what is no node stays."""
        self.check(assignment)
        self.evaluations += 1
        start, borders = max(
            ((self._same_until(base, assignment), values) for base, values in self._anchors), key=lambda pair: pair[0]
        )
        start = min(start, len(self._starts) - 1)  # of an assignment that is an anchor the last block runs again
        placed = self._place(assignment)
        for number, env in enumerate(borders[start], 1):
            with telling(number), torch.no_grad():
                last = self._run(env, start, placed)
                found = [self.program.look(node, last) if isinstance(node, fx.Node) else node for node in nodes]
            yield found  # outside of no_grad, which would else be the caller's, too

    def _run(self, env: Env, start: int, placed: Mapping[fx.Node, Tensor]) -> Env:
        """The values at the end of the graph, of those before block `start`."""
        span = range(self._starts[start], len(self.program.nodes))
        return self.program.run(env, span, placed, rounded=self.rounded)

    def anchor(self, assignment: Assignment) -> None:
        """Keep the borders of this assignment beside the float ones (in place of an earlier one's): assignments that
        differ from it in late layers only are then measured from there on."""
        self.check(assignment)
        self._anchors[1:] = [(dict(assignment), self._borders(assignment, rounded=self.rounded))]

    def check(self, assignment: Assignment) -> None:
        """Raises ValueError for a name that is no unit's."""
        self.weights.check([name for name in assignment if name not in self.caches])

    def _place(self, assignment: Assignment) -> dict[fx.Node, Tensor]:
        """Weights for calls; formats of caches go to the program, which stands for one assignment at a time."""
        self.program.formats = {}
        for name in self.caches.keys() & assignment.keys():
            cache = self.caches[name]
            heads = self.program.formats.setdefault(cache.node, {}).setdefault(cache.argument, {})
            heads[cache.head] = assignment[name]
        return self.weights.place({name: fmt for name, fmt in assignment.items() if name not in self.caches})

    def _same_until(self, base: Assignment, other: Assignment) -> int:
        """The first block in which two assignments differ."""
        names = {name for name in {*base, *other} if base.get(name) != other.get(name)}
        return min((self._cut_of[name] for name in names), default=len(self._cuts))

    def _borders(self, assignment: Assignment, *, rounded: bool) -> list[list[Env]]:
        """The values before each block of every batch. Not those at the end: logits are many times as large."""
        lane = Lane(self.program, self.batches, rounded=rounded)
        lane.weights = self._place(assignment)
        found = []
        for start in self._starts:
            lane.advance(start)
            found.append(list(lane.values))
        return found

    def _reference(self, number: int) -> Tensor:
        """What a batch's output is compared with: log probabilities, else the output itself."""
        if self.rounded:
            lane = Lane(self.program, self.batches[number : number + 1], rounded=False)
            lane.advance(len(self.program.nodes))
            value = lane.value(0, self.main)
        else:
            with torch.no_grad():
                last = self._run(self._anchors[0][1][-1][number], len(self._starts) - 1, {})
            value = self.program.look(self.main, last)
        if not torch.isfinite(value).all():
            raise ValueError(
                explain(
                    f"the float model's {self.output} on batch {number + 1} holds NaN or Inf",
                    expected="finite values",
                    next_step="look for a failed load, an overflow in half precision or bad data before quantizing",
                )
            )
        found: Tensor = value.float().log_softmax(-1) if self.is_kld else value.detach().clone()
        return found


def main_output(gm: fx.GraphModule, names: Sequence[str]) -> tuple[str, fx.Node]:
    """(name, node) of the output by which a graph is compared: `logits`, else `last_hidden_state`, else the first
    float tensor, called `output`. names: as in `Captured.outputs`, without what the graph writes back.

    Raises ValueError where there is no float output.
    """
    flat = output_nodes(gm)
    if len(names) == len(flat):
        for wanted in ("logits", "last_hidden_state"):
            if wanted in names and isinstance(node := flat[list(names).index(wanted)], fx.Node):
                return wanted, node
    for node in flat:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return "output", node
    raise ValueError("the model's output holds no float tensor, so nothing can be compared")


def output_nodes(gm: fx.GraphModule) -> list[Any]:
    """The graph's outputs, without what it writes back into its inputs."""
    result = gm.graph.output_node().args[0]
    flat = list(result) if isinstance(result, list | tuple) else [result]
    return flat[len(gm.meta.get("qfx_mutations", ())) :]


def what_of(output: str) -> str:
    """What a loss is, by the name of the output that is compared."""
    return "KL divergence, nats per position" if output == "logits" else f"relative squared error of {output}"


def _first_cuts(
    weights: Weights, caches: Mapping[str, Cache], program: Program, blocks: Sequence[Cut]
) -> dict[str, int]:
    """Unit -> the number of the first block that reads it."""
    read: dict[str, list[fx.Node]] = {name: [cache.node] for name, cache in caches.items()}
    for fqn, operands in weights.readers.items():
        for unit in weights.of[fqn]:
            read[unit.name] = [node for nodes in operands.values() for node in nodes]
    found: dict[str, int] = {}
    for name, nodes in read.items():
        at = min(program.position[node] for node in nodes)
        found[name] = next(i for i, cut in enumerate(blocks) if cut.start <= at < cut.stop)
    return found


def positions(program: Program, batch: Sequence[Any]) -> Tensor | None:
    """The attention mask [B, T] of a batch as bool, None where it has none."""
    for node, value in zip(program.inputs, batch, strict=True):
        if node.meta.get("qfx_name", node.name) == "attention_mask" and isinstance(value, Tensor) and value.dim() == 2:
            return value != 0
    return None


def some(batches: Sequence[Sequence[Any]], count: int) -> list[Sequence[Any]]:
    """The first batches that hold `count` positions ([B, T] of the largest input of each), at least one batch."""
    found: list[Sequence[Any]] = []
    seen = 0
    for batch in batches:
        if found and seen >= count:
            break
        found.append(batch)
        sizes = [math.prod(value.shape[:2]) for value in batch if isinstance(value, Tensor) and value.dim()]
        seen += max(sizes, default=1)
    return found


def _distance(wanted: Tensor, found: Tensor, kept: Tensor | None, *, logits: bool) -> tuple[float, float]:
    """(sum of differences, what it is to be divided by) of one batch.

    The divergence is summed as p (r - 1 - log r) with r = q / p, whose terms are all positive, so that f32 does for
    differences as small as those of one unit.
    """
    total = size = 0.0
    rows, others = wanted.reshape(-1, wanted.shape[-1]), found.reshape(-1, found.shape[-1])
    if kept is not None and not kept.all():  # else as they are: logits are large, and rows that are taken a copy
        at = kept.reshape(-1).nonzero()[:, 0]
        rows, others = rows[at], others[at]
    step = max(1, _ELEMENTS // rows.shape[-1])
    for p, q in zip(rows.split(step), others.split(step), strict=True):
        if logits:
            d = q.float().log_softmax(-1) - p
            total += float((p.exp() * (d.expm1() - d)).sum(-1).double().sum())
            size += len(p)
        else:
            total += float((q.float() - p.float()).square().sum(dtype=torch.float64))
            size += float(p.float().square().sum(dtype=torch.float64))
    return (total, size) if not math.isnan(total) else (math.inf, size)
