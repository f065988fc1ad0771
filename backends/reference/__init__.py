"""The reference backend: torch itself runs the graph. It is the oracle that every other backend is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx import graph
from qfx.errors import Note


class Reference:
    """A graph in normal form, run by torch. Called with the graph's inputs in placeholder order; returns a tuple."""

    def __init__(self, gm: fx.GraphModule) -> None:
        gm.recompile()
        self._gm = gm
        self.notes: list[Note] = []
        self.kernels = {
            n.name: f"{graph.schema_name(n) or graph.op_name(n)} (reference)"
            for n in gm.graph.nodes
            if n.op == "call_function"
        }

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with torch.no_grad():
            return tuple(self._gm(*inputs))


def supports(node: fx.Node) -> str | None:
    """Why a node cannot be lowered, or None: torch runs everything."""
    return None


def lower(gm: fx.GraphModule, *, strict: bool = False) -> Reference:
    """Lower by handing the graph to torch. Nothing falls back, so `strict` changes nothing."""
    return Reference(gm)
