"""Names of one graph's weights in another module: a graph made of a sub-module's forward says `fc.weight`, the model
that was compiled says `layers.3.fc.weight`. Tensors are matched by identity, so one graph serves many modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


def index(model: nn.Module) -> dict[int, list[str]]:
    """id -> every fully qualified name of each parameter and buffer."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return found


@dataclass(frozen=True)
class Translation:
    """Heads of names and what stands in their place: ("", "layers.3") puts a prefix before every name."""

    heads: tuple[tuple[str, str], ...] = ()

    @classmethod
    def between(cls, weights: Iterable[tuple[str, Tensor | None]], names: Mapping[int, list[str]]) -> Translation:
        """From a graph's names of its weights to the names in an `index`. Weights that it lacks are left out."""
        found: dict[str, str] = {}
        for name, tensor in weights:
            known = names.get(id(tensor)) if tensor is not None else None
            if known:
                head, prefix = min((_heads(name, other) for other in known), key=lambda pair: len(pair[0]))
                found.setdefault(head, prefix)
        return cls(tuple(sorted(found.items(), key=lambda pair: -len(pair[0]))))

    def __call__(self, name: str) -> str:
        """The name with its longest known head replaced; a name without one stays as it is."""
        for head, prefix in self.heads:
            if is_within(name, head):
                return _join(prefix, name[len(head) :].lstrip("."))
        return name

    def knows(self, name: str) -> bool:
        """Whether a head of the name is known."""
        return any(is_within(name, head) for head, _ in self.heads)


def is_within(name: str, head: str) -> bool:
    """Whether a fully qualified name is that of `head`, or of something in it; everything is in ""."""
    return not head or name == head or name.startswith(f"{head}.")


def _heads(name: str, other: str) -> tuple[str, str]:
    """What is left of two names when their longest common end is taken off."""
    a, b = name.split("."), other.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop()
        b.pop()
    return ".".join(a), ".".join(b)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name
