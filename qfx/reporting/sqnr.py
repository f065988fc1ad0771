"""Error of each quantized node: the float and the quantized form of one compiled graph, run on the same inputs.

    with sqnr.measuring() as collector:
        compiled(**batch)                   # every compiled graph that runs inside adds what it finds
    collector.of(record)                    # name of a node -> decibel

Errors add up along the graph: a node's error has those of the nodes before it in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.calibration.padding import Attended, attended, in_positions, with_heads, without
from qfx.calibration.positions import rows_of
from qfx.measuring.measure import decibel, energies
from qfx.storage.spill import Resting

Energies = dict[str, tuple[float, float]]  # name of a node -> energy of its float output, energy of the difference

_CURRENT: ContextVar[Collector | None] = ContextVar("qfx_sqnr", default=None)


class Collector:
    """What was measured, by the record of the graph. Several calls of one graph add up."""

    def __init__(self) -> None:
        self._found: dict[int, Energies] = {}
        self.graphs = 0

    def add(self, record: object, plain: fx.GraphModule, quantized: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Measure one call of a graph; `inputs` in the order of the placeholders."""
        self.graphs += 1
        sums = self._found.setdefault(id(record), {})
        for name, (signal, noise) in compare(plain, quantized, inputs).items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + signal, before[1] + noise)

    @property
    def measured(self) -> bool:
        """Whether any node was."""
        return any(self._found.values())

    def of(self, record: object) -> dict[str, float]:
        """Name of a node -> SQNR in dB, for the graph of a record."""
        return {name: decibel(*sums) for name, sums in self._found.get(id(record), {}).items()}


@contextmanager
def measuring() -> Iterator[Collector]:
    """Let the compiled graphs that run inside, in this thread, be measured. It takes several times a call's time."""
    collector = Collector()
    token = _CURRENT.set(collector)
    try:
        yield collector
    finally:
        _CURRENT.reset(token)


def collecting() -> Collector | None:
    """The collector of the surrounding `measuring`, if any."""
    return _CURRENT.get()


def compare(plain: fx.GraphModule, quantized: fx.GraphModule, inputs: Sequence[Any]) -> Energies:
    """Energies, by fully qualified name, of each node that has the same name in both graphs and another operator.

    quantized: `plain` after the pass `quantize`, which keeps names and order. Errors of earlier nodes are part of a
    node's error; several calls of one layer add up. Positions that an input `attention_mask` leaves out do not count
    (see `qfx.calibration.padding`), unless rows were picked from them. Both graphs advance in step and let go of values
    after their last use, so that no more is held than by two runs. They change none of their inputs.
    """
    targets = {n.name: n.target for n in plain.graph.nodes}
    calls = [n for n in quantized.graph.nodes if n.op == "call_function"]
    names = [n.name for n in calls if targets.get(n.name, n.target) != n.target]
    kept = attended([n.name for n in plain.graph.nodes if n.op == "placeholder"], inputs)
    shapes = _shapes(plain, inputs)
    found: Energies = {}
    with torch.no_grad():
        one, other = _Lane(plain, inputs), _Lane(quantized, inputs)
        for name in names:
            node, wanted = one.until(name)
            fqn = graph.fqn_of(node)
            rows = rows_of(node) if kept and wanted.dim() == 2 else None
            like = None if rows is None or rows.picks else shapes[rows.like]
            signal, noise = energies(*(_counted(value, kept, like) for value in (wanted, other.until(name)[1])))
            before = found.get(fqn, (0.0, 0.0))
            found[fqn] = (before[0] + signal, before[1] + noise)
    return found


def _shapes(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, tuple[int, ...]]:
    """[B, T] of the inputs that begin with it."""
    placeholders = (n for n in gm.graph.nodes if n.op == "placeholder")
    pairs = zip(placeholders, inputs, strict=True)
    return {n: tuple(value.shape[:2]) for n, value in pairs if isinstance(value, Tensor) and value.dim() > 1}


def _counted(x: Tensor, kept: Attended, like: tuple[int, ...] | None) -> Tensor:
    """The positions of a value that are no padding. like: [B, T] of what its rows are all positions of, if they are."""
    if like is not None:
        x, kept = in_positions(x, kept, like, ())
    return without(x, with_heads(kept, x) if x.dim() == 4 else kept)


class _Lane:
    """An interpreter that stops after a node."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.runner = Resting(gm)
        self.runner.args_iter = iter(inputs)
        self.nodes = iter(gm.graph.nodes)

    def until(self, name: str) -> tuple[fx.Node, Tensor]:
        """Run on up to the node of this name; the node and its value."""
        for node in self.nodes:
            value = self.runner.env[node] = self.runner.run_node(node)
            for dead in self.runner.user_to_last_uses.get(node, ()):
                del self.runner.env[dead]
            if node.name == name:
                assert isinstance(value, Tensor), node
                return node, value
        raise AssertionError(f"no node {name!r} after the ones before: the graphs have another order")
