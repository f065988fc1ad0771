"""Reading and writing at places that tensors give: gather, index, scatter and their kin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from qfx.backends.onnx.build import Builder, broadcast
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.shapes import axis_of
from qfx.backends.onnx.values import Dim, Value, is_number

_END = 2**63 - 1


def gather(b: Builder, x: Value, dim: int, places: Value, **_: Any) -> Value:
    """x[..., places, ...] element by element along one dimension."""
    if x.rank == 0 or places.rank == 0:
        raise NotImplementedError("gather on a 0-dimensional tensor")
    return b.op("GatherElements", x, places, axis=axis_of(dim, x.rank))


def index_select(b: Builder, x: Value, dim: int, places: Value) -> Value:
    """Slices of x along one dimension."""
    return b.op("Gather", x, places, axis=axis_of(dim, x.rank))


def index(b: Builder, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[i, j, ...] with integer tensors (negative counts from the end) or one bool mask, None for a whole dimension."""
    indices = _without_masks(b, indices)
    places = [i for i, v in enumerate(indices) if v is not None]
    tensors = [v for v in indices if v is not None]
    if len(tensors) == 1:
        return b.op("Gather", x, b.cast(tensors[0], torch.int64), axis=places[0])
    if places != list(range(places[0], places[-1] + 1)):
        raise NotImplementedError("indices with a gap between them")
    start, count = places[0], len(places)
    front = [*places, *(d for d in range(x.rank) if d not in places)]
    if start:
        x = b.op("Transpose", x, perm=front)
    found = b.op("GatherND", x, _stacked(b, tensors))
    if not start:
        return found
    width = len(b.out_dims) - (len(front) - count)  # dimensions of the index itself, now in front
    order = [*range(width, width + start), *range(width), *range(width + start, len(b.out_dims))]
    return b.op("Transpose", found, perm=order)


def _without_masks(b: Builder, indices: Sequence[Value | None]) -> list[Value | None]:
    """A bool mask becomes the places where it holds, one index per dimension of the mask."""
    if not any(v is not None and v.dtype in (torch.bool, torch.uint8) for v in indices):
        return list(indices)
    flat: list[Value | None] = []
    if sum(v is not None for v in indices) > 1:
        raise NotImplementedError("a bool mask together with other indices")
    for value in indices:
        if value is None:
            flat.append(None)
            continue
        n = value.rank
        found = b.op("NonZero", b.cast(value, torch.bool), dtype=torch.int64)
        rows = b.ops("Split", found, b.ints([1] * n), dtypes=[torch.int64] * n, axis=0) if n > 1 else [found]
        flat += [Value(b.op("Squeeze", r, b.ints([0])).name, torch.int64, (-1,)) for r in rows]
    return flat


def _stacked(b: Builder, tensors: Sequence[Value]) -> Value:
    """Indices broadcast together and stacked along a new last dimension, for GatherND and ScatterND."""
    shape = broadcast([t.dims for t in tensors])
    rank = len(shape)
    pieces = []
    for t in tensors:
        value = b.cast(t, torch.int64)
        if t.dims != shape:
            value = b.op("Expand", value, b.shape(shape))
        pieces.append(b.op("Unsqueeze", value, b.ints([rank])))
    return b.op("Concat", *pieces, axis=rank)


def index_put(
    b: Builder, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False, *_: Any
) -> Value:
    """x with `values` written (or added) at x[i, j, ...], or under one bool mask of the first dimensions."""
    first = indices[0]
    if len(indices) == 1 and first is not None and first.dtype == torch.bool and not accumulate:
        inner = x.rank - first.rank
        mask = b.reshape(first, (*first.dims, *(1 for _ in range(inner))))
        if values.rank <= inner or values.dims[-inner - 1] == 1:  # the same wherever the mask holds
            return b.op(
                "Where", mask, b.reshape(b.cast(values, x.dtype), values.dims[max(values.rank - inner, 0) :]), x
            )
        if values.dims[1:] != x.dims[first.rank :]:
            raise NotImplementedError("writing rows that have to be widened under a bool mask")
        return masked_scatter(b, x, mask, values)
    if any(v is not None and v.dtype == torch.bool for v in indices):
        raise NotImplementedError("adding under a bool mask, or one together with other indices")
    places = [i for i, v in enumerate(indices) if v is not None]
    start, count = places[0], len(places)
    if places != list(range(start, start + count)):
        raise NotImplementedError("writing at indices with a gap between them")
    tensors = [v for v in indices if v is not None]
    stacked, lead = _stacked(b, tensors), broadcast([t.dims for t in tensors])
    shape = (*x.dims[:start], *lead, *x.dims[start + count :])
    updates = b.op("Expand", b.cast(values, x.dtype), b.shape(shape))
    reduction = "add" if accumulate else "none"
    if not start:
        return b.op("ScatterND", x, stacked, updates, reduction=reduction)
    front = [*places, *(d for d in range(x.rank) if d not in places)]
    moved = [*range(start, start + len(lead)), *range(start), *range(start + len(lead), len(shape))]
    turned = b.op(
        "ScatterND",
        b.op("Transpose", x, perm=front),
        stacked,
        b.op("Transpose", updates, perm=moved),
        reduction=reduction,
    )
    return b.op("Transpose", turned, perm=[front.index(d) for d in range(x.rank)])


