"""The sizes of a prepared graph as sympy expressions in batch, sequence and context.

    %input_ids: i64[s0,s1]   %past_0_key: f32[s0,2,s2,32]   %linear: f32[s0,s1,512]
    ->
    batch, sequence          batch, 2, context, 32          512*batch*sequence elements

batch: sequences run at once. sequence: new tokens of each that one call reads. context: tokens of each that are in the
cache before the call. A size that is none of these is a symbol of the input that carries it, `pixel_values_2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qfx import graph
from qfx.errors import explain
from qfx.graph import is_call

Expr = Any  # a sympy expression, or an int

BATCH, SEQUENCE = sympy.symbols("batch sequence", integer=True, positive=True)
CONTEXT = sympy.Symbol("context", integer=True, nonnegative=True)
_CACHED = ("qfx::cached_attention", "qfx::quantized_cached_attention")


class Sizes:
    """What each symbolic size of a graph stands for."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.pasts = _pasts(gm)
        self._known = _named(gm, self.pasts)

    def of(self, size: Any) -> Expr:
        """One size: an int stays, a SymInt becomes an expression."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        return expr.xreplace({s: self._symbol(s) for s in expr.free_symbols})

    def shape(self, value: Any) -> tuple[Expr, ...]:
        """The sizes of a fake tensor."""
        return tuple(self.of(size) for size in value.shape)

    def numel(self, value: Any) -> Expr:
        """Number of elements of a fake tensor."""
        return sympy.Mul(*self.shape(value))

    def _symbol(self, symbol: Any) -> Expr:
        return self._known.setdefault(symbol, sympy.Symbol(str(symbol), integer=True, nonnegative=True))


def _pasts(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """Inputs [B, G, P, D] that hold cached keys or values: attention reads them, or what is appended to them."""
    found = set()
    for node in gm.graph.nodes:
        if graph.schema_name(node) in _CACHED:
            found |= {arg for arg in node.args[3:5] if isinstance(arg, fx.Node) and arg.op == "placeholder"}
        elif is_call(node, torch.ops.aten.cat.default):
            first = node.args[0][0] if isinstance(node.args[0], list | tuple) and node.args[0] else None
            fake = graph.val(first) if isinstance(first, fx.Node) and first.op == "placeholder" else None
            if isinstance(first, fx.Node) and isinstance(fake, Tensor) and fake.dim() == 4 and fake.is_floating_point():
                found.add(first)
    return frozenset(found)


def _named(gm: fx.GraphModule, pasts: frozenset[fx.Node]) -> dict[Any, Expr]:
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder" and isinstance(graph.val(n), Tensor)]
    new = [node for node in inputs if node not in pasts and graph.val(node).dim()]
    tokens = [n for n in new if graph.val(n).dim() == 2 and not graph.val(n).is_floating_point()]
    main = next(iter(tokens or new), None)
    known: dict[Any, Expr] = {}
    for node in ([] if main is None else [main]) + [n for n in inputs if n is not main]:
        for axis, size in enumerate(graph.val(node).shape):
            expr = size.node.expr if isinstance(size, torch.SymInt) else None
            if isinstance(expr, sympy.Symbol) and expr not in known:
                known[expr] = _meaning(node, axis, is_main=node is main, is_past=node in pasts)
    return known


def _meaning(node: fx.Node, axis: int, *, is_main: bool, is_past: bool) -> Expr:
    if axis == 0 and graph.val(node).dim() > 1:
        return BATCH
    if is_past and axis == 2:
        return CONTEXT
    if is_main and axis == 1 and graph.val(node).dim() in (2, 3):
        return SEQUENCE
    return sympy.Symbol(f"{node.name}_{axis}", integer=True, nonnegative=True)


def checked(given: Mapping[str, int]) -> dict[str, int]:
    """Sizes by name, as ints. Raises ValueError for what is no size: batch and sequence are 1 or more, others 0."""
    for name, value in given.items():
        low = 1 if name in ("batch", "sequence") else 0
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(explain(f"{name} is no size", expected=f"an integer of {low} or more", found=repr(value)))
    return dict(given)


def numbers(exprs: Iterable[Expr], given: Mapping[str, int]) -> list[float]:
    """The values of expressions at these sizes. Raises ValueError for one that depends on a size that is not given."""
    sizes = checked(given)
    seen: dict[Expr, float] = {}
    found = []
    for expr in exprs:
        if isinstance(expr, int | float):
            found.append(float(expr))
            continue
        if expr not in seen:
            seen[expr] = _number(expr, sizes)
        found.append(seen[expr])
    return found


def _number(expr: Expr, sizes: Mapping[str, int]) -> float:
    put = {s: sympy.Integer(sizes[str(s)]) for s in expr.free_symbols if str(s) in sizes}
    value = expr.xreplace(put)
    if missing := sorted(str(s) for s in value.free_symbols):
        raise ValueError(
            explain(
                f"the cost depends on {', '.join(missing)}",
                expected=f"a value for each of {', '.join(sorted(str(s) for s in expr.free_symbols))}",
                found=", ".join(f"{name}={size}" for name, size in sizes.items()),
                next_step=f"give {missing[0]}=..., for example by {missing[0]}=128",
            )
        )
    return float(value)
