"""Views, joins and cuts: operators that move elements and compute nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit, operands
from qfx.backends.onnx.values import Dim, Value, dims_of

_END = 2**63 - 1


def axis_of(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % rank if rank else 0


def view(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """Any operator whose result has the same elements in the same order: a Reshape to the shape that torch found."""
    return b.views.get((x.name, b.out_dims)) or b.reshape(x, b.out_dims)


def identity(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """The input; `finish` casts it to the result's dtype."""
    return x


def expand(b: Builder, x: Value, *_: Any, **__: Any) -> Value:
    """Broadcast to the result's shape."""
    if x.shape == b.out_dims:
        return x
    return b.op("Expand", x, b.shape(b.out_dims))


def transpose(b: Builder, x: Value, first: int, second: int) -> Value:
    """Swap two dimensions."""
    if x.rank < 2:
        return x
    order = list(range(x.rank))
    first, second = axis_of(first, x.rank), axis_of(second, x.rank)
    order[first], order[second] = order[second], order[first]
    return b.views.get((x.name, tuple(order))) or b.op("Transpose", x, perm=order)


def transpose_last(b: Builder, x: Value) -> Value:
    """Swap the last two dimensions."""
    return transpose(b, x, -2, -1)


def permute(b: Builder, x: Value, order: Sequence[int]) -> Value:
    """Reorder the dimensions."""
    return b.op("Transpose", x, perm=[axis_of(d, x.rank) for d in order]) if x.rank else x


def movedim(b: Builder, x: Value, source: Any, destination: Any) -> Value:
    """Move dimensions to other places."""
    sources, targets = ([v] if isinstance(v, int) else list(v) for v in (source, destination))
    taken = {axis_of(t, x.rank): axis_of(s, x.rank) for s, t in zip(sources, targets, strict=True)}
    rest = iter(d for d in range(x.rank) if d not in taken.values())
    return permute(b, x, [taken[i] if i in taken else next(rest) for i in range(x.rank)])


def unsqueeze(b: Builder, x: Value, dim: int) -> Value:
    """Insert a dimension of size 1."""
    return b.op("Unsqueeze", x, b.ints([axis_of(dim, x.rank + 1)]))


def squeeze(b: Builder, x: Value, dim: Any = None) -> Value:
    """Drop dimensions of size 1: all, or those given that have it."""
    given = range(x.rank) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = [axis_of(d, x.rank) for d in given if x.rank and x.dims[axis_of(d, x.rank)] == 1]
    return b.op("Squeeze", x, b.ints(sorted(axes))) if axes else x


