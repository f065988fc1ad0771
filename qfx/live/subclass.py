"""A module's class changed by a subclass of itself: parameters, names, hooks and what isinstance says stay."""

from __future__ import annotations

from typing import Any

from torch import nn


def subclass(base: type[nn.Module], fields: dict[str, Any], prefix: str = "") -> type[nn.Module]:
    """A subclass of `base` with these attributes that says it is of the same module; named `<prefix><base>`."""
    same = {"__module__": base.__module__, "__doc__": base.__doc__}
    if not prefix:
        same["__qualname__"] = base.__qualname__
    return type(f"{prefix}{base.__name__}", (base,), {**same, **fields})
