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
from qfx.backends.triton import shared
from qfx.backends.triton.device import Device
from qfx.passes._build import call, take_place
from qfx.passes._match import arguments

PREFIX = "triton"
SHARES = "qfx_triton_shares"  # in the meta of a graph that holds no second copy of what another one holds


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
        return None if tensor is None else graph.add_tensor(self.gm, self.name(), tensor, self.node)

    def name(self) -> str:
        """A name that no constant of the graph has yet."""
        return f"{PREFIX}.t{next(self.gm.meta.setdefault('qfx_triton_constants', itertools.count()))}"

    def put(self, target: Any, *args: Any, kernel: str) -> Taken:
        """Replace the node by a call."""
        with self.gm.graph.inserting_before(self.node):
            new = call(self.gm, target, *args, like=self.node)
        take_place(self.node, new)
        return Taken(kernel)


Rule = Callable[[Site], Taken | str]


def once(site: Site, key: str, make: Callable[[], Sequence[Tensor | None]]) -> list[fx.Node | None]:
    """Constants made for a key (a weight and its layout): the first call makes them, others share them.

    So do other graphs, where this one is to share them (see `shared`).
    """
    made: dict[str, list[tuple[str, Tensor] | None]] = site.gm.meta.setdefault("qfx_triton_made", {})
    if key not in made:
        new = make()
        if site.gm.meta.get(SHARES):
            new = [None if t is None else shared.of_all(key, i, t) for i, t in enumerate(new)]
        made[key] = [None if t is None else (site.name(), t) for t in new]
    return [None if one is None else graph.add_tensor(site.gm, *one, site.node) for one in made[key]]