def slice_(b: Builder, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    """x[start:end:step] along one dimension; bounds are cut to the size as torch does."""
    dim = axis_of(dim, x.rank)
    first: Dim = 0 if start is None else start
    last: Dim = _END if end is None else end
    size = x.dims[dim]
    whole = (isinstance(last, int) and (last == _END or (isinstance(size, int) and last >= size))) or last == size
    if whole and step == 1 and (first == 0 or (isinstance(first, int) and isinstance(size, int) and first <= -size)):
        return x
    return b.op("Slice", x, b.dim(first), b.ints([_END]) if whole else b.dim(last), b.ints([dim]), b.ints([step]))


def select(b: Builder, x: Value, dim: int, index: Any) -> Value:
    """x[index] along one dimension, which goes away."""
    return b.op("Gather", x, b.scalar(index, torch.int64), axis=axis_of(dim, x.rank))


def narrow(b: Builder, x: Value, dim: int, start: Any, length: Any) -> Value:
    """x[start:start + length] along one dimension."""
    return slice_(b, x, dim, start, start + length)


def split_with_sizes(b: Builder, x: Value, sizes: Sequence[Dim], dim: int = 0) -> list[Value]:
    """Pieces of the given sizes."""
    if len(sizes) == 1:
        return [x]
    return b.ops("Split", x, b.shape(sizes), dtypes=[x.dtype] * len(sizes), axis=axis_of(dim, x.rank))


def split(b: Builder, x: Value, _: Any, dim: int = 0) -> list[Value]:
    """Pieces of the sizes that torch found (split into equal parts, chunk)."""
    axis = axis_of(dim, x.rank)
    return split_with_sizes(b, x, [dims_of(piece.shape)[axis] for piece in b.out], axis)


def unbind(b: Builder, x: Value, dim: int = 0) -> list[Value]:
    """One value for each index of a dimension."""
    axis = axis_of(dim, x.rank)
    pieces = split_with_sizes(b, x, [1] * len(b.out), axis)
    return [b.op("Squeeze", piece, b.ints([axis])) for piece in pieces]


def cat(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Join along a dimension. Empty one-dimensional tensors, which torch allows, are left out."""
    kept = [t for t in operands(b, *tensors, dtype=b.out_dtype) if t.shape != (0,) or len(b.out_dims) == 1]
    axis = axis_of(dim, len(b.out_dims))
    kept = [t for t in kept if t.dims[axis] != 0] or kept[:1]
    return kept[0] if len(kept) == 1 else b.op("Concat", *kept, axis=axis)


def stack(b: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Join along a new dimension."""
    axis = axis_of(dim, len(b.out_dims))
    pieces = [b.op("Unsqueeze", t, b.ints([axis])) for t in operands(b, *tensors, dtype=b.out_dtype)]
    return pieces[0] if len(pieces) == 1 else b.op("Concat", *pieces, axis=axis)


def repeat(b: Builder, x: Value, repeats: Sequence[Dim]) -> Value:
    """Tile; missing leading dimensions are added."""
    lead = len(repeats) - x.rank
    if lead < 0:
        repeats, lead = (*(1 for _ in range(-lead)), *repeats), 0
    x = b.reshape(x, (*(1 for _ in range(lead)), *x.dims)) if lead else x
    return x if all(r == 1 for r in repeats) else b.op("Tile", x, b.shape(repeats))


def repeat_interleave(b: Builder, x: Value, repeats: Any, dim: int | None = None, **_: Any) -> Value:
    """Every element `repeats` times in a row, along a dimension or flat."""
    if isinstance(repeats, Value):
        raise NotImplementedError("repeat counts in a tensor")
    if dim is None:
        count: Dim = 1
        for size in x.dims:
            count = count * size
        x, dim = b.reshape(x, (count,)), 0
    axis = axis_of(dim, x.rank)
    shape = [*x.dims[: axis + 1], repeats, *x.dims[axis + 1 :]]
    lifted = b.op("Unsqueeze", x, b.ints([axis + 1]))
    return b.reshape(b.op("Expand", lifted, b.shape(shape)), b.out_dims)


def flip(b: Builder, x: Value, dims: Sequence[int]) -> Value:
    """Reverse along dimensions."""
    if not dims:
        return x
    n = len(dims)
    axes = b.ints([axis_of(d, x.rank) for d in dims])
    return b.op("Slice", x, b.ints([-1] * n), b.ints([-_END] * n), axes, b.ints([-1] * n))


def roll(b: Builder, x: Value, shifts: Sequence[Any], dims: Sequence[int] = ()) -> Value:
    """Rotate along dimensions."""
    if not dims:
        flat = b.reshape(x, (sympy.prod(x.dims),))
        return b.reshape(roll(b, flat, shifts, [0]), b.out_dims)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = axis_of(dim, x.rank)
        size = x.dims[axis]
        if isinstance(shift, int) and isinstance(size, int) and (size == 0 or shift % size == 0):
            continue
        start = b.op("Mod", b.op("Neg", b.dim(shift)), b.dim(size))
        tail = b.op("Slice", x, start, b.ints([_END]), b.ints([axis]))
        head = b.op("Slice", x, b.ints([0]), start, b.ints([axis]))
        joined = b.op("Concat", tail, head, axis=axis)
        x = Value(joined.name, joined.dtype, x.shape)
    return x


def tri(upper: int) -> Emit:
    """tril and triu."""

    def emit(b: Builder, x: Value, diagonal: Any = 0) -> Value:
        return b.op("Trilu", x, b.scalar(diagonal, torch.int64), upper=upper)

    return emit


def pad(b: Builder, x: Value, widths: Sequence[Dim], value: Any = 0, mode: str = "constant") -> Value:
    """Pad the last dimensions (torch's order: last dimension first); negative widths cut."""
    before: list[Dim] = [0] * x.rank
    after: list[Dim] = [0] * x.rank
    for i in range(len(widths) // 2):
        before[x.rank - 1 - i], after[x.rank - 1 - i] = widths[2 * i], widths[2 * i + 1]
    fill = b.scalar(value or 0, x.dtype) if mode == "constant" else None
    return b.op("Pad", x, b.shape([*before, *after]), fill, mode=mode)


def pad_mode(b: Builder, x: Value, widths: Sequence[Dim], mode: str = "constant", value: Any = None) -> Value:
    """aten.pad: constant, reflect, replicate (edge) or circular (wrap)."""
    return pad(b, x, widths, value, {"replicate": "edge", "circular": "wrap"}.get(mode, mode))


def pad_as(mode: str) -> Emit:
    """Padding by a fixed mode."""

    def emit(b: Builder, x: Value, widths: Sequence[Dim]) -> Value:
        return pad(b, x, widths, 0, mode)

    return emit


def unfold(b: Builder, x: Value, dim: int, size: int, step: int) -> Value:
    """Windows of a dimension, in a new last one."""
    axis = axis_of(dim, x.rank)
    count = b.scalar(b.out_dims[axis], torch.int64)
    starts = b.op("Range", b.scalar(0, torch.int64), count, b.scalar(1, torch.int64))
    starts = b.op("Unsqueeze", b.op("Mul", starts, b.scalar(step, torch.int64)), b.ints([1]))
    windows = b.op("Gather", x, b.op("Add", starts, b.ints(list(range(size)))), axis=axis)
    order = [*range(axis + 1), *range(axis + 2, x.rank + 1), axis + 1]
    return b.op("Transpose", windows, perm=order)


def diagonal(b: Builder, x: Value, offset: int = 0, first: int = 0, second: int = 1) -> Value:
    """The diagonal of two dimensions, in a new last one."""
    rows, columns = axis_of(first, x.rank), axis_of(second, x.rank)
    rest = [d for d in range(x.rank) if d not in (rows, columns)]
    width = x.dims[columns]
    flat = b.reshape(permute(b, x, [*rest, rows, columns]), (*(x.dims[d] for d in rest), x.dims[rows] * width))
    count = b.scalar(b.out_dims[-1], torch.int64)
    along = b.op("Range", b.scalar(0, torch.int64), count, b.scalar(1, torch.int64))
    start = offset if offset >= 0 else -offset * width
    places = b.op("Add", b.op("Mul", along, b.scalar(width + 1, torch.int64)), b.scalar(start, torch.int64))
    return b.op("Gather", flat, places, axis=len(rest))


def broadcast_tensors(b: Builder, tensors: Sequence[Value]) -> list[Value]:
    """Every tensor in the common shape."""
    shapes = [dims_of(fake.shape) for fake in b.out]
    return [t if t.shape == s else b.op("Expand", t, b.shape(s)) for t, s in zip(tensors, shapes, strict=True)]


def meshgrid(b: Builder, tensors: Sequence[Value], *, indexing: str = "ij") -> list[Value]:
    """Every vector spread over the grid of all."""
    rank = len(tensors)
    order = [1, 0, *range(2, rank)] if indexing == "xy" and rank > 1 else list(range(rank))
    spread = []
    for i, (t, fake) in enumerate(zip(tensors, b.out, strict=True)):
        size = t.dims[0] if t.rank else 1
        column = b.reshape(t, [size if order[i] == d else 1 for d in range(rank)])
        spread.append(b.op("Expand", column, b.shape(dims_of(fake.shape))))
    return spread


def diff(b: Builder, x: Value, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Value:
    """x[i + 1] - x[i] along a dimension."""
    if n != 1 or x.dtype == torch.bool:
        raise NotImplementedError("differences of higher order, or of bool")
    axis = axis_of(dim, x.rank)
    parts = [p for p in (prepend, x, append) if p is not None]
    whole = x if len(parts) == 1 else b.op("Concat", *operands(b, *parts, dtype=x.dtype), axis=axis)
    later = b.op("Slice", whole, b.ints([1]), b.ints([_END]), b.ints([axis]))
    earlier = b.op("Slice", whole, b.ints([0]), b.ints([-1]), b.ints([axis]))
    return b.op("Sub", later, earlier)


_VIEWS = (
    "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int", "view_as.default",
    "reshape_as.default", "_reshape_alias.default", "view_copy.default",
)  # fmt: skip
_SAME = (
    "alias.default", "detach.default", "lift_fresh_copy.default", "lift_fresh.default", "clone.default",
    "contiguous.default",
    "to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy.default", "type_as.default", "dropout.default",
    "native_dropout.default", "positive.default", "alias_copy.default", "detach_.default", "conj.default",
    "resolve_conj.default",
)  # fmt: skip

EMIT: dict[str, Emit] = {
    **{f"aten.{name}": view for name in _VIEWS},
    **{f"aten.{name}": identity for name in _SAME},
    "prims.convert_element_type.default": identity,
    **{f"aten.{n}.default": expand for n in ("expand", "expand_as", "broadcast_to", "expand_copy")},
    "aten.transpose.int": transpose, "aten.swapaxes.default": transpose, "aten.swapdims.default": transpose,
    "aten.t.default": transpose_last, "aten.numpy_T.default": transpose_last, "aten.mT.default": transpose_last,
    "aten.permute.default": permute, "aten.movedim.int": movedim, "aten.movedim.intlist": movedim,
    "aten.unsqueeze.default": unsqueeze, "aten.squeeze.default": squeeze, "aten.squeeze.dim": squeeze,
    "aten.squeeze.dims": squeeze, "aten.slice.Tensor": slice_, "aten.select.int": select, "aten.narrow.default": narrow,
    "aten.split.Tensor": split, "aten.split.sizes": split, "aten.split_with_sizes.default": split_with_sizes,
    "aten.chunk.default": split, "aten.tensor_split.sections": split, "aten.unbind.int": unbind,
    "aten.cat.default": cat, "aten.concat.default": cat, "aten.concatenate.default": cat, "aten.stack.default": stack,
    "aten.repeat.default": repeat, "aten.tile.default": repeat, "aten.repeat_interleave.self_int": repeat_interleave,
    "aten.flip.default": flip, "aten.roll.default": roll, "aten.tril.default": tri(0), "aten.triu.default": tri(1),
    "aten.constant_pad_nd.default": pad, "aten.pad.default": pad_mode,
    **{f"aten.reflection_pad{n}d.default": pad_as("reflect") for n in (1, 2, 3)},
    **{f"aten.replication_pad{n}d.default": pad_as("edge") for n in (1, 2, 3)},
    "aten.broadcast_tensors.default": broadcast_tensors, "aten.diff.default": diff,
    "aten.meshgrid.default": meshgrid, "aten.meshgrid.indexing": meshgrid,
    "aten.unfold.default": unfold, "aten.diagonal.default": diagonal,
}  # fmt: skip
