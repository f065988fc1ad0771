"""Sizes at run time: sympy expressions of torch's shape environment computed by ONNX nodes, each only once per graph.

A symbol is read from a tensor that carries it (Shape of an input) or from an integer input; every other size is
arithmetic on symbols. Values are int64 of shape [1], ready for Concat into a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy import functions as fn

from qfx.backends.onnx.values import Dim, Value

if TYPE_CHECKING:
    from qfx.backends.onnx.build import Builder


class UnresolvedError(Exception):
    """A size depends on a symbol that nothing in the graph carries, or on arithmetic that has no ONNX form here."""


class Symbols:
    """Where each symbol comes from, and the values already computed."""

    def __init__(self, builder: Builder) -> None:
        self.builder = builder
        self.known: dict[sympy.Expr, Value] = {}
        self.sources: dict[sympy.Symbol, Callable[[], Value]] = {}

    def carry(self, expr: Dim, read: Callable[[], Value]) -> None:
        """Register that `read()` gives the value of `expr`; solves `a * symbol + b` for the symbol."""
        if isinstance(expr, int) or len(expr.free_symbols) != 1:
            return
        (symbol,) = expr.free_symbols
        if expr == symbol:
            if symbol not in self.sources or self.sources[symbol].__name__ == "solved":
                self.sources[symbol] = read
            return
        slope = sympy.diff(expr, symbol) if expr.is_polynomial(symbol) else None
        if symbol in self.sources or not isinstance(slope, sympy.Integer):
            return
        offset = int(expr.subs(symbol, 0))

        def solved() -> Value:
            b = self.builder
            return b.op("Div", b.op("Sub", read(), b.ints([offset])), b.ints([int(slope)]))

        self.sources[symbol] = solved

    def value(self, expr: Dim) -> Value:
        """int64 [1]. Raises UnresolvedError."""
        if isinstance(expr, int | sympy.Integer):
            return self.builder.ints([int(expr)])
        if expr not in self.known:
            self.known[expr] = self._emit(expr)
        return self.known[expr]

    def _emit(self, expr: sympy.Expr) -> Value:
        b = self.builder
        if isinstance(expr, sympy.Symbol):
            if expr not in self.sources:
                raise UnresolvedError(f"nothing carries the symbol {expr}")
            return self.sources[expr]()
        args = expr.args
        if isinstance(expr, sympy.Add | sympy.Mul | sympy.Max | sympy.Min | fn.Max | fn.Min):
            name = {"Add": "Add", "Mul": "Mul", "Max": "Max", "Min": "Min"}[type(expr).__name__]
            return reduce(lambda left, right: b.op(name, left, right), [self.value(a) for a in args])
        if isinstance(expr, fn.FloorDiv | fn.CleanDiv):
            return floor_divide(b, self.value(args[0]), self.value(args[1]))
        if isinstance(expr, fn.Mod | fn.PythonMod | sympy.Mod):
            return b.op("Mod", self.value(args[0]), self.value(args[1]))
        if isinstance(expr, fn.ModularIndexing):
            return b.op("Mod", floor_divide(b, self.value(args[0]), self.value(args[1])), self.value(args[2]))
        if isinstance(expr, sympy.Pow | fn.PowByNatural) and args[1].is_Integer and 0 < int(args[1]) < 5:
            return reduce(lambda left, right: b.op("Mul", left, right), [self.value(args[0])] * int(args[1]))
        raise UnresolvedError(f"no ONNX form for the size {expr} ({type(expr).__name__})")


def floor_divide(b: Builder, left: Value, right: Value) -> Value:
    """Integer division rounded to minus infinity, as //. ONNX's Div truncates, its Mod has the divisor's sign."""
    assert not left.dtype.is_floating_point
    if left.dtype == torch.uint8:
        return b.op("Div", left, right)
    return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)
