"""What a graph costs, node by node, as expressions in batch, sequence and context (see `qfx.allocation.sizes`).

    costs = Costs.of(gm)                                          a prepared graph, with or without its cache
    costs.weights({"lm_head": Format.parse("i8/ch")}, rest=...)   bytes of all parameters
    costs.cache(Format.parse("i8"))                               3072*batch*(context + sequence)
    costs.total(formats).at(batch=1, sequence=1, context=1000)    one token of decoding

Multiply-accumulates of attention are those of a kernel that masks after the product; one that skips what is masked has
half of them at most. Traffic counts each value once where it is written and once for each call that reads it; views are
free. A table of embeddings is read by rows, experts as far as there are rows for them, other weights whole.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from qfx import graph
from qfx.allocation.causal import is_causal
from qfx.allocation.sizes import BATCH, CONTEXT, SEQUENCE, Expr, Sizes, checked, numbers
from qfx.annotation import Formats, from_json
from qfx.blocks import layer_of
from qfx.errors import Note, explain, nearest
from qfx.format import Format
from qfx.passes import _match as m
from qfx.rows import KINDS
from qfx.segments import along, segments

aten = torch.ops.aten

_CACHED = ("qfx::cached_attention", "qfx::quantized_cached_attention")
_ADDING = ("aten::addmm", "aten::baddbmm")
_VIEWS = {
    *m.RESHAPES, *m.TRANSPOSES, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.expand.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default,
    aten.chunk.default, aten.unbind.int, aten.alias.default, aten.detach.default, aten.unflatten.int,
    aten.flatten.using_ints, aten.dropout.default,
}  # fmt: skip

Asked = Mapping[str, Any]  # name of a node -> formats of its weight, or role -> formats


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

    name: as reports name it. kind: of `qfx.rows.KINDS`, "other", or "view" (free). weight: key of `Costs.stored`, ""
    where there is none. parameters: keys of the others that it reads (bias). rows: of its input, for a product with a
    weight. macs: multiply-accumulates. read, written: bytes of activations. x: number of its own in the graph's order.
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


@dataclass(frozen=True)
class Totals:
    """Sums over a graph: bytes of weights and cache, multiply-accumulates, bytes moved. `at` gives their numbers.

    traffic is that of one call: weights_read + activations + cache_moved.
    """

    weights: int
    cache: Expr
    macs: Expr
    weights_read: Expr
    activations: Expr
    cache_moved: Expr

    @property
    def traffic(self) -> Expr:
        """Bytes that one call moves."""
        return self.weights_read + self.activations + self.cache_moved

    def at(self, *, batch: int = 1, sequence: int = 1, context: int = 0, **sizes: int) -> Totals:
        """The same as numbers. Raises ValueError for what is no size, and for one that is missing."""
        given = {"batch": batch, "sequence": sequence, "context": context, **sizes}
        names = ("cache", "macs", "weights_read", "activations", "cache_moved")
        found = numbers([getattr(self, name) for name in names], given)
        return replace(self, **{name: round(value) for name, value in zip(names, found, strict=True)})


@dataclass(frozen=True)
class Costs:
    """The costs of a prepared graph. nodes: its calls in order. stored: parameters by name. lives: for each tensor that
    a call makes its bytes, the number of that call, and that of the last call which reads it. itemsize: of the floats
    in the graph. notes: what could not be told."""

    nodes: tuple[NodeCost, ...]
    stored: Mapping[str, Stored]
    lives: tuple[tuple[Expr, int, int], ...] = field(repr=False)
    itemsize: int
    notes: tuple[Note, ...] = ()

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Costs:
        """Of a prepared graph: as `capture_export` gives it, or with its cache as `capture_decoder` does.

        In a graph without a cache as input, causal attention over its own tokens is taken to have one, of `context`
        tokens.
        """
        return _Reader(gm).costs()

    @property
    def caches(self) -> tuple[Cache, ...]:
        """Of each attention that has one."""
        return tuple(node.cache for node in self.nodes if node.cache is not None)

    def weights(self, formats: Asked | None = None, *, rest: Format | None = None) -> int:
        """Bytes of all parameters: those named in these formats (see `formats_of`), scales and padding included.

        rest: a plain format in which all other floats are held; None leaves them as they are. A parameter that several
        nodes read counts once. Raises ValueError for a name that no node has, and for a rest with a scale.
        """
        chosen = self._chosen(formats, rest)
        return sum(self._bytes(key, chosen, rest) for key in self.stored)

    def cache(self, formats: Format | Mapping[str, Format] | None = None) -> Expr:
        """Bytes of the cache of all layers after a call: of one format, or of "k" and "v"; None is the graph's floats.

        0 for a graph without causal attention.
        """
        return sympy.Add(*(BATCH * c.length * _token_bytes(c, formats, self.itemsize) for c in self.caches))

    def total(
        self, formats: Asked | None = None, cache: Format | Mapping[str, Format] | None = None, *,
        rest: Format | None = None,
    ) -> Totals:  # fmt: skip
        """All of one call together."""
        moved = self.moved(formats, cache, rest=rest)
        return Totals(
            weights=self.weights(formats, rest=rest),
            cache=self.cache(cache),
            macs=sympy.Add(*(node.macs for node in self.nodes)),
            weights_read=sympy.Add(*(one[0] for one in moved)),
            activations=sympy.Add(*(one[1] for one in moved)),
            cache_moved=sympy.Add(*(one[2] for one in moved)),
        )

    def at(self, *, batch: int = 1, sequence: int = 1, context: int = 0, **sizes: int) -> Totals:
        """`total().at(...)`: the float graph at these sizes."""
        return self.total().at(batch=batch, sequence=sequence, context=context, **sizes)

    def moved(
        self, formats: Asked | None = None, cache: Format | Mapping[str, Format] | None = None, *,
        rest: Format | None = None, held: Any = None,
    ) -> list[tuple[Expr, Expr, Expr]]:  # fmt: skip
        """For each node the bytes of (weights, activations, cache) that it moves.

        held: a function Format -> Format, for a device that holds codes in more bits than the file does.
        """
        chosen = self._chosen(formats, rest)
        size = self.itemsize if rest is None else rest.bits // 8
        found = []
        for node in self.nodes:
            weights = self._read(node, chosen, rest, held)
            moved = 0 if node.cache is None else _cache_moved(node.cache, cache, size)
            found.append((weights, (node.read + node.written) * sympy.Rational(size, self.itemsize), moved))
        return found

    def activations(self, *, batch: int = 1, sequence: int = 1, context: int = 0, **sizes: int) -> int:
        """Most bytes of activations that are alive at once in one call, each held until its last reader is done."""
        given = {"batch": batch, "sequence": sequence, "context": context, **sizes}
        values = numbers([size for size, _, _ in self.lives], given)
        change = [0.0] * (len(self.nodes) + 1)
        for value, (_, start, stop) in zip(values, self.lives, strict=True):
            change[start] += value
            change[stop + 1] -= value
        most = now = 0.0
        for step in change:
            now += step
            most = max(most, now)
        return round(most)

    def memory(
        self, formats: Asked | None = None, cache: Format | Mapping[str, Format] | None = None, *,
        rest: Format | None = None, batch: int = 1, sequence: int = 1, context: int = 0, **sizes: int,
    ) -> int:  # fmt: skip
        """Bytes that a device must have: weights, cache after the call, and activations at their peak."""
        given = checked({"batch": batch, "sequence": sequence, "context": context, **sizes})
        kept = numbers([self.cache(cache)], given)[0]
        return self.weights(formats, rest=rest) + round(kept) + self.activations(**given)

    def _chosen(self, formats: Asked | None, rest: Format | None) -> dict[str, Formats]:
        """Formats by the key of the parameter."""
        if rest is not None and not rest.is_plain:
            raise ValueError(f"rest is a plain format (f32, f16, bf16), found {str(rest)!r}")
        by_name = {name: key for key, one in self.stored.items() for name in one.names}
        chosen: dict[str, Formats] = {}
        for name, asked in (formats or {}).items():
            if name not in by_name:
                raise ValueError(f"no node with a weight is called {name!r}, {nearest(name, by_name)}")
            fmt = weight_format(asked)
            if fmt is not None:
                chosen.setdefault(by_name[name], fmt)
        return chosen

    def _bytes(self, key: str, chosen: Mapping[str, Formats], rest: Format | None, held: Any = None) -> int:
        one = self.stored[key]
        if key in chosen:
            return nbytes(chosen[key], one.shape, one.names[0], held)
        return one.elements * (one.itemsize if rest is None or not one.floating else rest.bits // 8)

    def _read(self, node: NodeCost, chosen: Mapping[str, Formats], rest: Format | None, held: Any) -> Expr:
        """Bytes of parameters that one call of a node reads."""
        beside = sum(self._bytes(key, chosen, rest) for key in node.parameters)
        if not node.weight:
            return beside
        whole, shape = self._bytes(node.weight, chosen, rest, held), self.stored[node.weight].shape
        if node.kind == "embedding":
            return beside + sympy.Rational(whole, shape[0]) * node.rows
        if node.kind == "experts":
            return beside + sympy.Rational(whole, shape[0]) * sympy.Min(shape[0], node.rows)
        return beside + whole


def role_formats(asked: Any) -> dict[str, Formats]:
    """Formats by role out of an entry of `Asked`: formats of the weight, or of each role; texts as plans hold them too."""
    is_roles = isinstance(asked, Mapping) and not {"columns", "outliers"} & set(asked)
    found = asked if is_roles else {"w": asked}
    return {r: from_json(one) if isinstance(one, str | list | Mapping) else one for r, one in found.items()}


def weight_format(asked: Any) -> Formats | None:
    """The formats of a weight out of an entry of `Asked`: itself, or that of role "w"; None where it has none."""
    return role_formats(asked).get("w")


def nbytes(formats: Formats, shape: Sequence[int], name: str, held: Any = None) -> int:
    """Bytes of a weight in a format, or cut into several: rows, columns, outliers. Raises ValueError where it does not
    fall into equal parts."""
    give = (lambda fmt: fmt) if held is None else held
    if isinstance(formats, Format):
        return int(give(formats).nbytes(shape))
    axis = along(formats)
    parts = segments(formats, shape, name)
    return sum(give(p.format).nbytes((p.size, shape[1]) if axis == 0 else (shape[0], p.size)) for p in parts)


def _token_bytes(cache: Cache, formats: Format | Mapping[str, Format] | None, itemsize: int) -> int:
    """Bytes of one token's keys and values. Scales fixed for a channel or tensor are of no token, and not counted."""
    found = 0
    for role, width in zip("kv", cache.widths, strict=True):
        fmt = formats.get(role) if isinstance(formats, Mapping) else formats
        if fmt is None:
            row = width * itemsize
        else:
            by_token = fmt.granularity == "tok" or fmt.group is not None
            row = fmt.nbytes((1, width)) if by_token else fmt.row_bytes(width)
        found += cache.heads * row
    return found


