"""One forward and one backward over a prepared graph, and what scores are made of: gradients of each weight, sample by
sample, and what each linear reads.

    found = gather(weights, program, batches, outputs, General(...))
    found.fisher["model.layers.0.mlp.up_proj"]           # [N, K]: mean over samples of the squared gradient

The graph's weights need no gradient of their own: at the result y of a call that reads x the gradient g of y gives
that of the weight, g^T x, for each sample. What both are is let go as soon as they have met.

Of a batch the values between the layers are kept. What is inside of a layer is computed a second time when its turn has
come, so that the memory is that of one layer and of the loss, in up to a third more time (Chen et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx

from qfx import graph
from qfx.analysis.losses import Objective
from qfx.analysis.patterns import arguments
from qfx.analysis.units import Unit, by_weight
from qfx.analysis.weights import Weights
from qfx.data import check_batch, telling
from qfx.errors import explain
from qfx.passes.quantize import weight_value
from qfx.rounding.blocks import cuts
from qfx.rounding.lanes import Env, Program

Watch = Callable[[fx.Node, Mapping[str, Any]], None]


@dataclass
class Gathered:
    """What one pass over the data tells. A weight's tensors are shaped as the operand of the call that reads it.

    fisher: f32, sum over samples of the squared gradient. gradient: f32, its sum. taylor: unit -> sum over samples of
    |sum of weight x gradient|, which is |z . dL/dz| at what the unit gives. energy: f32 [K], sum of x^2 over what a
    linear reads, and rows: over how many. weight: what sums of squares are divided by. samples: how many.
    """

    fisher: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    taylor: dict[str, float] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    weight: float = 0.0
    samples: int = 0


def gather(
    weights: Weights, program: Program, batches: Sequence[Sequence[Any]], outputs: Sequence[Any],
    objective: Objective, *, more: Iterable[Unit] = (), first_order: bool = False, watch: Watch | None = None,
    values: dict[fx.Node, Callable[[Tensor, Tensor], None]] | None = None, bar: Progress | None = None,
) -> Gathered:  # fmt: skip
    """Run every batch forward and backward.

    outputs: the nodes that the objective is given the values of. more: units beside those of `weights`. first_order:
    gather `gradient` and `taylor`, too. watch: called with each attention and its arguments. values: node -> called
    with its value and gradient.
    Raises ValueError, naming the batch, where the graph does not run on it or the loss is NaN or infinite.
    """
    run = _Run(weights, program, first_order, watch, values or {})
    run.of = by_weight([*weights.units.values(), *more])
    names = [node.name for node in program.inputs]
    task = bar.add_task("gradients", total=len(batches)) if bar is not None else None
    for number, batch in enumerate(batches):
        check_batch(batch, names, number + 1)
        with torch.enable_grad():
            run.one(batch, outputs, objective, number)
        if bar is not None and task is not None:
            bar.advance(task)
    return run.found


def samples_of(batch: Iterable[Any]) -> int:
    """The size of the first dimension of the first tensor."""
    return next((len(value) for value in batch if isinstance(value, Tensor) and value.dim()), 1)


class _Run:
    def __init__(
        self, weights: Weights, program: Program, first_order: bool, watch: Watch | None,
        values: dict[fx.Node, Callable[[Tensor, Tensor], None]],
    ) -> None:  # fmt: skip
        self.weights, self.program, self.watch, self.values = weights, program, watch, values
        self.first_order, self.of = first_order, weights.of
        self.found = Gathered()
        self.fqns = {node: fqn for fqn, views in weights.readers.items() for node in next(iter(views.values()), [])}
        self.samples = 1
        self.blocks = [range(cut.start, cut.stop) for cut in cuts(program)] or [range(0)]

    def one(self, batch: Sequence[Any], outputs: Sequence[Any], objective: Objective, number: int) -> None:
        """One batch: forward, loss, backward."""
        self.samples = samples_of(batch)
        kept = {node for node in outputs if isinstance(node, fx.Node)}
        env: Env = dict(zip(self.program.inputs, batch, strict=True))
        borders: list[Env] = []
        leaves: list[Tensor] = []
        with telling(number + 1):
            for block in self.blocks:
                borders.append(env := _border(env))
                env = self._block(env, block, kept, leaves := [], watched=True)
            values = [self.program.look(node, env) if isinstance(node, fx.Node) else node for node in outputs]
        del env
        loss, weight = objective(values, number, self.samples)
        if not torch.isfinite(loss):
            raise ValueError(
                explain(
                    f"the loss of batch {number + 1} is {float(loss.detach())}",
                    expected="a finite number",
                    next_step="look at the labels of that batch, for a failed load or an overflow in half precision",
                )
            )
        del values
        slopes = _slopes([loss], None, borders[-1], leaves)
        del loss
        for block, before in zip(reversed(self.blocks[:-1]), reversed(borders[:-1]), strict=True):
            if not slopes:
                break
            after = self._block(before, block, kept, leaves := [])
            through = {node: slope for node, slope in slopes.items() if after[node] is before.get(node)}
            own = [node for node in slopes if node not in through]
            made = [after[node] for node in own]
            del after
            found = _slopes(made, [slopes[node] for node in own], before, leaves)
            slopes = {
                node: sum(both[1:], both[0])
                for node in before
                if (both := [part[node] for part in (through, found) if node in part])
            }
        self.found.weight += weight
        self.found.samples += self.samples

    def _block(self, env: Env, block: range, kept: set[fx.Node], leaves: list[Tensor], *, watched: bool = False) -> Env:
        """The values after a block of those before it. leaves: where gradients begin in it, which are added."""
        env = dict(env)
        for at in block:
            node = self.program.nodes[at]
            if watched and self.watch is not None and "attention" in graph.schema_name(node):
                with torch.no_grad():
                    self.watch(node, arguments(self.program, node, env))
            env[node] = self._hooked(node, self.program.step(node, env, {}, rounded=False), env, leaves)
            for read in (node, *node.all_input_nodes):
                if read in env and self.program.last_use[read] <= at and read not in kept:
                    del env[read]
        return env

    def _hooked(self, node: fx.Node, value: Any, env: Env, leaves: list[Tensor]) -> Any:
        """The value of a call, with what shall happen when its gradient comes."""
        fqn, own = self.fqns.get(node), self.values.get(node)
        if (fqn is None and own is None) or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
            leaves.append(value)
        if own is not None:
            held = value.detach()
            value.register_hook(lambda g: own(held, g.detach()))
        if fqn is not None:
            take = _TAKES[graph.schema_name(node)]
            args = [self.program.look(a, env) if isinstance(a, fx.Node) else a for a in node.args]
            args = [a.detach() if isinstance(a, Tensor) else a for a in args]
            value.register_hook(lambda g: take(self, fqn, args, g.detach().float()))
        return value

    def linear(self, fqn: str, args: Sequence[Any], g: Tensor) -> None:
        """x [.., K] and g [.., N] of aten.linear."""
        x = args[0].float()
        count = self.samples if x.dim() > 1 and _parts(x, self.samples) else 1
        x, g = x.reshape(count, -1, x.shape[-1]), g.reshape(count, -1, g.shape[-1])
        self._energy(fqn, x.reshape(-1, x.shape[-1]))
        for one, slope in zip(x, g, strict=True):
            self._add(fqn, slope.T @ one)

    def embedding(self, fqn: str, args: Sequence[Any], g: Tensor) -> None:
        """Ids [..] and g [.., D] of aten.embedding: rows that are not read have no gradient."""
        ids = args[1]
        count = self.samples if ids.dim() and _parts(ids[..., None], self.samples) else 1
        for one, slope in zip(ids.reshape(count, -1), g.reshape(count, -1, g.shape[-1]), strict=True):
            rows, at = one.unique(return_inverse=True)
            self._add(fqn, g.new_zeros(len(rows), g.shape[-1]).index_add_(0, at, slope), rows)

    def grouped(self, fqn: str, args: Sequence[Any], g: Tensor) -> None:
        """x [T, K] and g [T, N] of qfx::grouped_linear. The rows of an expert are of all samples."""
        x, ends = args[0].float(), args[2].tolist()
        self._energy(fqn, x)
        for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                self._add(fqn, g[start:end].T @ x[start:end], expert)

    def _energy(self, fqn: str, rows: Tensor) -> None:
        energy = rows.square().sum(0)
        self.found.energy[fqn] = self.found.energy[fqn] + energy if fqn in self.found.energy else energy
        self.found.rows[fqn] = self.found.rows.get(fqn, 0) + len(rows)

    def _add(self, fqn: str, slope: Tensor, at: Any = None) -> None:
        """The gradient of a weight (of its rows `at`, of its expert `at`) for one sample."""
        weight = weight_value(self.weights.gm, next(iter(self.weights.readers[fqn])))
        for held in (self.found.fisher, self.found.gradient) if self.first_order else (self.found.fisher,):
            if fqn not in held:
                held[fqn] = torch.zeros(weight.shape, device=weight.device)
        self._sum(self.found.fisher[fqn], slope.square(), at)
        if self.first_order:
            self._sum(self.found.gradient[fqn], slope, at)
            product = slope * (weight if at is None else weight[at])
            for unit in self.of[fqn]:
                change = abs(float(cut(product, unit).sum()))
                self.found.taylor[unit.name] = self.found.taylor.get(unit.name, 0.0) + change

    @staticmethod
    def _sum(total: Tensor, part: Tensor, at: Any) -> None:
        if isinstance(at, Tensor):
            total.index_add_(0, at, part)
        else:
            (total if at is None else total[at]).add_(part)


_TAKES: dict[str, Callable[[_Run, str, Sequence[Any], Tensor], None]] = {
    "aten::linear": _Run.linear, "aten::embedding": _Run.embedding, "qfx::grouped_linear": _Run.grouped,
}  # fmt: skip


def _border(env: Env) -> Env:
    """The values between two blocks: each a leaf where it has a gradient, so that what made it can be let go."""
    return {
        node: value.detach().requires_grad_() if isinstance(value, Tensor) and value.requires_grad else value
        for node, value in env.items()
    }


def _slopes(
    made: Sequence[Tensor], slopes: Sequence[Tensor] | None, before: Env, leaves: Sequence[Tensor]
) -> dict[fx.Node, Tensor]:
    """The gradients of what stood before a block, from those of what it has made. The hooks of its calls run."""
    nodes = [node for node, value in before.items() if isinstance(value, Tensor) and value.requires_grad]
    wanted = [*(before[node] for node in nodes), *leaves]
    if not wanted or not made:
        return {}
    found = torch.autograd.grad(made, wanted, slopes, allow_unused=True)
    return {node: slope for node, slope in zip(nodes, found, strict=False) if slope is not None}


def cut(whole: Tensor, unit: Unit) -> Tensor:
    """The part of a tensor shaped as the weight that is the unit's."""
    return whole if unit.axis is None else whole.narrow(unit.axis, unit.start, unit.stop - unit.start)


def _parts(value: Tensor, samples: int) -> bool:
    """Do its rows [B, .., K] or [B * T, K] belong to the samples in order?"""
    return len(value) == samples or (value.dim() == 2 and len(value) % samples == 0)
