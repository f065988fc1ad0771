"""Which rewrites go together, in which order: one table. What does not is refused with its reason.

Every rounding method takes every format that a weight can have, and the weights that any of the rewrites leaves: it
comes after them and sees weights and inputs as they are then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qfx.errors import explain

# The order of application, whatever order a recipe names them in: first what separates weights and norms, then changes
# of basis, which need norms whose weight is 1, then factors per channel of that basis, those last for which an input
# may have to be divided. Factors of key channels come before a rotation that mixes these behind RoPE; no other rewrite
# touches the rows that they scale. Heads change places at the end: what was done to each of them goes with it. No other
# rewrite mixes heads, so that their order commutes with all of them.
ORDER: tuple[str, ...] = (
    "untie", "norm-fold", "smooth-k", "rotate", "rotate-down", "rotate-qk", "awq", "v-o", "up-down", "smooth",
    "permute-heads",
)  # fmt: skip
ROTATIONS: tuple[str, ...] = ("rotate", "rotate-down", "rotate-qk")
# What a rewrite does by itself where a recipe does not name it, and only where it has to: 'rotate' leaves tied what can
# go on reading the rotated table.
IMPLIED: dict[str, tuple[str, ...]] = {"rotate": ("untie", "norm-fold")}

# Two rewrites that spoil each other: the reason.
APART: dict[frozenset[str], str] = {
    **{frozenset({"awq", own}): f"awq chooses the factors of {own} itself" for own in ("smooth", "v-o", "up-down")},
    frozenset({"rotate-down", "up-down"}): "the up projection cannot take up factors of channels that are rotated "
    "between it and the down projection",
}


def check(rewrites: Sequence[str]) -> None:
    """Raises ValueError for rewrites of a recipe that cannot be combined, with the reason."""
    for pair, reason in APART.items():
        if pair <= set(rewrites):
            first, second = sorted(pair, key=ORDER.index)
            raise ValueError(
                explain(
                    f"the rewrites {first!r} and {second!r} cannot be combined: {reason}",
                    next_step=f"leave {first!r} or {second!r} out of the recipe",
                )
            )


def in_order(rewrites: Iterable[str]) -> list[str]:
    """The rewrites of a recipe in the order of their application."""
    return sorted(rewrites, key=ORDER.index)
