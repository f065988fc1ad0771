"""Inputs that share memory with one that the graph changes in place: views of one tensor, of which a graph knows
nothing. It takes each input as a tensor of its own, so that what it writes into one is not seen in the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import compute_overlapping_tensors

from qfx.errors import UnsupportedError, explain


def overlapping(args: Sequence[Any], inputs: Collection[int], changed: Collection[int]) -> tuple[int, int] | None:
    """Indices of an input that is changed and of another that has an element in common with it; None where none has.

    args: what a graph is called with. inputs, changed: indices of the tensors that it reads, and of those that it
    changes. Views of one tensor that lie beside each other (the layers of a cache) have nothing in common.
    """
    places: dict[int, list[int]] = defaultdict(list)
    for i in {*inputs, *changed}:
        value = args[i]
        if isinstance(value, Tensor) and value.numel():
            places[value.untyped_storage().data_ptr()].append(i)
    for group in places.values():
        if len(group) > 1 and not set(group).isdisjoint(changed):
            found = _pair(args, group, changed)
            if found is not None:
                return found
    return None


def _pair(args: Sequence[Any], group: Sequence[int], changed: Collection[int]) -> tuple[int, int] | None:
    hit = [group[at] for at in sorted(compute_overlapping_tensors([args[i] for i in group], symbolic=False))]
    pairs = [(i, j) for i in hit if i in changed for j in hit if i != j]
    return next((p for p in pairs if compute_overlapping_tensors([args[i] for i in p], symbolic=False)), None)


def refused(changed: str, other: str) -> UnsupportedError:
    """The error that says so; both by their names."""
    return UnsupportedError(
        explain(
            f"the input {changed!r} is changed in place and shares memory with the input {other!r}",
            expected="memory of its own for what a graph changes",
            found="views of one tensor with elements in common",
            next_step=f"give the model a copy: {other}.clone()",
        )
    )
