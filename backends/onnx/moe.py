"""Experts: rows sorted by expert, one product per expert over its span of rows, unrolled over the experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from qfx.backends.onnx import portable, quant
from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.values import Value
from qfx.format import Format


def grouped_linear(b: Builder, x: Value, w: Value, offs: Value) -> Value:
    """Rows of x [T, K] times w[e] [N, K] of their expert; offs [E] says where each expert's rows end."""
    assert b.node is not None
    experts = _experts(b, b.node.args[1], w)
    parts = [
        portable.product(b, rows, weight)
        for rows, weight in zip(_spans(b, x, offs, len(experts)), experts, strict=True)
    ]
    return _joined(b, x, offs, parts)


def grouped_mm_fallback(b: Builder, x: Value, w: Value, offs: Value) -> Value:
    """transformers' grouped matmul: rows of x [T, K] times w[e] [K, N]."""
    assert b.node is not None
    node = b.node.args[1]
    turned = _transposed_experts(node)
    experts = _experts(b, turned if turned is not None else node, None if turned is not None else w)
    parts = []
    for rows, weight in zip(_spans(b, x, offs, len(experts)), experts, strict=True):
        if turned is None:
            parts.append(b.op("MatMul", rows, weight))
        else:
            parts.append(portable.product(b, rows, weight))
    return _joined(b, x, offs, parts)


def grouped_linear_quant(
    b: Builder, x: Value, w: Any, w_scale: Any, w_zero: Any, offs: Value, x_format: str, w_format: str
) -> Value:
    """What qfx::linear does, for each expert on its rows."""
    assert b.node is not None
    if x_format and Format.parse(x_format).granularity != "tok":
        raise NotImplementedError(f"experts with activations in {x_format}")
    stacked = Weight.of(b, b.node.args[1:4], Format.parse(w_format), x.dims[-1])
    count = stacked.data.shape[0]
    parts = []
    for e, rows in enumerate(_spans(b, x, offs, count)):
        one = replace(
            stacked,
            name=f"{stacked.name}.{e}",
            data=stacked.data[e],
            scale=stacked.scale[e] if stacked.scale.dim() else stacked.scale,
            zero=stacked.zero[e] if stacked.zero is not None and stacked.zero.dim() else stacked.zero,
        )
        parts.append(quant.product(b, rows, one, None, None, None, None, x_format))
    return _joined(b, x, offs, parts)


def _transposed_experts(node: Any) -> fx.Node | None:
    """The parameter [E, N, K] behind a swap of the last two dimensions."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    source = node.args[0] if node.args else None
    if node.target is not torch.ops.aten.transpose.int or not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    return source if {int(d) % 3 for d in node.args[1:]} == {1, 2} else None  # type: ignore[arg-type]


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


def _spans(b: Builder, x: Value, offs: Value, count: int) -> list[Value]:
    """The rows of each expert."""
    ends = b.ops("Split", b.cast(offs, torch.int64), b.ints([1] * count), dtypes=[torch.int64] * count, axis=0)
    starts = [b.ints([0]), *ends[:-1]]
    axis = b.ints([0])
    spans = []
    for start, end in zip(starts, ends, strict=True):
        rows = b.op("Slice", x, start, end, axis)
        size = sympy.Symbol(f"rows_{rows.name}", integer=True, nonnegative=True)
        b.symbols.known[size] = b.op("Sub", end, start)
        spans.append(Value(rows.name, rows.dtype, (size, *x.dims[1:])))
    return spans


def _joined(b: Builder, x: Value, offs: Value, parts: list[Value]) -> Value:
    """The parts one after the other; rows after the last end are zero."""
    end = b.op("Slice", b.cast(offs, torch.int64), b.ints([-1]), b.ints([2**63 - 1]), b.ints([0]))
    missing = b.op("Sub", b.dim(x.dims[0]), end)
    shape = b.op("Concat", missing, b.shape(b.out_dims[1:]), axis=0)
    rest = b.op("Expand", b.scalar(0.0, parts[0].dtype), shape)
    return b.op("Concat", *parts, rest, axis=0)


EMIT: dict[str, Emit] = {
    "qfx.grouped_linear.default": grouped_linear,
    "qfx.grouped_linear_quant.default": grouped_linear_quant,
    "transformers.grouped_mm_fallback.default": grouped_mm_fallback,
}
