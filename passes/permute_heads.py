"""Put the heads of an attention in another order. Exact: heads meet only in the output projection, which is a sum.

    q: rows [h0 h1 h2 h3]    k, v: rows [g0 g1]    o: columns [h0 h1 h2 h3]      h0 and h1 read g0, h2 and h3 read g1
    ->
    q: rows [h3 h2 h0 h1]    k, v: rows [g1 g0]    o: columns [h3 h2 h0 h1]

KV heads take their query heads with them, whose order within the group is free. Biases, norms over all heads, sinks,
slopes and tables of position biases go along (`qfx.analysis.movable` finds them). Cached keys and values have the new
order, too: a cache that was filled before is no longer valid. The graph's text stays as it is.
`qfx.rewrites.permute` chooses the order by the formats of the heads, so that equal ones lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qfx import graph
from qfx.passes import _edits as edits
from qfx.passes._sites import Piece, Record


@dataclass(frozen=True)
class Moved(Piece):
    """One tensor's channels of the heads along `axis`.

    weight: its FQN. bias: FQN of a vector that has the same channels. starts: the first channel at each place. width:
    channels of a head. order: the head that comes to each place.
    """

    weight: str
    bias: str | None
    axis: int
    starts: tuple[int, ...]
    width: int
    order: tuple[int, ...]

    def index(self, size: int) -> Tensor:
        """int64 [size]: the channel that comes to each place. ValueError for an order or channels that do not fit."""
        found = torch.arange(size)
        if sorted(self.order) != list(range(len(self.starts))) or max(self.starts) + self.width > size:
            raise ValueError(
                f"the heads of {self.weight!r} cannot be ordered: expected an order of {len(self.starts)} heads of "
                f"{self.width} among {size} channels, found {list(self.order)} at {list(self.starts)}"
            )
        for start, head in zip(self.starts, self.order, strict=True):
            found[start : start + self.width] = torch.arange(self.starts[head], self.starts[head] + self.width)
        return found


@dataclass(frozen=True)
class Site(Record):
    """The heads of one attention in another order: everything that moves."""

    NAME: ClassVar[str] = "permute-heads"
    NESTED: ClassVar[Mapping[str, Callable[..., Any]]] = {"moved": Moved.of}

    attention: str
    moved: tuple[Moved, ...]


def apply(module: nn.Module, site: Site) -> None:
    """Put the heads in their new order, in a graph or a live model. Values are moved, never computed."""
    for part in site.moved:
        _move(module, part.weight, part.axis, part)
        if part.bias is not None:
            _move(module, part.bias, 0, part)


def _move(module: nn.Module, fqn: str, axis: int, part: Moved) -> None:
    old = graph.get_tensor(module, fqn).detach()
    edits.put(module, fqn, old.index_select(axis, part.index(old.shape[axis]).to(old.device)))
