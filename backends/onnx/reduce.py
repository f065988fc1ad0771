"""Reductions, scans and counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit, operands
from qfx.backends.onnx.shapes import axis_of
from qfx.backends.onnx.values import Dim, Value


def _axes(dim: Any, rank: int) -> list[int]:
    """The reduced dimensions; all of them where none is given."""
    if dim is None or dim == []:
        return list(range(rank))
    return sorted({axis_of(d, rank) for d in ([dim] if isinstance(dim, int) else dim)})


def reduced(b: Builder, op_type: str, x: Value, dim: Any, keepdim: bool) -> Value:
    """One reduction; nothing for a 0-dimensional input."""
    if x.rank == 0:
        return x
    return b.op(op_type, x, b.ints(_axes(dim, x.rank)), keepdims=int(keepdim))


def reduce_as(op_type: str) -> Emit:
    """A reduction in the dtype of the result: (x, dim, keepdim)."""

    def emit(b: Builder, x: Value, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
        return reduced(b, op_type, b.cast(x, b.out_dtype), dim, bool(keepdim))

    return emit


def truth(op_type: str) -> Emit:
    """any (ReduceMax) and all (ReduceMin) over bool."""

    def emit(b: Builder, x: Value, dim: Any = None, keepdim: bool = False) -> Value:
        value = reduced(b, op_type, b.cast(x, torch.bool), dim, keepdim)
        return b.cast(value, b.out_dtype)

    return emit


def whole(op_type: str) -> Emit:
    """A reduction of everything to one number."""

    def emit(b: Builder, x: Value, **_: Any) -> Value:
        return reduced(b, op_type, b.cast(x, b.out_dtype), None, False)

    return emit


def extreme(reduction: str, position: str) -> Emit:
    """max.dim and min.dim: values and indices."""

    def emit(b: Builder, x: Value, dim: int, keepdim: bool = False) -> list[Value]:
        return [reduced(b, reduction, x, dim, keepdim), arg(position)(b, x, dim, keepdim)]

    return emit


def arg(op_type: str) -> Emit:
    """argmax and argmin: the first place of the extreme; of the flat tensor where no dimension is given."""

    def emit(b: Builder, x: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        if x.rank == 0:
            return b.scalar(0, torch.int64)
        if dim is None:
            flat = b.op("Reshape", x, b.ints([-1]))
            found = b.op(op_type, flat, dtype=torch.int64, axis=0, keepdims=0)
            return b.reshape(found, b.out_dims) if keepdim else found
        return b.op(op_type, x, dtype=torch.int64, axis=axis_of(dim, x.rank), keepdims=int(keepdim))

    return emit


def _count(x: Value, dim: Any) -> Dim:
    count: Dim = 1
    for axis in _axes(dim, x.rank):
        count = count * x.dims[axis]
    return count


def var(b: Builder, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    """Sum of squared differences from the mean over (count - correction)."""
    return _moments(b, x, dim, correction, keepdim)[0]


def std(b: Builder, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    """The root of the variance."""
    return b.op("Sqrt", var(b, x, dim, correction=correction, keepdim=keepdim))


def var_mean(b: Builder, x: Value, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> list[Value]:
    """Variance and mean."""
    return list(_moments(b, x, dim, correction, keepdim))


def unbiased(emit: Emit) -> Emit:
    """The older overloads with unbiased=True or False."""

    def emit_dim(b: Builder, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False) -> Any:
        return emit(b, x, dim, correction=int(unbiased), keepdim=keepdim)

    return emit_dim


def _moments(b: Builder, x: Value, dim: Any, correction: Any, keepdim: bool) -> tuple[Value, Value]:
    correction = 1 if correction is None else correction
    mean = reduced(b, "ReduceMean", x, dim, True)
    apart = Value(b.op("Sub", x, mean).name, x.dtype, x.shape)
    total = reduced(b, "ReduceSum", b.op("Mul", apart, apart), dim, keepdim)
    count = b.scalar(_count(x, dim), x.dtype)
    free = b.op("Max", b.op("Sub", count, b.scalar(correction, x.dtype)), b.scalar(0, x.dtype))
    shown = mean if keepdim or x.rank == 0 else b.op("Squeeze", mean, b.ints(_axes(dim, x.rank)))
    return b.op("Div", total, free), shown


def vector_norm(b: Builder, x: Value, order: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    """The norm of an order over dimensions."""
    x = b.cast(x, b.out_dtype)
    if order in (None, 2):
        return reduced(b, "ReduceL2", x, dim, keepdim)
    if order == 0:
        return reduced(b, "ReduceSum", b.cast(b.cast(x, torch.bool), x.dtype), dim, keepdim)
    size = b.op("Abs", x)
    if order == 1:
        return reduced(b, "ReduceSum", size, dim, keepdim)
    if math.isinf(order):
        return reduced(b, "ReduceMax" if order > 0 else "ReduceMin", size, dim, keepdim)
    total = reduced(b, "ReduceSum", b.op("Pow", size, b.scalar(order, x.dtype)), dim, keepdim)
    return b.op("Pow", total, b.scalar(1 / order, x.dtype))


def cumsum(b: Builder, x: Value, dim: int, **_: Any) -> Value:
    """Running sums along a dimension."""
    value = b.cast(x, b.out_dtype)
    return b.op("CumSum", value, b.scalar(axis_of(dim, x.rank), torch.int64)) if x.rank else value


def topk(b: Builder, x: Value, k: Any, dim: int = -1, largest: bool = True, ordered: bool = True) -> list[Value]:
    """The k greatest (or smallest) and their places."""
    if x.rank == 0:
        return [x, b.scalar(0, torch.int64)]
    wide = torch.uint8 if x.dtype == torch.bool else x.dtype
    attrs: dict[str, Any] = {"axis": axis_of(dim, x.rank), "largest": int(largest), "sorted": int(ordered)}
    return b.ops("TopK", b.cast(x, wide), b.dim(k), dtypes=[wide, torch.int64], **attrs)


def sort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> list[Value]:
    """All in order, equal ones as they stand, and their places."""
    return topk(b, x, x.dims[axis_of(dim, x.rank)] if x.rank else 1, dim, bool(descending))


def sort_stable(b: Builder, x: Value, *, stable: Any = None, dim: int = -1, descending: bool = False) -> list[Value]:
    """`sort` is stable already."""
    return sort(b, x, dim, descending)


def argsort(b: Builder, x: Value, dim: int = -1, descending: bool = False) -> Value:
    """The places in order."""
    return sort(b, x, dim, descending)[1]


def histc(b: Builder, x: Value, bins: int = 100, low: Any = 0, high: Any = 0) -> Value:
    """How many values fall into each of `bins` equal spans from low to high (the last one closed)."""
    if low >= high:
        raise NotImplementedError("a histogram over the range of the data")
    flat = b.op("Reshape", b.cast(x, torch.float32), b.ints([-1, 1]))
    edges = [b.scalar(v, torch.float32) for v in (low, bins, high - low, bins - 1)]
    place = b.op("Floor", b.op("Div", b.op("Mul", b.op("Sub", flat, edges[0]), edges[1]), edges[2]))
    last = b.op("Equal", flat, b.scalar(high, torch.float32), dtype=torch.bool)
    place = b.op("Where", last, edges[3], place)
    hits = b.op("Equal", place, b.const([list(range(bins))], torch.float32), dtype=torch.bool)
    return b.op("ReduceSum", b.cast(hits, torch.float32), b.ints([0]), keepdims=0)


def bucketize(b: Builder, x: Value, bounds: Value, *, right: bool = False, **_: Any) -> Value:
    """How many boundaries lie below each value (or at it, with right=True)."""
    value, edges = operands(b, x, bounds)
    lifted = b.op("Unsqueeze", value, b.ints([x.rank]))
    op_type = "GreaterOrEqual" if right else "Greater"
    below = b.op(op_type, lifted, edges, dtype=torch.bool)
    return b.op("ReduceSum", b.cast(below, torch.int64), b.ints([x.rank]), keepdims=0)


def count_nonzero(b: Builder, x: Value, dim: Any = None) -> Value:
    """How many are not zero."""
    return reduced(b, "ReduceSum", b.cast(b.cast(x, torch.bool), torch.int64), dim, False)


def dims_first(op_type: str) -> Emit:
    """A reduction whose second argument is the keepdim's dimension list (logsumexp)."""

    def emit(b: Builder, x: Value, dim: Sequence[int], keepdim: bool = False) -> Value:
        return reduced(b, op_type, b.cast(x, b.out_dtype), dim, keepdim)

    return emit


