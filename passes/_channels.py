"""Where channels go through calls that only move values: splitting heads, transposing, slicing a fused projection.

A tensor of channel numbers takes the place of the value and the very calls of the graph move it, so that no layout has
to be recognised. Symbolic sizes have their example values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qfx.graph import is_call, val
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
    if not is_call(node, *_IDENTITY, *_MOVES) or not isinstance(node.args[0], fx.Node):
        return False
    return node.target is not aten.dropout.default or node.args[2] is False


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
    try:
        rest = [known(a) for a in node.args[1:]]
        kwargs = {key: known(a) for key, a in node.kwargs.items()}
        target: Any = aten.reshape.default if node.target in m.RESHAPES else node.target
        return target(numbers, *rest, **kwargs)
    except (RuntimeError, TypeError, IndexError):
        return None


def known(value: Any) -> Any:
    """Sizes as plain numbers, by the example that the graph was captured with; None for what only data decide."""
    if isinstance(value, fx.Node):
        value = val(value)
    if isinstance(value, torch.SymInt):
        return value.node.hint if value.node.has_hint() else None
    if isinstance(value, list | tuple):
        return [known(v) for v in value]
    return value
