"""Most bytes of activations that are alive at once, as an expression: the symbolic twin of `Costs.activations`."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from qfx.allocation.sizes import Expr

_Terms = dict[Expr, Expr]  # monomial -> coefficient


def peak(lives: Iterable[tuple[Expr, int, int]]) -> Expr:
    """The greatest sum over the calls of what is alive there. lives: (bytes, first call, last call), as `Costs.lives`.

    Sums that another one is never below are left out: sizes are not negative.
    """
    found = list(lives)
    change: list[_Terms] = [{} for _ in range(max((stop for _, _, stop in found), default=-1) + 2)]
    for size, start, stop in found:
        for monomial, coefficient in sympy.expand(size).as_coefficients_dict().items():
            for at, amount in ((start, coefficient), (stop + 1, -coefficient)):
                change[at][monomial] = change[at].get(monomial, 0) + amount
    most: list[_Terms] = []
    now: _Terms = {}
    for step in change:
        now = {key: total for key in now | step if (total := now.get(key, 0) + step.get(key, 0))}
        if not any(_below(now, one) for one in most):
            most = [one for one in most if not _below(one, now)] + [now]
    return sympy.Max(0, *(sympy.Add(*(c * key for key, c in one.items())) for one in most))


def _below(one: _Terms, other: _Terms) -> bool:
    """Is every coefficient at most that of the other?"""
    return all(one.get(key, 0) <= other.get(key, 0) for key in one | other)
