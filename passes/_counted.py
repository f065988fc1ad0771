"""Integer tensors that count along one axis, whatever the inputs: positions, and what models compute of them.

arange(n)[None, :, None] + 3                                     ->  3, 4, 5, ... along axis 1
diff(positions, prepend=positions[:, :1] - 1) != 1               ->  0 everywhere
cumsum(...) of that                                              ->  0 everywhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qfx.graph import is_call, val
from qfx.passes import _match as m

aten = torch.ops.aten

_COMPARED = {
    "eq": int.__eq__, "ne": int.__ne__, "ge": int.__ge__, "gt": int.__gt__, "le": int.__le__, "lt": int.__lt__,
}  # fmt: skip
_SAME = (*m.SAME_VALUE, *m.CASTS)
_DTYPES = (torch.bool, torch.int32, torch.int64)  # smaller ones wrap around
_MOST = 2**30  # a start beyond it, and an axis behind it, might be too much for int32


@dataclass(frozen=True)
class Counted:
    """start, start + 1, ... along an axis (from 0); start everywhere where axis is None. Booleans are 0 and 1."""

    start: int
    axis: int | None


def counted(node: Any) -> Counted | None:
    """How an integer or boolean tensor counts; None where that is not known without the inputs."""
    if isinstance(node, bool | int):
        return Counted(int(node), None) if abs(node) < _MOST else None
    if not isinstance(node, fx.Node) or m.dtype(node) not in _DTYPES:
        return None
    rule = next((rule for targets, rule in _RULES if is_call(node, *targets)), None)
    found = None if rule is None else rule(node)
    if found is None or abs(found.start) >= _MOST:
        return None
    one = found.axis is not None and m.same_size(m.shape(node)[found.axis], 1)
    return Counted(found.start, None) if one else found


def is_causal(mask: Any) -> bool:
    """Does a boolean mask [.., S, S] show each row the columns up to its own, and nothing else?"""
    while is_call(mask, aten.expand.default, *m.SAME_VALUE) or _is_leading(mask):
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or m.rank(mask) < 2 or not m.same_size(*m.shape(mask)[-2:]):
        return False
    if not is_call(mask, *(getattr(aten, name).Tensor for name in ("le", "lt", "ge", "gt"))):
        return False
    name = mask.target.name().partition("::")[2].partition(".")[0]  # type: ignore[union-attr]
    small, large = mask.args[:2] if name in ("le", "lt") else reversed(mask.args[:2])
    column, row = (_spread(operand, mask) for operand in (small, large))
    if column is None or row is None or (column.axis, row.axis) != (m.rank(mask) - 1, m.rank(mask) - 2):
        return False
    return column.start - row.start == (0 if name in ("le", "ge") else -1)


def _is_leading(node: Any) -> bool:
    """Does it add an axis before the last two?"""
    return is_call(node, aten.unsqueeze.default) and node.args[1] % m.rank(node) < m.rank(node) - 2


def _arange(node: fx.Node) -> Counted | None:
    start = 0 if is_call(node, aten.arange.default) else node.args[0]
    return Counted(start, 0) if isinstance(start, int) else None


def _same(node: fx.Node) -> Counted | None:
    found = counted(node.args[0])
    whole = val(node).dtype in (val(node.args[0]).dtype, torch.int64, torch.int32)
    return found if whole or (found is not None and found.axis is None and found.start in (0, 1)) else None


def _unsqueeze(node: fx.Node) -> Counted | None:
    found, dim = counted(node.args[0]), node.args[1]
    if found is None or found.axis is None:
        return found
    assert isinstance(dim, int)
    return Counted(found.start, found.axis + (dim % m.rank(node) <= found.axis))


def _expand(node: fx.Node) -> Counted | None:
    return _spread(node.args[0], node)


def _slice(node: fx.Node) -> Counted | None:
    given = m.arguments(node)
    found, start = counted(given["self"]), given["start"] or 0
    if found is None or found.axis is None or given["dim"] % m.rank(node) != found.axis:
        return found
    if given["step"] != 1 or not isinstance(start, int) or start < 0:
        return None
    return Counted(found.start + start, found.axis)


def _sum(node: fx.Node) -> Counted | None:
    """Of two that do not count along different axes, or the difference of two that do along the same."""
    first, second = (_spread(operand, node) for operand in node.args[:2])
    if first is None or second is None or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    if m.dtype(node) == torch.bool:  # True + True is True
        return None
    if is_call(node, *m.ADD):
        if first.axis is None or second.axis is None:
            return Counted(first.start + second.start, first.axis if second.axis is None else second.axis)
        return None
    if second.axis is None or second.axis == first.axis:
        return Counted(first.start - second.start, first.axis if second.axis is None else None)
    return None


def _spread(operand: Any, result: fx.Node) -> Counted | None:
    """As it counts in a result with which it is broadcast; None where sizes may be the same or not."""
    found = counted(operand)
    if found is None or found.axis is None:
        return found
    axis = found.axis + m.rank(result) - m.rank(operand)
    return Counted(found.start, axis) if m.same_size(m.shape(operand)[found.axis], m.shape(result)[axis]) else None


def _diff(node: fx.Node) -> Counted | None:
    given = m.arguments(node)
    found, before = counted(given["self"]), given["prepend"]
    if found is None or given["n"] != 1 or given["append"] is not None:
        return None
    step = int(found.axis is not None and found.axis == given["dim"] % m.rank(node))
    if found.axis is not None and not step:
        return Counted(0, None) if before is None else None
    if before is not None:
        first = counted(before)
        one = m.same_size(m.shape(before)[given["dim"]], 1)
        if first is None or first.axis is not None or not one or found.start - first.start != step:
            return None
    return Counted(step, None)


def _compare(node: fx.Node) -> Counted | None:
    """Of two that are the same everywhere, or count along the same axis."""
    first, second = (_spread(operand, node) for operand in node.args[:2])
    if first is None or second is None or first.axis != second.axis:
        return None
    name = node.target.name().partition("::")[2].partition(".")[0]  # type: ignore[union-attr]
    return Counted(int(_COMPARED[name](first.start, second.start)), None)


def _cumsum(node: fx.Node) -> Counted | None:
    found = counted(node.args[0])
    return found if found == Counted(0, None) else None


def _index(node: fx.Node) -> Counted | None:
    """x[rows, columns, ...], an index for each axis: of one number it is that, of what counts as the index does."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(indices, Sequence)
    found = counted(source)
    if found is None or found.axis is None:
        return found
    if len(indices) != m.rank(source) or not all(isinstance(index, fx.Node) for index in indices):
        return None
    if any(val(index).dtype == torch.bool for index in indices):
        return None
    place = _spread(indices[found.axis], node)
    if place is None or place.start < 0:
        return None
    return Counted(found.start + place.start, place.axis)


def _compares(overload: str) -> tuple[Any, ...]:
    return tuple(getattr(getattr(aten, name), overload) for name in _COMPARED)


_RULES = (
    ((aten.arange.default, aten.arange.start), _arange),
    (_SAME, _same),
    ((aten.unsqueeze.default,), _unsqueeze),
    ((aten.expand.default,), _expand),
    ((aten.slice.Tensor,), _slice),
    ((*m.ADD, *m.SUB), _sum),
    ((aten.diff.default,), _diff),
    ((*_compares("Scalar"), *_compares("Tensor")), _compare),
    ((aten.cumsum.default,), _cumsum),
    ((aten.index.Tensor,), _index),
)
