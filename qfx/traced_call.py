"""The arguments of calls of a traced graph: torch.export takes those of one call, and others have to be like them.

What is no tensor is part of the graph, which another value would not reach; one tensor given twice is one value of the
graph, which reads it from one place whatever the two get later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qfx.errors import explain, first_line

_PLAIN = bool | int | float | complex | str | torch.dtype | torch.device | None


def apart(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, each tensor one of its own: copies of those that are given twice or are the model's."""
    given = [id(value) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    if len(seen.union(given)) == len(seen) + len(given):
        return args, kwargs

    def own(value: Tensor) -> Tensor:
        if id(value) in seen:
            return value.detach().clone()
        seen.add(id(value))
        return value

    found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(Tensor, own, (args, kwargs))
    return found


def always_shared(calls: Sequence[tuple[Sequence[Any], Mapping[str, Any]]]) -> bool:
    """Whether all calls give one tensor for the same arguments (x, x, x of self-attention): it is one of the graph."""

    def shared(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
        first: dict[int, int] = {}
        flat = pytree.tree_leaves((tuple(args), dict(sorted(kwargs.items()))))
        return [first.setdefault(id(value), at) for at, value in enumerate(flat) if isinstance(value, Tensor)]

    patterns = [shared(args, kwargs) for args, kwargs in calls]
    return all(pattern == patterns[0] for pattern in patterns)


def constants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Any]:
    """Flat index -> the argument there, of those that are no tensors."""
    return {i: v for i, v in enumerate(pytree.tree_leaves((args, kwargs))) if not isinstance(v, Tensor)}


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any], spec: pytree.TreeSpec | None) -> list[Any]:
    """The flat arguments of a call in the order of the traced one, `spec`; dictionaries may have another order of keys.

    Raises ValueError where the call has other arguments.
    """
    flat, own = pytree.tree_flatten((tuple(args), dict(kwargs)))
    if spec is None or own == spec:
        return flat
    first, rest = _children(spec)
    if set(rest.context) != set(kwargs) or first.num_children != len(args):
        before, found = (f"{count} by position and " if count else "" for count in (first.num_children, len(args)))
        raise ValueError(
            f"expected a batch with {before}the inputs {sorted(rest.context)}, found {found}{sorted(kwargs)}; "
            "next step: give every batch the same inputs as the first one"
        )
    try:
        return spec.flatten_up_to((tuple(args), dict(kwargs)))
    except ValueError as error:
        what = f"an argument is built otherwise than the one that the graph was traced with: {first_line(error)}"
        raise ValueError(explain(what, next_step="give every batch arguments of the same structure")) from error


def check_constants(flat: Sequence[Any], traced: Mapping[int, Any], spec: pytree.TreeSpec | None) -> None:
    """Raises ValueError where an argument that is part of the traced graph has another value now."""
    for i, want in traced.items():
        if not _same(want, flat[i]):
            raise differs(_name(spec, i), said(want), flat[i])


def differs(name: str, expected: str, found: Any) -> ValueError:
    """The error of an argument that is not what the graph was traced with."""
    return ValueError(
        explain(
            f"{name} differs from what the graph was traced with",
            expected=expected,
            found=said(found),
            next_step="give every batch the same, or leave it out of all",
        )
    )


def said(value: Any) -> str:
    """An argument in an error."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]


def _same(want: Any, found: Any) -> bool:
    """Whether an argument stands for the traced one. Of objects that are more than a value only the type is seen."""
    if type(found) is not type(want):
        return False
    return not isinstance(want, _PLAIN) or found == want or repr(found) == repr(want)  # NaN


def _name(spec: pytree.TreeSpec | None, index: int) -> str:
    """How the caller calls a flat argument, or that of which it is a part."""
    if spec is not None:
        args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        named = {
            **{f"argument {at} by position": v for at, v in enumerate(args, 1)},
            **{repr(k): v for k, v in kwargs.items()},
        }
        for name, value in named.items():
            if index in pytree.tree_leaves(value):
                return name
    return f"flat argument {index}"


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return list(spec.children() if hasattr(spec, "children") else spec.children_specs)
