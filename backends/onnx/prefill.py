"""Weight-only products of many rows by integers: few-bit weights where few tokens are read, 8-bit ones for a prompt.

    MatMulNBits(x, codes, scales)
    ->
    If(rows >= 16):  MatMulIntegerToFloat(codes of x per token, codes of the weight per channel)
    else:            MatMulNBits(x, codes, scales)

MatMulNBits unpacks its weight for every block of rows, which a prompt pays for; an integer product does not. It wants
one scale per output feature, so that the weight lies in the file a second time: 8 more bits for each of its numbers.
Both roundings are of 8 bits, that of the weight is of what its few bits stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qfx.backends.onnx.branch import choose
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.quant_input import quantized_input
from qfx.backends.onnx.quant_weights import Weight, together
from qfx.backends.onnx.values import Value
from qfx.format import Format

MANY = 16  # rows from which the integer product is faster
_ROWS = 1024
_INPUT = Format.parse("i8/tok")


def has_prompts(b: Builder, x: Value) -> bool:
    """May the rows of x [.., K] be many?"""
    sizes = x.dims[:-1]
    one_token = len(sizes) > 1 and sizes[-1] == 1  # the last layer reads the last token only
    known = all(isinstance(size, int) for size in sizes)
    few = one_token or (known and math.prod(int(s) for s in sizes) < MANY)
    return b.prefill and not few


def product(b: Builder, x: Value, weights: Sequence[Weight], bias: Value | None, few: Callable[[], Value]) -> Value:
    """x [.., K] times weights [N, K], one below the other: `few` where the rows are few, integers where not."""
    n = sum(one.n for one in weights)
    codes, scale = _columns(b, weights, n)
    rows = b.dim(math.prod(x.dims[:-1]))
    key = ("many", rows.name)
    if key not in b.memo:
        b.memo[key] = b.op("GreaterOrEqual", rows, b.ints([MANY]), dtype=torch.bool)
    shape = (*x.dims[:-1], n)

    def many() -> Value:
        q = quantized_input(b, x, _INPUT, None, None, None)
        y = b.op("MatMulIntegerToFloat", q.codes, codes, q.scale, scale, q.zero, domain=MICROSOFT, dtype=torch.float32)
        y = b.op("Mul", y, q.rows)
        y = y if bias is None else b.op("Add", y, bias)
        assert q.rows is not None
        return b.reshape(Value(y.name, y.dtype, (q.rows.dims[0], n)), shape)

    def alike() -> Value:
        y = few()
        return Value(y.name, y.dtype, shape)

    return choose(b, b.memo[key], x, many, alike)


def _columns(b: Builder, weights: Sequence[Weight], n: int) -> tuple[Value, Value]:
    """int8 codes [K, N] and scales [N], one per output feature."""
    name = f"{weights[0].name}{together(w.name for w in weights) if len(weights) > 1 else ''}.prompt"

    def codes() -> Tensor:
        found = torch.empty(weights[0].k, n, dtype=torch.int8)
        for start, rows in _pieces(weights):
            found[:, start : start + len(rows)] = (rows / _scale(rows)).round_().to(torch.int8).t()
        return found

    def scale() -> Tensor:
        return torch.cat([_scale(rows).reshape(-1) for _, rows in _pieces(weights)])

    shape = (weights[0].k, n)
    return b.derived(name, torch.int8, shape, codes), b.derived(f"{name}.scale", torch.float32, (n,), scale)


def _pieces(weights: Sequence[Weight]) -> Iterator[tuple[int, Tensor]]:
    """(first row, f32 [rows, K]) of the weights, one below the other."""
    start = 0
    for weight in weights:
        for rows in weight.pieces(_ROWS):
            yield start, rows
            start += len(rows)


def _scale(rows: Tensor) -> Tensor:
    """[rows, 1]: the greatest magnitude over 127; 1 for a row of zeros."""
    top = rows.abs().amax(1, keepdim=True) / 127
    return torch.where(top > 0, top, 1.0)
