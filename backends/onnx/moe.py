"""Experts: rows sorted by expert, one product per expert over its span of rows, unrolled over the experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from qfx.backends.onnx import portable, quant
from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.quant_input import quantized_input
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.values import Value
from qfx.format import Format
from qfx.passes.linear import is_transpose


def grouped_linear(b: Builder, x: Value, w: Value, offs: Value) -> Value:
    """Rows of x [T, K] times w[e] [N, K] of their expert; offs [E] says where each expert's rows end."""
    assert b.node is not None
    experts = _experts(b, b.node.args[1], w)
    spans, rest = _spans(b, x, offs, len(experts))
    parts = [portable.product(b, rows, weight) for rows, weight in zip(spans, experts, strict=True)]
    return _joined(b, parts, rest)


def grouped_mm_fallback(b: Builder, x: Value, w: Value, offs: Value) -> Value:
    """transformers' grouped matmul: rows of x [T, K] times w[e] [K, N]."""
    assert b.node is not None
    node = b.node.args[1]
    turned = _transposed_experts(node)
    experts = _experts(b, turned if turned is not None else node, None if turned is not None else w)
    spans, rest = _spans(b, x, offs, len(experts))
    parts = []
    for rows, weight in zip(spans, experts, strict=True):
        parts.append(b.op("MatMul", rows, weight) if turned is None else portable.product(b, rows, weight))
    return _joined(b, parts, rest)


def grouped_linear_quant(
    b: Builder, x: Value, w: Any, w_scale: Any, w_zero: Any, offs: Value, x_format: str, w_format: str
) -> Value:
    """What qfx::linear does, for each expert on its rows. Rows with scales of their own are quantized all at once."""
    assert b.node is not None
    fmt = Format.parse(x_format) if x_format else None
    if fmt is not None and fmt.granularity != "tok":
        raise NotImplementedError(f"experts with activations in {x_format}")
    stacked = Weight.of(b, b.node.args[1:4], Format.parse(w_format), x.dims[-1])
    weights = [expert(stacked, e) for e in range(stacked.data.shape[0])]
    if fmt is not None and quant.is_integer_pair(fmt, stacked.format):
        return _integers(b, b.cast(x, torch.float32), offs, weights, fmt)
    spans, rest = _spans(b, x, offs, len(weights))
    parts = [
        quant.product(b, rows, one, None, None, None, None, x_format) for rows, one in zip(spans, weights, strict=True)
    ]
    return _joined(b, parts, rest)


def _integers(b: Builder, x: Value, offs: Value, weights: list[Weight], fmt: Format) -> Value:
    """Codes of all rows, split by expert; one multiplication by the rows' scales at the end."""
    q = quantized_input(b, x, fmt, None, None, None)
    assert q.rows is not None
    codes, rest = _spans(b, Value(q.codes.name, q.codes.dtype, x.shape), offs, len(weights))
    shifts: list[Value | None] = [None] * len(weights)
    if q.shift is not None:
        shifts[:] = _spans(b, Value(q.shift.name, q.shift.dtype, (x.dims[0], 1)), offs, len(weights))[0]
    parts = [
        quant.integer_product(b, replace(q, codes=rows, shift=shift), one)
        for rows, shift, one in zip(codes, shifts, weights, strict=True)
    ]
    return b.op("Mul", _joined(b, parts, rest), q.rows)


def expert(stacked: Weight, e: int) -> Weight:
    """The weight of one expert."""
    return replace(
        stacked,
        name=f"{stacked.name}.{e}",
        data=stacked.data[e],
        scale=stacked.scale[e] if stacked.scale.dim() else stacked.scale,
        zero=stacked.zero[e] if stacked.zero is not None and stacked.zero.dim() else stacked.zero,
    )


def _transposed_experts(node: Any) -> fx.Node | None:
    """The parameter [E, N, K] behind a swap of the last two dimensions."""
    source = node.args[0] if is_transpose(node) else None
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _experts(b: Builder, node: Any, stacked: Value | None) -> list[Value]:
    """One value per expert: views of the parameter, or slices of a computed stack."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        tensor = b.tensor(node)
        return [b.weight(tensor[e], f"{node.target}.{e}") for e in range(tensor.shape[0])]
    assert stacked is not None
    count = stacked.dims[0]
    if not isinstance(count, int):
        raise NotImplementedError("a number of experts that is not known")
    return [b.op("Gather", stacked, b.scalar(e, torch.int64), axis=0) for e in range(count)]


def _spans(b: Builder, x: Value, offs: Value, count: int) -> tuple[list[Value], Value]:
    """The rows of each expert, and how many come after the last end, int64 [1]."""
    key = ("spans", x.dims[0], offs.name)
    if key not in b.memo:
        ends = b.op("Concat", b.cast(offs, torch.int64), b.dim(x.dims[0]), axis=0)
        starts = b.op("Concat", b.ints([0]), b.cast(offs, torch.int64), axis=0)
        widths = b.op("Sub", ends, starts)
        b.memo[key] = widths, b.op("Slice", widths, b.ints([count]), b.ints([count + 1]), b.ints([0]))
    widths, rest = b.memo[key]
    parts = b.ops("Split", x, widths, dtypes=[x.dtype] * (count + 1), axis=0)[:count]
    spans = []
    for e, rows in enumerate(parts):
        size = sympy.Symbol(f"rows_{rows.name}", integer=True, nonnegative=True)
        b.symbols.carry(size, _reader(b, widths, e))
        spans.append(Value(rows.name, rows.dtype, (size, *x.dims[1:])))
    return spans, rest


def _reader(b: Builder, widths: Value, e: int) -> Callable[[], Value]:
    return lambda: b.op("Slice", widths, b.ints([e]), b.ints([e + 1]), b.ints([0]))


def _joined(b: Builder, parts: list[Value], rest: Value) -> Value:
    """The parts one after the other; rows after the last end are zero."""
    shape = b.op("Concat", rest, b.shape(b.out_dims[1:]), axis=0)
    zeros = b.op("Expand", b.scalar(0.0, parts[0].dtype), shape)
    y = b.op("Concat", *parts, zeros, axis=0)
    return Value(y.name, y.dtype, b.out_dims)


EMIT: dict[str, Emit] = {
    "qfx.grouped_linear.default": grouped_linear,
    "qfx.grouped_linear_quant.default": grouped_linear_quant,
    "transformers.grouped_mm_fallback.default": grouped_mm_fallback,
}
