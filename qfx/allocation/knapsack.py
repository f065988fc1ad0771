"""The exact optimum of a multiple-choice knapsack, near a solution that is nearly optimal already.

At a price p of a byte a choice costs score + p bytes; r >= 0 is by how much more than the cheapest of its group. With
the price at which the relaxation is tight, every assignment x within the budget has

    score(x) = bound + sum of r(x) + p (budget - bytes(x))

so that one better than a known solution has a sum of r, and a rest of bytes, within its distance to the bound. That
leaves few choices and few partial sums: dynamic programming over them, group by group (Pisinger 1995), is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qfx.allocation.problem import Group

_STATES = 50_000  # partial sums that are held; beyond them the least of them are, and nothing is proven


def improved(
    groups: Sequence[Group], chosen: Sequence[int], budget: int, bound: float, price: float
) -> tuple[list[int], bool]:
    """(a solution at least as good as `chosen`, whether it is the optimum). bound, price: of the relaxation."""
    best = float(sum(g.score[at] for g, at in zip(groups, chosen, strict=True)))
    room = best - bound
    if room <= 0:
        return list(chosen), True
    kept = [_near(group, price, room) for group in groups]
    behind = [[int(pick(group.bytes[at])) for group, at in zip(groups, kept, strict=True)] for pick in (np.min, np.max)]
    least, most = (np.cumsum([0, *own[:0:-1]])[::-1] for own in behind)  # bytes of the groups behind each
    size, extra, score = np.zeros(1, dtype=np.int64), np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    proven = True
    for number, (group, at) in enumerate(zip(groups, kept, strict=True)):
        cost = group.score + price * group.bytes
        sizes = (size[:, None] + group.bytes[at]).ravel()
        extras = (extra[:, None] + (cost - cost.min())[at]).ravel()
        scores = (score[:, None] + group.score[at]).ravel()
        fits = (extras < room) & (sizes + least[number] <= budget)
        fits &= price * (budget - sizes - most[number]) < room - extras
        order = np.flatnonzero(fits)
        order = order[np.lexsort((scores[order], sizes[order]))]
        lowest = np.minimum.accumulate(scores[order])
        order = order[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if len(order) else order
        if len(order) > _STATES:
            order, proven = np.sort(order[np.argsort(extras[order], kind="stable")[:_STATES]]), False
        if not len(order):
            return list(chosen), proven
        steps.append((order // len(at), at[order % len(at)]))
        size, extra, score = sizes[order], extras[order], scores[order]
    state = int(score.argmin())
    if score[state] >= best:
        return list(chosen), proven
    found = []
    for parents, picks in reversed(steps):
        found.append(int(picks[state]))
        state = int(parents[state])
    return found[::-1], proven


def _near(group: Group, price: float, room: float) -> np.ndarray:
    """The choices of a group that a better solution may have."""
    cost = group.score + price * group.bytes
    return np.flatnonzero(cost - cost.min() < room)
