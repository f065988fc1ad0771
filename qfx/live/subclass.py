"""A module's class changed by a subclass of itself: parameters, names, hooks and what isinstance says stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

MADE = "qfx_made"  # in the dictionary of a class that a maker made: (maker, base, the other arguments)
Maker = Callable[..., type[nn.Module]]


def subclass(base: type[nn.Module], fields: dict[str, Any], prefix: str = "") -> type[nn.Module]:
    """A subclass of `base` with these attributes that says it is of the same module; named `<prefix><base>`."""
    same = {"__module__": base.__module__, "__doc__": base.__doc__}
    if not prefix:
        same["__qualname__"] = base.__qualname__
    return type(f"{prefix}{base.__name__}", (base,), {**same, **fields})


def class_maker(make: Maker) -> Maker:
    """`make(base, ...)` gives a subclass of `base`: made once for the same arguments, and modules of it pickle.

    No module holds these classes under their names, so that pickle is told how to make them. A maker is a function of
    a module, and its other arguments pickle.
    """
    cached: Any = functools.cache(make)

    @functools.wraps(make)
    def maker(base: type[nn.Module], *args: Any) -> type[nn.Module]:
        kind: type[nn.Module] = cached(base, *args)
        if MADE not in kind.__dict__:
            setattr(kind, MADE, (maker, base, args))
            kind.__reduce_ex__ = _reduce  # type: ignore[method-assign, assignment]
        return kind

    return maker


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    kind: type[nn.Module] = type(self)
    steps = []
    while MADE in kind.__dict__:
        maker, base, args = kind.__dict__[MADE]
        steps.append((maker, args))
        kind = base
    return _empty, (kind, steps[::-1]), self.__getstate__()


def _empty(kind: type[nn.Module], steps: list[tuple[Maker, tuple[Any, ...]]]) -> nn.Module:
    """A module without content, of the class that the makers make of `kind`."""
    for maker, args in steps:
        kind = maker(kind, *args)
    return kind.__new__(kind)
