"""What each call of a prepared graph costs: its weight, products, activations and cache.

%linear: f32[s0,s1,512] = aten.linear(%x, @layers.0.up.weight)
->
NodeCost("layers.0.up", "linear", "layers.0", weight="layers.0.up.weight", rows=batch*sequence,
         macs=98304*batch*sequence, read=768*batch*sequence, written=2048*batch*sequence)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qfx import graph
from qfx.allocation.causal import is_causal
from qfx.allocation.sizes import CONTEXT, SEQUENCE, Expr, Sizes
from qfx.errors import Note
from qfx.passes import _match as m
from qfx.reporting.rows import KINDS
from qfx.rounding.blocks import layer_of

aten = torch.ops.aten

_CACHED = ("qfx::cached_attention", "qfx::quantized_cached_attention")
_ADDING = ("aten::addmm", "aten::baddbmm")
_VIEWS = {
    *m.RESHAPES, *m.TRANSPOSES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.alias.default, aten.detach.default, aten.unflatten.int,
    aten.flatten.using_ints, aten.dropout.default,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One parameter or buffer. names: of the nodes that multiply by it, as plans name them; shape: as they see it."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    floating: bool

    @property
    def elements(self) -> int:
        """Number of its values."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Cache:
    """Keys and values of one attention: heads, sizes of a key and a value; length: tokens of each sequence at the end
    of a call, new: those that the call adds (0 for keys of an encoder, which are made once)."""

    heads: int
    widths: tuple[int, int]
    length: Expr
    new: Expr


@dataclass(frozen=True)
class NodeCost:
    """One call.

    name: as reports name it. kind: of `qfx.reporting.rows.KINDS`, "other", or "view" (free). weight: key of
    `Costs.stored`, "" where there is none. parameters: keys of the others that it reads (bias). rows: of its input, for
    a product with a weight. macs: multiply-accumulates. read, written: bytes of activations.
    """

    name: str
    kind: str
    layer: str
    weight: str = ""
    parameters: tuple[str, ...] = ()
    rows: Expr = 0
    macs: Expr = 0
    read: Expr = 0
    written: Expr = 0
    cache: Cache | None = None


Read = tuple[tuple[NodeCost, ...], dict[str, Stored], tuple[tuple[Expr, int, int], ...], int, tuple[Note, ...]]


def read(gm: fx.GraphModule) -> Read:
    """The fields of `Costs` of a prepared graph."""
    return _Reader(gm).read()