def index_copy(b: Builder, x: Value, dim: int, places: Value, source: Value) -> Value:
    """x with slices along one dimension replaced."""
    return _scatter_slices(b, x, dim, places, source, "none")


def index_add(b: Builder, x: Value, dim: int, places: Value, source: Value, *, alpha: Any = 1) -> Value:
    """x with slices added along one dimension."""
    scaled = source if alpha == 1 else b.op("Mul", source, b.scalar(alpha, source.dtype))
    return _scatter_slices(b, x, dim, places, Value(scaled.name, scaled.dtype, source.shape), "add")


def index_fill(b: Builder, x: Value, dim: int, places: Value, number: Any) -> Value:
    """x with one number in the slices given."""
    axis = axis_of(dim, x.rank)
    shape = (*x.dims[:axis], places.dims[0] if places.rank else 1, *x.dims[axis + 1 :])
    filled = b.op("Expand", b.scalar(number, x.dtype), b.shape(shape))
    return _scatter_slices(b, x, dim, places, Value(filled.name, x.dtype, shape), "none")


def _scatter_slices(b: Builder, x: Value, dim: int, places: Value, source: Value, reduction: str) -> Value:
    if x.rank == 0:
        raise NotImplementedError("writing into a 0-dimensional tensor")
    axis = axis_of(dim, x.rank)
    count: Dim = places.dims[0] if places.rank else 1
    column = b.reshape(b.cast(places, torch.int64), [count if i == axis else 1 for i in range(x.rank)])
    spread = b.op("Expand", column, b.shape(source.dims))
    return b.op("ScatterElements", x, spread, b.cast(source, x.dtype), axis=axis, reduction=reduction)


def scatter(b: Builder, x: Value, dim: int, places: Value, source: Any, *, reduce: str | None = None) -> Value:
    """x with elements written (or combined with the former ones) along one dimension: a tensor's, or one number."""
    if not isinstance(source, Value):
        source = b.op("Expand", b.scalar(source, x.dtype), b.shape(places.dims))
    elif source.dims != places.dims:
        n = places.rank
        source = b.op("Slice", source, b.ints([0] * n), b.shape(places.dims), b.ints(list(range(n))))
    return b.op(
        "ScatterElements", x, places, b.cast(source, x.dtype), axis=axis_of(dim, x.rank), reduction=_KINDS[reduce]
    )


_KINDS = {
    None: "none", "add": "add", "multiply": "mul", "sum": "add", "prod": "mul", "amax": "max", "amin": "min",
}  # fmt: skip


def scatter_add(b: Builder, x: Value, dim: int, places: Value, source: Value) -> Value:
    """x with elements added along one dimension."""
    return scatter(b, x, dim, places, source, reduce="add")


def scatter_reduce(
    b: Builder, x: Value, dim: int, places: Value, source: Value, reduce: str, *, include_self: bool = True
) -> Value:
    """x with elements combined along one dimension, with the former ones or in their place."""
    if reduce not in _KINDS:
        raise NotImplementedError(f"scatter_reduce by {reduce}")
    if not include_self:
        least, most = (-math.inf, math.inf) if x.dtype.is_floating_point else _ends(x.dtype)
        start = {"sum": 0, "prod": 1, "amax": least, "amin": most}[reduce]
        x = b.finish(scatter(b, x, dim, places, start))
    return scatter(b, x, dim, places, source, reduce=reduce)


def _ends(dtype: torch.dtype) -> tuple[int, int]:
    return torch.iinfo(dtype).min, torch.iinfo(dtype).max


