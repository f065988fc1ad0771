"""Which rows and columns of which linears belong to the heads of each attention.

A tensor of channel numbers follows the calls that split heads, transpose and slice (see `passes/_channels.py`), so that
fused projections, grouped queries and interleaved layouts need no special case. RoPE (of a part of a head, too), scales
and norms leave a row's result in its head's channels, and are passed through: what a head's rows lose in few bits is
still told by that head. `qfx.analysis.movable` says which of them allow another order of heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qfx import graph
from qfx.errors import Note
from qfx.passes import _channels as channels
from qfx.passes import _match as m
from qfx.passes import _sites as sites

_PER_HEAD = ("qfx::rope",)


@dataclass(frozen=True)
class Projection:
    """The linear that a role of an attention comes from, or goes into.

    fqn: its name. starts: for each head the first of its `width` output rows (input columns, for the role "o"). size:
    number of all its rows (columns).
    """

    fqn: str
    starts: tuple[int, ...]
    width: int
    size: int

    @property
    def cuts(self) -> bool:
        """Equal parts of the whole weight, each of them one head's at most: a format for each head can be written."""
        return self.size % self.width == 0 and all(start % self.width == 0 for start in self.starts)


@dataclass(frozen=True)
class Attention:
    """One attention. q, k, v, o: None where the linear could not be found. groups: KV head of each query head."""

    name: str
    node: fx.Node
    q: Projection | None
    k: Projection | None
    v: Projection | None
    o: Projection | None
    groups: tuple[int, ...]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.groups)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return max(self.groups) + 1


def find(gm: fx.GraphModule) -> tuple[list[Attention], list[Note]]:
    """Every attention of a prepared graph whose number of heads is known, and notes about roles without a linear."""
    found: list[Attention] = []
    notes: list[Note] = []
    for node in gm.graph.nodes:
        if graph.schema_name(node) not in sites.ATTENTION:
            continue
        heads, kv_heads = _count(node.args[0]), _count(node.args[1])
        if not heads or not kv_heads or heads % kv_heads:
            notes.append(_note(node, "the number of its heads is not fixed"))
            continue
        roles: dict[str, Projection | None] = {}
        for role, value in zip("qkv", node.args, strict=False):
            assert isinstance(value, fx.Node)
            roles[role] = _told(notes, node, role, _source(value))
        roles["o"] = _told(notes, node, "o", _output(node))
        groups = tuple(h * kv_heads // heads for h in range(heads))
        found.append(Attention(graph.fqn_of(node), node, **roles, groups=groups))
    return found, notes


def _told(notes: list[Note], node: fx.Node, role: str, projection: Projection | str) -> Projection | None:
    if isinstance(projection, str):
        notes.append(_note(node, f"{role!r} cannot be split by heads: {projection}"))
        return None
    return projection


def _note(node: fx.Node, reason: str) -> Note:
    return sites.note(node, reason, "nothing: its linears have one format each")


def _count(value: object) -> int:
    size = channels.known(m.shape(value)[-3]) if m.rank(value) >= 3 else None
    return size if isinstance(size, int) else 0


def _source(value: fx.Node) -> Projection | str:
    """The linear that gives q, k or v [.., heads, tokens, width], and the rows of each head."""
    linears: dict[fx.Node, None] = {}

    def start(node: fx.Node) -> Tensor | str | None:
        if graph.schema_name(node) != "aten::linear":
            return None
        linears[node] = None
        numbers = channels.numbered(node, (-1,))
        return "its sizes are not known" if numbers is None else numbers

    carried = channels.carried(value, start, lambda node: _keeps_heads(node) or _scales(node), {})
    if isinstance(carried, str):
        return carried
    if not isinstance(carried, Tensor) or carried.dim() < 3 or len(linears) != 1:
        return "its channels cannot be followed"
    linear = next(iter(linears))
    return _projection(linear, list(carried.unbind(-3)), m.known(m.shape(linear)[-1]) or 0)


def _keeps_heads(node: fx.Node) -> bool:
    """RoPE, rotations of a head's channels, and norms of the last axis: what a row gives stays with its head."""
    name = graph.schema_name(node)
    if name == "qfx::hadamard":
        return node.args[1] == m.shape(node)[-1] and m.rank(node) == 4
    if name in ("aten::rms_norm", "aten::layer_norm"):
        sizes = node.args[1]
        return isinstance(sizes, list | tuple) and len(sizes) == 1 and m.rank(node) >= 3
    return name in _PER_HEAD


def _scales(node: fx.Node) -> bool:
    """A product, quotient or sum with a number or a parameter, element by element."""
    if not graph.is_call(node, *m.MUL, *m.DIV, *m.ADD) or m.shape(node) != m.shape(node.args[0]):
        return False
    other = m.skip_casts(node.args[1])
    return not isinstance(other, fx.Node) or other.op == "get_attr"


def _output(node: fx.Node) -> Projection | str:
    """The linear that reads the heads, and the columns of each query head."""
    numbers = channels.numbered(node, (-3, -1))
    if numbers is None or numbers.dim() < 3:
        return "its sizes are not known"
    reader = channels.one_linear(node, numbers)
    if reader is None:
        return "its result is not read by one linear alone"
    linear, columns = reader
    if columns is None:
        return "the output projection reads it in an order that cannot be followed"
    width = numbers.shape[-1]
    place = {number: column for column, number in enumerate(columns)}
    heads = [torch.tensor([place[h * width + c] for c in range(width)]) for h in range(numbers.shape[-3])]
    return _projection(linear, heads, len(columns))


def _projection(linear: fx.Node, heads: list[Tensor], size: int) -> Projection | str:
    """The runs of channels of the heads, where each is one run and all have one width."""
    runs = [sorted(channels.numbers_in(head)) for head in heads]
    width = len(runs[0])
    if any(run != list(range(run[0], run[0] + width)) for run in runs):
        return "the channels of a head do not lie together"
    return Projection(graph.fqn_of(linear), tuple(run[0] for run in runs), width, size)


def projections(attention: Attention) -> Iterator[tuple[str, Projection]]:
    """(role, projection) of those that were found, in the order q, k, v, o."""
    for role in "qkvo":
        projection: Projection | None = getattr(attention, role)
        if projection is not None:
            yield role, projection
