"""One graph for all calls of some data: which sizes vary in them, and whether a trace holds for each.

A trace of one call fixes what its forward computes in Python: the steps of a loop over tokens, the branch that a length
takes. torch.export notes the condition and lets the graph be used anywhere, with other results or an error inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qfx import traced_call
from qfx.conditions import hold, sizes_of

Calls: TypeAlias = Sequence[tuple[Sequence[Any], Mapping[str, Any]]]  # (args, kwargs) of each


class OtherSize(Exception):  # noqa: N818  (how a trace is left, not what a user sees)
    """A graph traced with one call does not hold for the sizes of another."""


@dataclass(frozen=True)
class CommonSizes:
    """Sizes of the calls that one graph is to run.

    varying: of each flat argument the axes along which it differs between calls; none of what is no tensor.
    others: of each other kind of call the example's size -> its own, of the axes that vary, without sizes of 1, for
    which torch never traces; those left out in which one size of the example stands for two.
    """

    varying: tuple[frozenset[int], ...]
    others: tuple[Mapping[int, int], ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Calls) -> CommonSizes:
        """Raises ValueError where a call has other arguments than the example, args and kwargs."""
        example, spec = pytree.tree_flatten((args, kwargs))
        shapes = dict.fromkeys(_shapes(traced_call.leaves(a, k, spec)) for a, k in calls)
        own = _shapes(example)
        varying = tuple(
            frozenset(axis for axis in range(len(shape)) if any(_differs(shape, other[i], axis) for other in shapes))
            for i, shape in enumerate(own)
        )
        others = (_sizes(own, other, varying) for other in shapes if other != own)
        return cls(varying, tuple(sizes for sizes in others if sizes is not None))

    @property
    def any_varies(self) -> bool:
        return any(self.varying)


class HoldsForAll(TorchFunctionMode):
    """While it is entered, a trace raises OtherSize once it notes a condition that a call of the data does not meet."""

    def __init__(self, common: CommonSizes) -> None:
        super().__init__()
        self.common = common
        self._seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.look(found)
        return found

    def look(self, traced: Any) -> None:
        """Raises OtherSize for what has been noted until now, as a traced tensor knows."""
        size: Any = (
            next((x for x in traced.shape if isinstance(x, torch.SymInt)), None) if isinstance(traced, Tensor) else None
        )
        if size is not None:
            self._look(size.node.shape_env)

    def _look(self, environment: Any) -> None:
        count = len(environment.guards)
        if count == self._seen:
            return
        new = [guard.expr for guard in environment.guards[self._seen :]]
        self._seen, example = count, sizes_of(environment)
        for sizes in self.common.others:
            if not hold(new, {symbol: sizes.get(size, size) for symbol, size in example.items()}):
                raise OtherSize(", ".join(f"{size} in place of {old}" for old, size in sizes.items()))


def _shapes(leaves: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves)


def _differs(shape: tuple[int, ...], other: tuple[int, ...], axis: int) -> bool:
    return axis < len(other) and other[axis] != shape[axis]


def _sizes(
    example: Sequence[tuple[int, ...]], other: Sequence[tuple[int, ...]], varying: Sequence[frozenset[int]]
) -> dict[int, int] | None:
    """The example's size -> that of another call; None where that is no function, or a size is 1."""
    found: dict[int, int] = {}
    for mine, own, axes in zip(example, other, varying, strict=True):
        for axis in axes:
            if axis < len(own) and found.setdefault(mine[axis], own[axis]) != own[axis]:
                return None
    return None if 1 in found.values() else found