def slice_scatter(
    b: Builder, x: Value, source: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """x with the slice start:end:step replaced."""
    axis = axis_of(dim, x.rank)
    first = _from_the_front(b, 0 if start is None else start, x.dims[axis])
    if step != 1:
        count = b.scalar(source.dims[axis], torch.int64)
        steps = b.op("Range", b.scalar(0, torch.int64), count, b.scalar(1, torch.int64))
        places = b.op("Add", b.op("Mul", steps, b.scalar(step, torch.int64)), first)
        return index_copy(b, x, axis, Value(places.name, torch.int64, (source.dims[axis],)), source)
    if source.dims[axis] == x.dims[axis]:
        return b.cast(source, x.dtype)
    where = b.ints([axis])
    before = b.op("Slice", x, b.ints([0]), first, where)
    after = b.op("Slice", x, b.op("Add", first, b.dim(source.dims[axis])), b.ints([_END]), where)
    return b.op("Concat", before, b.cast(source, x.dtype), after, axis=axis)


def _from_the_front(b: Builder, at: Dim, size: Dim) -> Value:
    """A place as int64 [1], not negative: of a size that is not known yet only the run tells the sign. What lies before
    the first place is the first, as torch has it."""
    if isinstance(at, int) and at >= 0:
        return b.dim(at)
    place, none = b.dim(at), b.ints([0])
    back = b.op("Max", b.op("Add", place, b.dim(size)), none)
    return back if isinstance(at, int) else b.op("Where", b.op("Less", place, none, dtype=torch.bool), back, place)


def select_scatter(b: Builder, x: Value, source: Value, dim: int, at: Any) -> Value:
    """x with one index of a dimension replaced."""
    axis = axis_of(dim, x.rank)
    lifted = b.reshape(source, (*x.dims[:axis], 1, *x.dims[axis + 1 :]))
    return slice_scatter(b, x, lifted, axis, at)


def copy(b: Builder, x: Value, source: Value, *_: Any) -> Value:
    """The source in the shape of x."""
    value = b.cast(source, x.dtype)
    return value if source.dims == x.dims else b.op("Expand", value, b.shape(x.dims))


def nonzero(b: Builder, x: Value) -> Value:
    """The places that are not zero, one a row."""
    return b.op("Transpose", b.op("NonZero", x, dtype=torch.int64), perm=[1, 0])


def masked_select(b: Builder, x: Value, mask: Value) -> Value:
    """The elements under a mask, flat."""
    if x.dims != mask.dims:
        mask = b.op("Expand", mask, b.op("Shape", x, dtype=torch.int64))
        x = b.op("Expand", x, b.op("Shape", mask, dtype=torch.int64))
    return b.op("Compress", b.op("Reshape", x, b.ints([-1])), b.op("Reshape", mask, b.ints([-1])), axis=0)


def masked_scatter(b: Builder, x: Value, mask: Value, source: Value) -> Value:
    """x with the elements of `source`, one by one, where the mask holds (images among the tokens of a text)."""
    flat = b.op("Reshape", b.op("Expand", mask, b.shape(b.out_dims)), b.ints([-1]))
    count = b.op("CumSum", b.cast(flat, torch.int64), b.const(0, torch.int64))
    places = b.op("Sub", count, b.const(1, torch.int64))
    # Before the first place the count is 0, and -1 the last element: there is always one.
    given = b.op("Concat", b.op("Reshape", source, b.ints([-1])), b.const([0], x.dtype), axis=0)
    found = b.op("Reshape", b.op("Gather", given, places, axis=0), b.shape(b.out_dims))
    return b.op("Where", mask, found, x)


def one_hot(b: Builder, x: Value, classes: int = -1) -> Value:
    """1 at the class, 0 elsewhere."""
    if classes < 0:
        raise NotImplementedError("one_hot with the number of classes in the data")
    lifted = b.op("Unsqueeze", x, b.ints([x.rank]))
    hits = b.op("Equal", lifted, b.ints(list(range(classes))), dtype=torch.bool)
    return b.cast(hits, torch.int64)


def item(b: Builder, x: Value) -> Value:
    """The number in a one-element tensor."""
    if not is_number(b.out):
        raise NotImplementedError("a bool taken out of a tensor")
    return b.reshape(b.cast(x, torch.float64 if isinstance(b.out, torch.SymFloat) else torch.int64), (1,))


EMIT: dict[str, Emit] = {
    "aten.gather.default": gather, "aten.index_select.default": index_select, "aten.index.Tensor": index,
    "aten.take_along_dim.default": lambda b, x, places, dim=None: gather(b, x, dim, places),
    **{f"aten.{n}.default": index_put for n in ("index_put", "_unsafe_index_put")},
    "aten._unsafe_index.Tensor": index, "aten.index_copy.default": index_copy, "aten.index_add.default": index_add,
    "aten.index_fill.int_Scalar": index_fill, "aten.scatter.src": scatter, "aten.scatter.value": scatter,
    "aten.scatter.reduce": scatter, "aten.scatter.value_reduce": scatter, "aten.scatter_add.default": scatter_add,
    "aten.scatter_reduce.two": scatter_reduce, "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter, "aten.nonzero.default": nonzero, "aten.copy.default": copy,
    "aten.masked_select.default": masked_select, "aten.masked_scatter.default": masked_scatter,
    "aten.one_hot.default": one_hot,
    "aten.item.default": item, "aten._local_scalar_dense.default": item,
}  # fmt: skip
