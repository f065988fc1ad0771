"""Where channels go through calls that only move values: splitting heads, transposing, slicing a fused projection.

A tensor of channel numbers takes the place of the value and the very calls of the graph move it, so that no layout has
to be recognised. Symbolic sizes have their example values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import get_tensor, is_call, schema_name, val
from qfx.passes import _match as m
from qfx.passes._sites import reads_size

aten = torch.ops.aten

_IDENTITY = (*m.CASTS, *m.SAME_VALUE, aten.dropout.default)
_MOVES = (
    *m.RESHAPES,
    *m.TRANSPOSES,
    aten.expand.default,
    aten.broadcast_to.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    operator.getitem,
)


def moves(node: Any) -> bool:
    """Does a call only move the values of its first argument?"""
    if not is_call(node, *_IDENTITY, *_MOVES, aten.index.Tensor) or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.index.Tensor:
        return _picks(node)
    return node.target is not aten.dropout.default or node.args[2] is False


def _picks(node: fx.Node) -> bool:
    """Indices along one axis that are a constant: x[:, :, [4]]."""
    given = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    return len(given) == 1 and isinstance(given[0], fx.Node) and given[0].op == "get_attr"


def source(value: Any) -> Any:
    """Up through calls that only move values."""
    while moves(value):
        value = value.args[0]
    return value


def numbered(value: fx.Node, dims: tuple[int, ...]) -> Tensor | None:
    """Numbers 0, 1, ... along `dims` of a node's tensor (row-major), equal along the others; None for unknown sizes."""
    sizes = [known(size) for size in m.shape(value)]
    if any(size is None for size in sizes) or not sizes:
        return None
    shape = [size if i in {d % len(sizes) for d in dims} else 1 for i, size in enumerate(sizes)]
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.int32).reshape(shape).expand(sizes)


def one_linear(value: fx.Node, numbers: Tensor) -> tuple[fx.Node, list[int] | None] | None:
    """The linear that alone reads a value whose channels have these numbers, and the number at each of its columns,
    None where that cannot be followed."""
    found, ends = flow(value, numbers)
    if len(ends) != 1 or schema_name(ends[0][0]) != "aten::linear" or ends[0][0].args[0] is not ends[0][1]:
        return None
    return ends[0][0], along(found[ends[0][1]], -1)


def flow(value: fx.Node, numbers: Tensor) -> tuple[dict[fx.Node, Tensor], list[tuple[fx.Node, fx.Node]]]:
    """Follow channel numbers: those at every node that only moves them, and the ends, (user, the node it reads)."""
    found: dict[fx.Node, Any] = {value: numbers}
    ends: list[tuple[fx.Node, fx.Node]] = []
    todo = [value]
    while todo:
        at = todo.pop(0)
        for user in at.users:
            if reads_size(user):
                continue
            carried = moved(user, found[at]) if moves(user) and user.all_input_nodes[0] is at else None
            if carried is None:
                ends.append((user, at))
            elif user not in found:
                found[user] = carried
                todo.append(user)
    return found, ends


def carried(
    value: Any, start: Callable[[fx.Node], Any], through: Callable[[fx.Node], bool], found: dict[fx.Node, Any]
) -> Any:
    """The other way: the numbers at a value, from where they start, moved by the very calls of the graph.

    start: the numbers that start at a node, a text why none can, None where it is no start. through: is it a call that
    leaves the numbers of its first argument? found: filled with every node on the way. A text says why there are none.
    """
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return "it does not come straight from a linear"
    if value in found:
        return found[value]
    numbers = start(value)
    if numbers is None and is_call(value, aten.cat.default):  # the rotated and the other part of a head
        given = m.arguments(value)
        numbers = _joined([carried(part, start, through, found) for part in given["tensors"]], given["dim"])
    elif numbers is None and is_call(value, aten.slice_scatter.default):
        numbers = _written(value, start, through, found)
    elif numbers is None and (moves(value) or through(value)):
        numbers = carried(value.args[0], start, through, found)
        if not isinstance(numbers, str) and not through(value):
            numbers = moved(value, numbers)
            numbers = "its channels cannot be followed" if numbers is None else numbers
    elif numbers is None:
        return f"it does not come straight from a linear, %{value.name} makes it"
    found[value] = numbers
    return numbers


