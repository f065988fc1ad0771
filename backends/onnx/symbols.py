"""Sizes at run time: sympy expressions of torch's shape environment computed by ONNX nodes, each only once per graph.

A symbol is read from a tensor that carries it (Shape of an input) or from an integer input; every other size is
arithmetic on symbols. Values are int64 of shape [1], ready for Concat into a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import sympy
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
        """int64 [1], f64 [1] for a number with a fraction. Raises UnresolvedError."""
        if isinstance(expr, int | sympy.Integer):
            return self.builder.ints([int(expr)])
        if isinstance(expr, float | sympy.Float):
            return self.builder.const([float(expr)], torch.float64)
        if expr not in self.known:
            self.known[expr] = self._emit(expr)
        return self.known[expr]

    def _emit(self, expr: sympy.Expr) -> Value:
        b = self.builder
        if isinstance(expr, sympy.Symbol):
            if expr not in self.sources:
                raise UnresolvedError(f"nothing carries the symbol {expr}")
            return self.sources[expr]()
        rule = next((rule for types, rule in _RULES if isinstance(expr, types)), None)
        if rule is None or (rule is _power and not expr.args[1].is_nonnegative):
            raise UnresolvedError(f"no ONNX form for the size {expr} ({type(expr).__name__})")
        values = [self.value(a) for a in expr.args]
        if any(v.dtype == torch.float64 for v in values):
            values = [b.cast(v, torch.float64) for v in values]
        return rule(b, *values)


def _folded(op_type: str) -> Callable[..., Value]:
    return lambda b, *values: reduce(lambda left, right: b.op(op_type, left, right), values)


def _power(b: Builder, base: Value, exponent: Value) -> Value:
    return b.op("Pow", base, exponent)


def _to_float(b: Builder, value: Value) -> Value:
    return b.cast(value, torch.float64)


def _divided(b: Builder, left: Value, right: Value) -> Value:
    return b.op("Div", _to_float(b, left), _to_float(b, right))


def _rounded(op_type: str) -> Callable[..., Value]:
    return lambda b, value: b.cast(b.op(op_type, _to_float(b, value)), torch.int64)


def floor_divide(b: Builder, left: Value, right: Value) -> Value:
    """Integer division rounded to minus infinity, as //. ONNX's Div truncates, its Mod has the divisor's sign."""
    assert not left.dtype.is_floating_point
    if left.dtype == torch.uint8:
        return b.op("Div", left, right)
    return b.op("Div", b.op("Sub", left, b.op("Mod", left, right)), right)


def _modular(b: Builder, value: Value, divisor: Value, modulus: Value) -> Value:
    return b.op("Mod", floor_divide(b, value, divisor), modulus)


_RULES: tuple[tuple[tuple[Any, ...], Callable[..., Value]], ...] = (
    ((sympy.Add,), _folded("Add")),
    ((sympy.Mul,), _folded("Mul")),
    ((sympy.Max, fn.Max), _folded("Max")),
    ((sympy.Min, fn.Min), _folded("Min")),
    ((fn.FloorDiv, fn.CleanDiv), floor_divide),
    ((fn.Mod, fn.PythonMod, sympy.Mod), _folded("Mod")),
    ((fn.ModularIndexing,), _modular),
    ((sympy.Pow, fn.PowByNatural, fn.FloatPow), _power),
    ((fn.ToFloat,), _to_float),
    ((fn.IntTrueDiv, fn.FloatTrueDiv), _divided),
    ((fn.CeilToInt,), _rounded("Ceil")),
    ((fn.FloorToInt,), _rounded("Floor")),
    ((fn.TruncToInt,), lambda b, value: b.cast(value, torch.int64)),
    ((fn.OpaqueUnaryFn_sqrt,), lambda b, value: b.op("Sqrt", _to_float(b, value))),
)