class _Reader:
    """Reads one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.sizes, self.notes = gm, Sizes(gm), list[Note]()
        self.calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        self.attentions = {n: self._cache(n) for n in self.calls if _kind(n) == "attention"}
        has_cache = any(found is not None and found.new != 0 for found in self.attentions.values())
        if not has_cache:  # keys of an encoder are kept only where a decoder reads them
            self.attentions = dict.fromkeys(self.attentions)

    def read(self) -> Read:
        nodes = tuple(self._node(node) for node in self.calls)
        floats = [graph.val(n) for n in self.calls if isinstance(graph.val(n), Tensor)]
        size = next((v.element_size() for v in floats if v.is_floating_point()), 4)
        return nodes, self._stored(), self._lives(), size, tuple(self.notes)

    def _node(self, node: fx.Node) -> NodeCost:
        kind, name, layer = _kind(node), graph.fqn_of(node), layer_of(node)
        fake = graph.val(node)
        if (
            node.target in _VIEWS
            or node.target is operator.getitem
            or not isinstance(fake, Tensor | tuple | list)
            or self._is_kept(node)
        ):
            return NodeCost(name, "view", layer)
        weight = self._weight(node, kind)
        parameters = [n for n in node.all_input_nodes if n.op == "get_attr"]
        x = node.args[1 if kind == "embedding" else 0] if node.args else None
        return NodeCost(
            name,
            kind,
            layer,
            weight="" if weight is None else str(weight.target),
            parameters=tuple(str(n.target) for n in parameters if n is not weight),
            rows=self._rows(x, kind) if weight is not None else 0,
            macs=self._macs(node, kind),
            read=self._inputs(node, kind),
            written=self._activation(node.meta.get("val")) if kind != "attention" else self._written(node),
            cache=self.attentions.get(node),
        )

    def _weight(self, node: fx.Node, kind: str) -> fx.Node | None:
        found = graph.weight_of(node)
        if found is None and kind == "matmul":
            operands = node.args[1:] if graph.schema_name(node) in _ADDING else node.args
            found = next((w for arg in operands if (w := graph.parameter_behind(arg)) is not None), None)
        return found

    def _stored(self) -> dict[str, Stored]:
        names: dict[str, list[str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.calls:
            weight = graph.weight_of(node)
            if weight is not None and _kind(node) != "other":
                key = str(weight.target)
                names.setdefault(key, []).append(graph.fqn_of(node))
                operand = node.args[0 if _kind(node) == "embedding" else 1]
                shapes.setdefault(key, tuple(int(size) for size in graph.val(operand).shape))
        found = {}
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                key, fake = str(node.target), graph.val(node)
                shape = shapes.get(key, tuple(int(size) for size in fake.shape))
                unique = tuple(dict.fromkeys(names.get(key, ())))
                found[key] = Stored(unique, shape, fake.element_size(), fake.is_floating_point())
        return found

    def _rows(self, x: Any, kind: str) -> Expr:
        fake = graph.val(x)
        if not isinstance(fake, Tensor):
            return 0
        count = self.sizes.numel(fake)
        return count if kind == "embedding" or fake.dim() == 0 else sympy.Mul(*self.sizes.shape(fake)[:-1])

    def _macs(self, node: fx.Node, kind: str) -> Expr:
        name, shape = graph.schema_name(node), self.sizes.shape
        if kind == "attention":
            q, _, v = (shape(graph.val(arg)) for arg in node.args[:3])
            return sympy.Mul(*q[:-1]) * self._keys(node) * (q[-1] + v[-1])
        if kind == "conv":
            turned = "transpose" in name or (name == "aten::convolution" and bool(node.args[6]))
            each = sympy.Mul(*shape(graph.val(node.args[1]))[1:])
            return each * self.sizes.numel(graph.val(node.args[0] if turned else node))
        if kind not in ("linear", "experts", "matmul"):
            return 0
        if name == "aten::einsum":
            reason = "the work of an einsum that is no plain product is not counted"
            self.notes.append(Note(graph.fqn_of(node), reason, "spell it as a matmul", minor=True))
            return 0
        left = graph.val(node.args[1 if name in _ADDING else 0])
        return self.sizes.numel(graph.val(node)) * self.sizes.of(left.shape[-1])

    def _cache(self, node: fx.Node) -> Cache | None:
        """What an attention keeps; keys of other tokens than the queries' (an encoder's) with new = 0."""
        q, k, v = (graph.val(arg) for arg in node.args[:3])
        if not all(isinstance(value, Tensor) and value.dim() == 4 for value in (q, k, v)):
            return None
        heads, widths = int(k.shape[1]), (int(k.shape[3]), int(v.shape[3]))
        if graph.schema_name(node) in _CACHED or self._appended(node.args[1]):
            return Cache(heads, widths, CONTEXT + SEQUENCE, SEQUENCE)
        tokens, keys = self.sizes.of(q.shape[2]), self.sizes.of(k.shape[2])
        if tokens != keys:
            return Cache(heads, widths, keys, 0)
        return Cache(heads, widths, CONTEXT + keys, keys) if is_causal(node, self.sizes, self.notes) else None

    def _appended(self, node: Any) -> bool:
        """A cached tensor and new tokens put together."""
        is_cat = graph.is_call(node, aten.cat.default)
        return is_cat and any(part in self.sizes.pasts for part in node.args[0])

    def _is_kept(self, node: fx.Node) -> bool:
        """The concatenation that makes a cache grow: counted where the cache is."""
        return self._appended(node)

    def _keys(self, node: fx.Node) -> Expr:
        cache = self.attentions.get(node)
        return self.sizes.of(graph.val(node.args[1]).shape[-2]) if cache is None else cache.length

    def _inputs(self, node: fx.Node, kind: str) -> Expr:
        if kind == "embedding":
            return self._activation(graph.val(node.args[1]))
        inputs: Sequence[fx.Node] = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if self.attentions.get(node) is not None:  # keys and values are counted as cache
            inputs = [n for n in inputs if n not in node.args[1:3] and n not in self.sizes.pasts]
        behind = [n for n in inputs if graph.parameter_behind(n) is None]
        return sympy.Add(*(self._activation(graph.val(n)) for n in behind))

    def _written(self, node: fx.Node) -> Expr:
        """The result of attention, without the grown caches."""
        fake = graph.val(node)
        return self._activation(fake[0] if isinstance(fake, tuple | list) else fake)

    def _activation(self, fake: Any) -> Expr:
        if isinstance(fake, tuple | list):
            return sympy.Add(*(self._activation(one) for one in fake))
        return self.sizes.numel(fake) * fake.element_size() if isinstance(fake, Tensor) else 0

    def _lives(self) -> tuple[tuple[Expr, int, int], ...]:
        """(bytes, first, last call) of each tensor that is made here; views keep what they look at alive."""
        base: dict[fx.Node, fx.Node] = {}
        last: dict[fx.Node, int] = {}
        made: dict[fx.Node, int] = {}
        for number, node in enumerate(self.calls):
            is_view = node.target in _VIEWS or node.target is operator.getitem
            source = node.all_input_nodes[0] if is_view and node.all_input_nodes else node
            base[node] = base.get(source, source)
            if base[node] is node and not self._is_kept(node):
                made[node] = number
            for read in node.all_input_nodes:
                last[base.get(read, read)] = number
        end = len(self.calls) - 1
        for result in self.gm.graph.output_node().all_input_nodes:
            last[base.get(result, result)] = end
        return tuple((self._size(node), at, max(at, last.get(node, at))) for node, at in made.items())

    def _size(self, node: fx.Node) -> Expr:
        return self._written(node) if _kind(node) == "attention" else self._activation(graph.val(node))


def _kind(node: fx.Node) -> str:
    name = graph.schema_name(node)
    return "attention" if name in _CACHED else KINDS.get(name, "other")
