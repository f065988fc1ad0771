"""Error of each quantized node: the float and the quantized form of one compiled graph, run on the same inputs.

    with sqnr.measuring() as collector:
        compiled(**batch)                   # every compiled graph that runs inside adds what it finds
    collector.of(record)                    # name of a node -> decibel

Errors add up along the graph: a node's error has those of the nodes before it in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.measure import decibel, energies

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
    """Energies of each node that is quantized in one graph and, under the same name, float in the other.

    Errors of earlier nodes are part of a node's difference. Both graphs run in torch and change none of their inputs.
    """
    float_nodes = {n.name: n for n in plain.graph.nodes if n.op == "call_function"}
    pairs = {
        n.name: graph.fqn_of(n)
        for n in quantized.graph.nodes
        if n.op == "call_function" and n.name in float_nodes and n.target != float_nodes[n.name].target
    }
    wanted = _outputs(plain, inputs, pairs)
    found: Energies = {}
    for name, output in _outputs(quantized, inputs, pairs).items():
        signal, noise = energies(wanted[name], output)
        before = found.get(pairs[name], (0.0, 0.0))
        found[pairs[name]] = (before[0] + signal, before[1] + noise)
    return found


class _Keeper(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: Mapping[str, str]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, Tensor):
            self.kept[n.name] = value
        return value


def _outputs(gm: fx.GraphModule, inputs: Sequence[Any], wanted: Mapping[str, str]) -> dict[str, Tensor]:
    keeper = _Keeper(gm, wanted)
    with torch.no_grad():
        keeper.run(*inputs)
    return keeper.kept