def _cache_moved(cache: Cache, formats: Format | Mapping[str, Format] | None, itemsize: int) -> Expr:
    """All of it is read, the new part is written."""
    return BATCH * (cache.length + cache.new) * _token_bytes(cache, formats, itemsize)


class _Reader:
    """Makes the costs of one graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.sizes, self.notes = gm, Sizes(gm), list[Note]()
        self.calls = [n for n in gm.graph.nodes if n.op == "call_function"]
        self.attentions = {n: self._cache(n) for n in self.calls if _kind(n) == "attention"}
        has_cache = any(found is not None and found.new != 0 for found in self.attentions.values())
        if not has_cache:  # keys of an encoder are kept only where a decoder reads them
            self.attentions = dict.fromkeys(self.attentions)

    def costs(self) -> Costs:
        nodes = tuple(self._node(node) for node in self.calls)
        floats = [graph.val(n) for n in self.calls if isinstance(graph.val(n), Tensor)]
        size = next((v.element_size() for v in floats if v.is_floating_point()), 4)
        return Costs(nodes, self._stored(), self._lives(), size, tuple(self.notes))

    def _node(self, node: fx.Node) -> NodeCost:
        kind, name, layer = _kind(node), graph.fqn_of(node), layer_of(node)
        fake = graph.val(node)
        if node.target in _VIEWS or not isinstance(fake, Tensor | tuple | list) or self._is_kept(node):
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
            read=self._read(node, kind),
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
            q, k, v = (shape(graph.val(arg)) for arg in node.args[:3])
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

    def _read(self, node: fx.Node, kind: str) -> Expr:
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
