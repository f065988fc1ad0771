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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from qfx.allocation.nodes import Cache, NodeCost, Stored, read
from qfx.allocation.sizes import BATCH, Expr, checked, numbers
from qfx.annotation import Formats, from_json
from qfx.errors import Note, nearest
from qfx.format import Format
from qfx.kv.formats import CacheFormat
from qfx.live.segments import nbytes

CacheFormats = Format | Mapping[str, Format] | CacheFormat | Sequence[CacheFormat] | None
Asked = Mapping[str, Any]  # name of a node -> formats of its weight, or role -> formats


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
        return cls(*read(gm))

    @property
    def caches(self) -> tuple[Cache, ...]:
        """Of each attention that has one."""
        return tuple(node.cache for node in self.nodes if node.cache is not None)

    @property
    def grown(self) -> int:
        """Number of `caches` to which each call adds."""
        return sum(c.new != 0 for c in self.caches)

    def weights(self, formats: Asked | None = None, *, rest: Format | None = None) -> int:
        """Bytes of all parameters: those named in these formats (see `formats_of`), scales and padding included.

        rest: a plain format in which all other floats are held; None leaves them as they are. A parameter that several
        nodes read counts once. Raises ValueError for a name that no node has, and for a rest with a scale.
        """
        chosen = self._chosen(formats, rest)
        return sum(self._bytes(key, chosen, rest) for key in self.stored)

    def cache(self, formats: CacheFormats = None) -> Expr:
        """Bytes of the cache of all layers after a call: of one format, of "k" and "v", of a `CacheFormat` or one for
        each layer, whose first and newest tokens are counted as floats; None is the graph's floats.

        0 for a graph without causal attention. Raises ValueError for a list of another length.
        """
        each = self._each(formats)
        return sympy.Add(*(_held(c, c.length, own, self.itemsize) for c, own in zip(self.caches, each, strict=True)))

    def _each(self, formats: CacheFormats) -> list[Any]:
        """The format of each of `caches`. A list is of those that grow."""
        if not isinstance(formats, list | tuple):
            return [formats] * len(self.caches)
        if len(formats) != self.grown:
            raise ValueError(
                f"the graph has {self.grown} caches that grow, and there are {len(formats)} formats for them"
            )
        left = iter(formats)
        return [next(left) if c.new != 0 else None for c in self.caches]

    def total(
        self, formats: Asked | None = None, cache: CacheFormats = None, *,
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
        self, formats: Asked | None = None, cache: CacheFormats = None, *,
        rest: Format | None = None, held: Any = None,
    ) -> list[tuple[Expr, Expr, Expr]]:  # fmt: skip
        """For each node the bytes of (weights, activations, cache) that it moves.

        held: a function Format -> Format, for a device that holds codes in more bits than the file does.
        """
        chosen = self._chosen(formats, rest)
        size = self.itemsize if rest is None else rest.bits // 8
        found, own = [], iter(self._each(cache))
        for node in self.nodes:
            weights = self._read(node, chosen, rest, held)
            moved = 0 if node.cache is None else _cache_moved(node.cache, next(own), size)
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
        self, formats: Asked | None = None, cache: CacheFormats = None, *,
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
    """Formats by role out of an entry of `Asked`: of the weight, or of each role; as texts of plans too."""
    is_roles = isinstance(asked, Mapping) and not {"columns", "outliers"} & set(asked)
    found = asked if is_roles else {"w": asked}
    return {r: from_json(one) if isinstance(one, str | list | Mapping) else one for r, one in found.items()}


def weight_format(asked: Any) -> Formats | None:
    """The formats of a weight out of an entry of `Asked`: itself, or that of role "w"; None where it has none."""
    return role_formats(asked).get("w")


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


def _held(cache: Cache, length: Expr, formats: Any, itemsize: int) -> Expr:
    """Bytes of the keys and values of so many tokens of each sequence."""
    if isinstance(formats, CacheFormat):
        dtype = torch.float16 if itemsize == 2 else torch.float32
        return BATCH * formats.nbytes(cache.heads, cache.widths, length, dtype=dtype)
    return BATCH * length * _token_bytes(cache, formats, itemsize)


def _cache_moved(cache: Cache, formats: Any, itemsize: int) -> Expr:
    """All of it is read, the new part is written."""
    if isinstance(formats, CacheFormat):
        new = BATCH * cache.new * cache.heads * sum(cache.widths) * itemsize  # as it came, codes later
        return _held(cache, cache.length, formats, itemsize) + new
    return _held(cache, cache.length + cache.new, formats, itemsize)
