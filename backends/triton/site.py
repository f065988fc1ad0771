"""A node that is being lowered, and what rules need to put others in its place.

A rule says by which kernel the node runs then, or leaves it and says why it cannot be taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qfx import graph
from qfx.backends.triton.device import Device
from qfx.passes._build import call, take_place
from qfx.passes._match import arguments

PREFIX = "triton"


@dataclass(frozen=True)
class Taken:
    """A node was replaced. kernel: for the report. told: how its computation is not what one might expect, else ""."""

    kernel: str
    told: str = ""


@dataclass(frozen=True)
class Site:
    """A node that is being lowered."""

    gm: fx.GraphModule
    node: fx.Node
    device: Device

    @property
    def given(self) -> dict[str, Any]:
        """The node's arguments by name."""
        return arguments(self.node)

    def tensor(self, node: fx.Node | None) -> Tensor | None:
        """The constant behind an argument."""
        return None if node is None else graph.get_tensor(self.gm, str(node.target)).detach()

    def constant(self, tensor: Tensor | None) -> fx.Node | None:
        """A node that holds a tensor."""
        if tensor is None:
            return None
        held = self.gm.meta.setdefault("qfx_triton_constants", itertools.count())
        return graph.add_tensor(self.gm, f"{PREFIX}.t{next(held)}", tensor, self.node)

    def put(self, target: Any, *args: Any, kernel: str) -> Taken:
        """Replace the node by a call."""
        with self.gm.graph.inserting_before(self.node):
            new = call(self.gm, target, *args, like=self.node)
        take_place(self.node, new)
        return Taken(kernel)


Rule = Callable[[Site], Taken | str]


def once(site: Site, key: str, make: Callable[[], Sequence[Tensor | None]]) -> list[fx.Node | None]:
    """Constants made for a key (a weight and its layout): the first call makes them, others share them."""
    made: dict[str, list[Tensor | None]] = site.gm.meta.setdefault("qfx_triton_made", {})
    names: dict[str, list[fx.Node | None]] = site.gm.meta.setdefault("qfx_triton_nodes", {})
    if key not in made:
        made[key] = list(make())
        names[key] = [site.constant(t) for t in made[key]]
    nodes = names[key]
    for node in nodes:
        if node is not None and _stands_after(node, site.node):
            site.node.prepend(node)
    return nodes


def _stands_after(node: fx.Node, other: fx.Node) -> bool:
    return next(n for n in node.graph.nodes if n is node or n is other) is other
