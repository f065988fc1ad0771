"""From the budget that the user names to bytes for the units.

avg_bits   floor(bits x elements / 8)           of all weights that have formats, scales and zero points counted
ratio      floor(ratio x 2 x elements)          of the same weights
max_bytes  less what stays as it is             norms, biases, tables, weights without a format
max_memory less that, caches and activations    at a batch and a context, see `qfx.allocation.costs`
max_loss   the least bytes with a rise of perplexity of at most so many percent, by bisection on measured values
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qfx.errors import explain
from qfx.rounding.method_options import BUDGETS, AllocationOptions

_OF_BYTES = tuple(name for name in BUDGETS if name != "max_loss")
_STEPS = 12  # of a bisection: to a 4000th of the span


@dataclass(frozen=True)
class Stored:
    """What is stored. least: fewest bytes of the units. elements: of the units. fixed: FQN -> (elements, bytes) of
    weights whose format a rule for their name gives. rules: FQN -> that rule, in words. rest: bytes of all others.
    beside: bytes of caches and activations, which a device must have room for, too."""

    least: int
    elements: int
    rest: int = 0
    beside: int = 0
    fixed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)

    @property
    def held(self) -> int:
        """Bytes of the weights that rules fix."""
        return sum(size for _, size in self.fixed.values())

    @property
    def weights(self) -> int:
        """Elements of all weights that have formats."""
        return self.elements + sum(count for count, _ in self.fixed.values())

    def budget(self, options: AllocationOptions) -> int:
        """Bytes that the units may take by any budget but max_loss.

        Raises ValueError where there is no such budget, where even the smallest formats are above it (it names the
        fewest that would do, and the rules that hold formats), and where 16 bits for everything are below it.
        """
        if len(options.budgets) != 1 or options.max_loss is not None:
            raise ValueError(f"a budget of bytes is one of {', '.join(_OF_BYTES)}, found {options.budgets}")
        ((name, asked),) = options.budgets.items()
        room = math.floor(self._bytes(name, asked) + 1e-6)
        left, half = room - self.held - self._others(name), 2 * self.elements
        if left < self.least:
            need = self._amount(name, self.least)
            beside = f"\n    caches and activations take {self.beside:,} bytes" if name == "max_memory" else ""
            rules = "".join(f"\n    {rule} holds {self.fixed[fqn][1]:,} bytes" for fqn, rule in self.rules.items())
            raise ValueError(
                explain(
                    f"the budget {name}={_text(asked)} is too small",
                    expected=f"at least {name}={need}: the smallest candidate of every unit",
                    found=f"{left:,} bytes for units that take at least {self.least:,}{beside}{rules}",
                    next_step="raise the budget, allow smaller formats"
                    + (", or give up the rules that hold formats by name" if rules else ""),
                )
            )
        if left > half:
            most = self._amount(name, half, up=False)
            raise ValueError(
                explain(
                    f"the budget {name}={_text(asked)} is above what 16 bits for every weight take ({most})",
                    next_step="lower it, or leave the model in 16 bits",
                )
            )
        return left

    def _bytes(self, name: str, asked: float) -> float:
        return {"avg_bits": asked * self.weights / 8, "ratio": asked * 2 * self.weights}.get(name, asked)

    def _others(self, name: str) -> int:
        """Bytes that a budget of this name counts beside weights that have formats."""
        return {"max_bytes": self.rest, "max_memory": self.rest + self.beside}.get(name, 0)

    def _amount(self, name: str, units: int, *, up: bool = True) -> str:
        """The budget of this name with which the units have so many bytes, rounded up or down to a few digits."""
        size = units + self.held
        if name in ("max_bytes", "max_memory"):
            return str(size + self._others(name))
        value = 8 * size / self.weights if name == "avg_bits" else size / (2 * self.weights)
        return f"{(math.ceil if up else math.floor)(value * 1e4) / 1e4:g}"


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def least_bytes(low: int, high: int, loss: Callable[[int], float], most: float) -> int:
    """The fewest bytes from `low` to `high`, as far as bisection tells, at which loss(bytes) <= most.

    loss falls with bytes; it is measured. Raises ValueError where it is above `most` even at `high`.
    """
    if (found := loss(high)) > most:
        raise ValueError(
            explain(
                f"the largest candidate of every unit loses {found:.3g} %, more than max_loss={most:g}",
                next_step="allow larger formats ('f16' leaves a weight as it is), or a greater loss",
            )
        )
    if loss(low) <= most:
        return low
    for _ in range(_STEPS):
        middle = (low + high) // 2
        if loss(middle) <= most:
            high = middle
        else:
            low = middle
    return high
