"""Which rewrites, rounding methods and formats go together: one table. What does not is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qfx.errors import explain
from qfx.format import Format

# The order of application, whatever order a recipe names them in: first what separates weights and norms, then factors
# that another weight takes up, then changes of basis, and last factors for which an input may have to be divided.
ORDER: tuple[str, ...] = (
    "untie", "norm-fold", "awq", "v-o", "up-down", "rotate", "rotate-down", "rotate-qk", "smooth",
)  # fmt: skip
ROTATIONS: tuple[str, ...] = ("rotate", "rotate-down", "rotate-qk")
# What a rewrite does by itself where a recipe does not name it.
IMPLIED: dict[str, tuple[str, ...]] = {"rotate": ("untie", "norm-fold")}

# Two rewrites that spoil each other: the reason.
APART: dict[frozenset[str], str] = {
    **{frozenset({"awq", own}): f"awq chooses the factors of {own} itself" for own in ("smooth", "v-o", "up-down")},
    frozenset({"awq", "rotate"}): "the rotation mixes the channels that awq scales one by one: "
    "what the scales gain is lost",
    frozenset({"awq", "rotate-down"}): "the rotation mixes the channels that awq scales one by one: "
    "what the scales gain is lost",
    frozenset({"rotate-down", "up-down"}): "the rotation mixes the channels that up-down scales one by one: "
    "what the scales gain is lost",
    frozenset({"rotate", "v-o"}): "the rotation of each value head mixes the channels that v-o scales one by one: "
    "what the scales gain is lost",
}


@dataclass(frozen=True)
class Need:
    """A rounding method serves a weight format where `test` holds; `reason` says why not elsewhere."""

    test: Callable[[Format], bool]
    reason: str


# What a rounding method asks of the formats of weights. Methods that are not named take every format.
NEEDS: dict[str, Need] = {}


def check(rewrites: Sequence[str], rounding: str, weights: Iterable[tuple[str, Format]]) -> None:
    """Raises ValueError for what cannot be combined, with the reason.

    rewrites, rounding: of a recipe. weights: (target, format of w) of its rules.
    """
    for pair, reason in APART.items():
        if pair <= set(rewrites):
            first, second = sorted(pair, key=ORDER.index)
            raise ValueError(
                explain(
                    f"the rewrites {first!r} and {second!r} cannot be combined: {reason}",
                    next_step=f"leave {first!r} or {second!r} out of the recipe",
                )
            )
    need = NEEDS.get(rounding)
    for target, fmt in weights if need is not None else ():
        if need is not None and not fmt.is_plain and not need.test(fmt):
            raise ValueError(
                explain(
                    f"rounding {rounding!r} cannot be combined with w='{fmt}' (rule for {target!r}): {need.reason}",
                    next_step="choose another format or rounding='mse'",
                )
            )


def in_order(rewrites: Iterable[str]) -> list[str]:
    """The rewrites of a recipe in the order of their application."""
    return sorted(rewrites, key=ORDER.index)