EMIT: dict[str, Emit] = {
    "aten.sum.default": whole("ReduceSum"), "aten.sum.dim_IntList": reduce_as("ReduceSum"),
    "aten.mean.default": whole("ReduceMean"), "aten.mean.dim": reduce_as("ReduceMean"),
    "aten.prod.default": whole("ReduceProd"), "aten.prod.dim_int": reduce_as("ReduceProd"),
    "aten.amax.default": reduce_as("ReduceMax"), "aten.amin.default": reduce_as("ReduceMin"),
    "aten.max.default": whole("ReduceMax"), "aten.min.default": whole("ReduceMin"),
    "aten.max.dim": extreme("ReduceMax", "ArgMax"), "aten.min.dim": extreme("ReduceMin", "ArgMin"),
    "aten.argmax.default": arg("ArgMax"), "aten.argmin.default": arg("ArgMin"),
    **{f"aten.any.{o}": truth("ReduceMax") for o in ("default", "dim", "dims")},
    **{f"aten.all.{o}": truth("ReduceMin") for o in ("default", "dim", "dims")},
    "aten.var.correction": var, "aten.std.correction": std, "aten.var_mean.correction": var_mean,
    "aten.var.dim": unbiased(var), "aten.std.dim": unbiased(std), "aten.var_mean.dim": unbiased(var_mean),
    "aten.linalg_vector_norm.default": vector_norm, "aten.norm.ScalarOpt_dim": vector_norm,
    "aten.logsumexp.default": dims_first("ReduceLogSumExp"), "aten.cumsum.default": cumsum,
    "aten.topk.default": topk, "aten.sort.default": sort, "aten.sort.stable": sort_stable,
    "aten.argsort.default": argsort, "aten.histc.default": histc, "aten.bucketize.Tensor": bucketize,
    "aten.count_nonzero.default": count_nonzero, "aten.count_nonzero.dim_IntList": count_nonzero,
}  # fmt: skip
