"""Views by strides (aten.as_strided) gather elements, so that they no longer depend on how memory is laid out.

    %as_strided: f32[3,4,8] = aten.as_strided(%x, [3, 4, 8], [16, 8, 1])
    ->
    %reshape: f32[8,8] = aten.reshape(%x, [-1, 8])
    %arange: i64[4] = aten.arange(4, device=cpu, dtype=i64)
    %arange_1: i64[3] = aten.arange(3, device=cpu, dtype=i64)
    %mul: i64[3] = aten.mul.Tensor(%arange_1, 2)
    %reshape_1: i64[3,1] = aten.reshape(%mul, [3, 1])
    %add: i64[3,4] = aten.add.Tensor(%reshape_1, %arange)
    %index: f32[3,4,8] = aten.index.Tensor(%reshape, [%add])

To be run before any other pass: later ones take copies away and give values that are equal and lie in memory otherwise.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qfx.errors import UnsupportedError, explain
from qfx.graph import is_call, val
from qfx.passes import _match as m
from qfx.passes._build import call, matched, on_sizes, replace

aten = torch.ops.aten


def strided(gm: fx.GraphModule) -> bool:
    """Rewrite every aten.as_strided of a tensor without gaps, however its dimensions are ordered in memory.

    Raises UnsupportedError for other tensors (slices, expanded ones), which would be read beyond what they show, and
    for writes by strides.
    """
    for node in gm.graph.nodes:
        if is_call(node, aten.as_strided_scatter.default):
            raise _writes(node)
    nodes = [n for n in gm.graph.nodes if is_call(n, aten.as_strided.default)]
    for node in nodes:
        replace(node, _gathered(gm, node))
    return matched(gm, "strided", len(nodes))


def _writes(node: fx.Node) -> UnsupportedError:
    return UnsupportedError(
        explain(
            f"{node.name!r} writes to memory by strides, and what it changes depends on how memory is laid out",
            expected="changes in place by indices, slices or masks",
            found="a change in place of what as_strided gives",
            node=node,
            next_step="write to x[...] or by torch.where",
        )
    )


def _gathered(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    given = m.arguments(node)
    x, sizes, strides = given["self"], list(given["size"]), list(given["stride"])
    value, offset = val(x), given["storage_offset"]
    start = 0 if offset is None else on_sizes(gm, operator.sub, offset, value.storage_offset(), node)
    order = _order(value)
    if order is None or not _inside(value, sizes, strides, start):
        raise UnsupportedError(
            explain(
                f"{node.name!r} reads memory by strides beyond the tensor that it is given",
                expected="as_strided that stays within a tensor without gaps",
                found=f"sizes {_texts(value.shape)}, strides {_texts(value.stride())}, read from {_value(start)} on "
                f"by sizes {_texts(sizes)}, strides {_texts(strides)}",
                node=node,
                next_step="give it a copy (x.contiguous()), or use unfold or slices",
            )
        )
    if order != list(range(value.dim())):
        x = call(gm, aten.permute.default, x, order, like=node)
    width = _width(value, order, sizes, strides, start)
    x = call(gm, aten.reshape.default, x, [-1] if width == 1 else [-1, width], like=node)
    if width > 1:
        sizes, strides = sizes[:-1], strides[:-1]
    index = _index(gm, sizes, [_rows(gm, s, width, node) for s in strides], node, val(x).device)
    start = _rows(gm, start, width, node)
    if not (isinstance(start, int) and start == 0):
        index = call(gm, aten.add.Tensor, index, start, like=node)
    return call(gm, aten.index.Tensor, x, [index], like=node)


def _order(value: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest in memory; None where memory has gaps or is read twice."""
    hints = [int(s.node.hint if isinstance(s, torch.SymInt) else s) for s in value.stride()]
    ones = [m.known(s) == 1 for s in value.shape]
    order = sorted(range(value.dim()), key=lambda d: (-hints[d], not ones[d]))
    expected: Any = 1
    for d in reversed(order):
        if not ones[d] and not statically_known_true(value.stride(d) == expected):
            return None
        expected = expected * value.shape[d]
    return order


def _inside(value: Tensor, sizes: Sequence[Any], strides: Sequence[Any], start: Any) -> bool:
    """Whether no element before the tensor is read, and none behind it. Behind it sizes that vary may lead: there
    gathering is an error when it runs, where an index below 0 would count from the end."""
    first = last = _value(start)
    for size, stride in zip(map(_value, sizes), map(_value, strides), strict=True):
        last = last + (size - 1) * stride
    return bool(statically_known_true(first >= 0)) and not statically_known_true(last >= value.numel())


def _width(value: Tensor, order: Sequence[int], sizes: Sequence[Any], strides: Sequence[Any], start: Any) -> int:
    """Elements that lie side by side and are read together: whole rows of the tensor, or 1."""
    row = m.known(value.shape[order[-1]]) if order else 1
    if not isinstance(row, int) or row < 2 or len(sizes) < 2 or not m.same_size(_value(sizes[-1]), row):
        return 1
    steps = [*map(_value, strides[:-1]), _value(start)]
    whole = all(statically_known_true(step % row == 0) for step in steps)
    return row if whole and m.same_size(_value(strides[-1]), 1) else 1


def _value(size: Any) -> Any:
    """A size, or that of a node."""
    return m.known(size.meta["val"]) if isinstance(size, fx.Node) else size


def _texts(sizes: Sequence[Any]) -> list[str]:
    return [str(_value(size)) for size in sizes]


def _rows(gm: fx.GraphModule, step: Any, width: int, like: fx.Node) -> Any:
    return step if width == 1 else on_sizes(gm, operator.floordiv, step, width, like)


def _index(gm: fx.GraphModule, sizes: Sequence[Any], strides: Sequence[Any], like: fx.Node, device: Any) -> fx.Node:
    """Where each element (or row) lies, i64 of these sizes."""
    found: fx.Node | None = None
    for dim in reversed(range(len(sizes))):
        part = call(gm, aten.arange.default, sizes[dim], dtype=torch.int64, device=device, like=like)
        if not (isinstance(strides[dim], int) and strides[dim] == 1):
            part = call(gm, aten.mul.Tensor, part, strides[dim], like=like)
        if found is not None:
            shape = [sizes[dim], *[1] * (len(sizes) - dim - 1)]
            part = call(gm, aten.reshape.default, part, shape, like=like)
            part = call(gm, aten.add.Tensor, part, found, like=like)
        found = part
    if found is None:
        return call(gm, aten.full.default, [], 0, dtype=torch.int64, device=device, like=like)
    return found