def _written(
    node: fx.Node, start: Callable[[fx.Node], Any], through: Callable[[fx.Node], bool], found: dict[fx.Node, Any]
) -> Any:
    """Numbers of a tensor of which a part was written: x[..., :16] = y. Those of an empty one are -1."""
    base, part = node.args[:2]
    whole: Any = torch.full([known(size) for size in m.shape(base)], -1, dtype=torch.int32)
    if not is_call(base, aten.new_empty.default, aten.empty.memory_format):
        whole = carried(base, start, through, found)
    is_copy = is_call(part, aten.copy.default)
    numbers = carried(part.args[1] if is_copy else part, start, through, found)  # type: ignore[union-attr]
    if told := next((one for one in (whole, numbers) if isinstance(one, str)), None):
        return told
    if is_copy:
        assert isinstance(part, fx.Node)
        found[part] = found[part.args[0]] = numbers  # type: ignore[index]  # what is written over is not read
    try:
        numbers = numbers.expand([known(size) for size in m.shape(part)]).to(whole.dtype)
        return aten.slice_scatter.default(whole, numbers, *(known(a) for a in node.args[2:]))
    except (RuntimeError, TypeError):
        return "its channels cannot be followed"


def _joined(parts: list[Any], dim: Any) -> Any:
    if told := next((part for part in parts if isinstance(part, str)), None):
        return told
    sizes = [part.shape for part in parts if isinstance(part, Tensor)]
    if len(sizes) != len(parts) or any(len(size) != len(sizes[0]) for size in sizes) or not isinstance(dim, int):
        return "its channels cannot be followed"
    return torch.cat(parts, dim)


def along(numbers: Any, *dims: int) -> list[int] | None:
    """The numbers along `dims` (row-major), or None where they differ along another axis."""
    if not isinstance(numbers, Tensor):
        return None
    kept = {d % numbers.dim() for d in dims}
    for dim in range(numbers.dim()):
        if dim not in kept:
            if numbers.shape[dim] == 0 or not bool((numbers == numbers.narrow(dim, 0, 1)).all()):
                return None
            numbers = numbers.narrow(dim, 0, 1)
    return [int(n) for n in numbers.reshape(-1)]


def numbers_in(value: Any) -> set[int]:
    """All channel numbers of a tensor, or of several."""
    if isinstance(value, Tensor):
        return set(value.unique().tolist())
    return set().union(*(numbers_in(v) for v in value))


def moved(node: fx.Node, numbers: Any) -> Any:
    """Channel numbers behind a call that only moves them (see `moves`); None where it cannot be run on them."""
    if node.target in _IDENTITY:
        return numbers
    if node.target is aten.index.Tensor:
        return _picked(node, numbers)
    try:
        rest = [known(a) for a in node.args[1:]]
        kwargs = {key: known(a) for key, a in node.kwargs.items()}
        target: Any = aten.reshape.default if node.target in m.RESHAPES else node.target
        return target(numbers, *rest, **kwargs)
    except (RuntimeError, TypeError, IndexError):
        return None


def _picked(node: fx.Node, numbers: Any) -> Tensor | None:
    """Numbers behind `_picks`."""
    indices: Any = node.args[1]
    axis = next(i for i, index in enumerate(indices) if index is not None)
    gm = node.graph.owning_module
    if not isinstance(numbers, Tensor) or gm is None:
        return None
    chosen = get_tensor(gm, str(indices[axis].target))
    if chosen.dim() != 1 or chosen.dtype.is_floating_point or chosen.dtype == torch.bool:
        return None
    return numbers.index_select(axis, chosen.to(torch.int64).cpu() % numbers.shape[axis])


def known(value: Any) -> Any:
    """Sizes as plain numbers, by the example that the graph was captured with; None for what only data decide."""
    if isinstance(value, fx.Node):
        value = val(value)
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else None
    if isinstance(value, list | tuple):
        return [known(v) for v in value]
    return value
