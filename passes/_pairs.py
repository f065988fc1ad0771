"""Which channels of an attention's queries and keys must have one factor, and which tensors make them.

The products of RoPE allow one factor for each pair of channels that it turns into each other; the product of queries
and keys asks for that factor on the keys and its inverse on every query head that reads them. All this is joined
channel by channel, wherever it is made: what is left is a number of free factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qfx import graph
from qfx.graph import is_call
from qfx.passes import _channels as channels
from qfx.passes import _match as m
from qfx.passes import _sites as sites
from qfx.passes._sites import Norm, Piece

aten = torch.ops.aten

Run = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part(Piece):
    """Channels along `axis` of one tensor, and of its bias.

    runs: (first channel, step, count, factor of the first), the factors one after another. plus_one: the norm's gain is
    1 + weight.
    """

    weight: str
    bias: str | None
    axis: int
    runs: tuple[Run, ...]
    plus_one: bool = False

    def spread(self, factor: Tensor, size: int) -> Tensor:
        """f64 [size]: the factor of each channel, 1 for those of others."""
        found = torch.ones(size, dtype=torch.float64)
        for first, step, count, at in self.runs:
            found[first : first + step * (count - 1) + 1 : step] = factor[at : at + count].to(found)
        return found


@dataclass(frozen=True, eq=False)
class Factors:
    """What the factors of an attention scale. of_keys: int64 [kv_heads, head_dim], the factor of each key channel."""

    keys: tuple[Part, ...]
    queries: tuple[Part, ...]
    of_keys: Tensor

    @property
    def count(self) -> int:
        """Number of free factors."""
        return int(self.of_keys.max()) + 1


def factors_of(attention: fx.Node) -> Factors | str:
    """The free factors between queries and keys of an attention node; a reason where there are none."""
    return _Sides(attention).found()


class _Sides:
    """Queries and keys of one attention, channel by channel.

    A channel of a linear's result, or of a norm's, has a number; channels that must have one factor are joined.
    origins: where numbers start, with the first of each. way: nodes between them and the attention, with the numbers.
    """

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.origins: dict[fx.Node, tuple[int, sites.Weight | Norm]] = {}
        self.way: dict[fx.Node, Any] = {}
        self.count = 0
        self.joined: list[tuple[Sequence[int], Sequence[int]]] = []

    def found(self) -> Factors | str:
        """See `factors_of`."""
        sides: list[Tensor] = []
        for what, value in zip(("queries", "keys"), self.node.args, strict=False):
            numbers = channels.carried(value, self._start, _through, self.way)
            if isinstance(numbers, str):
                return f"{what}: {numbers}"
            listed = channels.along(numbers, -3, -1)
            if listed is None or numbers.dim() != 4 or min(listed) < 0:
                return f"{what}: their channels cannot be followed"
            sides.append(torch.tensor(listed).reshape(numbers.shape[-3], -1))
        q, k = sides
        if len(q) % len(k) or q.shape[1] != k.shape[1]:
            return "its heads do not read the keys in groups"
        self.joined.append((q.flatten().tolist(), k.repeat_interleave(len(q) // len(k), 0).flatten().tolist()))
        if reason := self._pairs() or self._shared(q, k) or self._foreign(q, k):
            return reason
        return self._factors(q, k)

    def _start(self, node: fx.Node) -> Any:
        """Numbers of a linear's or a norm's channels."""
        norm = sites.norm_of(node)
        if norm is None and graph.schema_name(node) != "aten::linear":
            return None
        held = sites.weight_of(node) if norm is None else norm
        if isinstance(held, str):
            return held
        numbers = channels.numbered(node, (-1,))
        if numbers is None:
            return "its sizes are not known"
        self.origins[node] = self.count, held
        self.count += numbers.shape[-1]
        return numbers + self.origins[node][0]

    def _pairs(self) -> str | None:
        """Join what RoPE turns into each other; a reason where that differs along another axis."""
        for node, numbers in self.way.items():
            if graph.schema_name(node) != "qfx::rope":
                continue
            listed = channels.along(numbers, -3, -1) or channels.along(numbers, -2, -1)  # heads before or after tokens
            if listed is None:
                return "its channels cannot be followed through RoPE"
            pairs = torch.tensor(listed).reshape(-1, numbers.shape[-1])
            halves = (pairs[:, ::2], pairs[:, 1::2]) if node.args[3] else pairs.chunk(2, -1)
            self.joined.append((halves[0].flatten().tolist(), halves[1].flatten().tolist()))
        return None

    def _shared(self, q: Tensor, k: Tensor) -> str | None:
        """What makes queries and keys both."""
        shared = channels.numbers_in(q) & channels.numbers_in(k)
        makers = [held.weight for first, held in self.origins.values() if shared and first <= max(shared)]
        return f"queries and keys are both made by {makers[-1]}" if makers else None

    def _foreign(self, q: Tensor, k: Tensor) -> str | None:
        """Who else reads these channels."""
        used, readers = channels.numbers_in(q) | channels.numbers_in(k), list[fx.Node]()
        below = set(self.way)
        for origin in self.origins:
            found, ends = channels.flow(origin, self.way[origin])
            readers += [user for user, at in ends if used & channels.numbers_in(found[at])]
            below -= set(found)
        readers += [user for node in below for user in node.users if not sites.reads_size(user)]
        for user in readers:
            if not (user is self.node or user in self.way) or self._twice(user):
                return f"%{user.name} reads them, too"
        return None

    def _twice(self, node: fx.Node) -> bool:
        """Does a call read these channels by an argument that was not followed, too?"""
        if is_call(node, aten.cat.default, aten.copy.default, aten.slice_scatter.default):
            return False
        followed = node.args[:2] if node is self.node else node.args[:1]
        given = [*node.args, *node.kwargs.values()]
        return any(one in self.way for one in given[len(followed) :] if isinstance(one, fx.Node))

    def _factors(self, q: Tensor, k: Tensor) -> Factors:
        labels = _components(self.count, self.joined)
        listed = labels[k].flatten().tolist()
        order = {label: i for i, label in enumerate(dict.fromkeys(listed))}
        of_keys = torch.tensor([order[label] for label in listed]).reshape(k.shape)
        factor = [order.get(label, -1) for label in labels.tolist()]
        keys, queries = (tuple(self._parts(channels.numbers_in(own), factor)) for own in (k, q))
        return Factors(keys, queries, of_keys)

    def _parts(self, own: set[int], factor: Sequence[int]) -> Iterable[Part]:
        """The tensors that make these channels."""
        for node, (start, held) in self.origins.items():
            size = self.way[node].shape[-1]
            runs = _runs({n - start: factor[n] for n in range(start, start + size) if n in own})
            if runs and isinstance(held, Norm):
                yield Part(held.weight, held.bias, 0, runs, held.plus_one)
            elif runs:
                assert isinstance(held, sites.Weight)
                yield Part(held.weight, held.bias, held.out, runs)


def _through(node: fx.Node) -> bool:
    """RoPE, and a product or quotient with anything else, element by element: a factor per channel passes by."""
    if graph.schema_name(node) == "qfx::rope":
        return True
    return is_call(node, *m.MUL, *m.DIV) and not node.kwargs and m.shape(node) == m.shape(node.args[0])


def _components(count: int, joined: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """int64 [count]: one label for all numbers that are joined."""
    from scipy.sparse import coo_array  # not above, so that `import qfx` does not wait for it
    from scipy.sparse.csgraph import connected_components

    a = np.concatenate([np.asarray(one, dtype=np.int64) for one, _ in joined])
    b = np.concatenate([np.asarray(other, dtype=np.int64) for _, other in joined])
    edges = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    return torch.from_numpy(connected_components(edges, directed=False)[1].astype(np.int64))


def _runs(pairs: Mapping[int, int]) -> tuple[Run, ...]:
    """channel -> factor as runs of every channel, or every other one (where neighbours are pairs of RoPE)."""
    left, found = dict(pairs), list[Run]()
    while left:
        first, at = next(iter(left.items()))
        step = 2 if left.get(first + 1) != at + 1 and left.get(first + 2) == at + 1 else 1
        count = 0
        while left.get(first + step * count) == at + count:
            del left[first + step * count]
            count += 1
        found.append((first, step, count, at))
    return tuple(found)
