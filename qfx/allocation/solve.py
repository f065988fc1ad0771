"""The formats with the least sum of predicted loss whose bytes are within a budget: a multiple-choice knapsack.

    minimize sum_g sum_f score[g, f] x[g, f]    so that    sum_f x[g, f] = 1,  sum_g sum_f bytes[g, f] x[g, f] <= budget

The fast way goes down the lower convex hulls of the groups' choices, steepest step first (Sinha and Zoltners 1979: the
optimum of the linear relaxation, one group aside), then spends what is left on single changes. The bound of the
relaxation tells how far from the optimum that can be. Where it could be far, dynamic programming closes the rest (see
`qfx.allocation.knapsack`); where constraints bind several groups, or that does not, `scipy.optimize.milp` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from qfx.allocation.knapsack import improved
from qfx.allocation.problem import Assignment, Group, Problem
from qfx.errors import explain
from qfx.format import Format

_CLOSE = 1e-3  # a gap that is small enough to leave it at the fast solution: scores are not as exact
_EXACT = 1e-5  # a gap at which the exact solver stops
_BINARIES = 20_000  # above that many choices only what needs the exact solver is given to it
_UNIT = 1e4  # the scale in which the exact solver sees scores: its tolerances are absolute


@dataclass(frozen=True)
class Solution:
    """assignment: unit -> format. bytes, score: of it. bound: no assignment within the budget has a lower score."""

    assignment: Assignment
    bytes: int
    score: float
    bound: float

    @property
    def gap(self) -> float:
        """How far above the optimum the score can be, as a share of it; 0 where it is the optimum."""
        return max(0.0, (self.score - self.bound) / abs(self.score)) if self.score else 0.0


def solve(problem: Problem, budget: int, *, exact: bool | None = None, seconds: float = 10.0) -> Solution:
    """The assignment with the least sum of scores of at most `budget` bytes.

    exact: whether the optimum is looked for; None: where tiles need it, and where the fast solution may be more than
    0.1 % from it. seconds: after which scipy's solver stops at the best that it found.
    Raises ValueError for a budget below the fewest bytes, which are named, and where tiles leave no solution.
    """
    groups = problem.groups
    least = problem.least
    if budget < least:
        raise ValueError(
            explain(
                f"a budget of {budget:,} bytes is too small",
                expected=f"at least {least:,} bytes: the smallest format of every unit",
                next_step="raise the budget, or allow smaller formats",
            )
        )
    if problem.tiles:
        return _exact(problem, groups, budget, seconds, _tiled(problem, budget))
    kept, bound = groups, None
    if problem.classes is not None:
        kept, bound = _with_classes(groups, budget, problem.classes)
    chosen, lower = relaxed(kept, budget)
    found = _solution(kept, chosen, lower if bound is None else bound)
    if not (exact or (exact is None and found.gap > _CLOSE)):
        return found
    if problem.classes is None:
        chosen, proven = improved(kept, chosen, budget, *_hull(kept, budget)[1:])
        found = _solution(kept, chosen, np.inf if proven else found.bound)
        if proven:
            return found
    small = sum(len(group.formats) for group in groups) <= _BINARIES
    return _exact(problem, groups, budget, seconds, found) if exact or small else found


def price(problem: Problem, budget: int) -> float:
    """Predicted loss that a byte saves at this budget."""
    below = max(problem.least, round(0.99 * budget))
    if below >= budget:
        return 0.0
    low, high = (solve(problem, size, exact=False).score for size in (below, budget))
    return max(0.0, (low - high) / (budget - below))


def relaxed(groups: Sequence[Group], budget: int) -> tuple[list[int], float]:
    """(the choice of each group, by the fast way; a bound on the score). The smallest choices are within the budget."""
    chosen, bound, _ = _hull(groups, budget)
    _spend(groups, chosen, budget)
    return chosen, bound


def _solution(groups: Sequence[Group], chosen: Sequence[int], bound: float) -> Solution:
    assignment = {name: g.formats[at] for g, at in zip(groups, chosen, strict=True) for name in g.units}
    size = sum(int(g.bytes[at]) for g, at in zip(groups, chosen, strict=True))
    score = float(sum(g.score[at] for g, at in zip(groups, chosen, strict=True)))
    return Solution(assignment, size, score, min(bound, score))


def _steps(group: Group) -> tuple[int, list[tuple[float, int, int, float]]]:
    """The smallest choice, and the steps along the lower hull: (score gained per byte, choice, bytes, score gained)."""
    order = sorted(range(len(group.bytes)), key=lambda i: (group.bytes[i], group.score[i]))
    hull = [order[0]]

    def slope(a: int, b: int) -> float:
        return float((group.score[a] - group.score[b]) / (group.bytes[b] - group.bytes[a]))

    for i in order[1:]:
        if group.bytes[i] == group.bytes[hull[-1]] or group.score[i] >= group.score[hull[-1]]:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) <= slope(hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull[0], [
        (slope(a, b), b, int(group.bytes[b] - group.bytes[a]), float(group.score[a] - group.score[b]))
        for a, b in pairwise(hull)
    ]


def _hull(groups: Sequence[Group], budget: int) -> tuple[list[int], float, float]:
    """Choices along the hulls, steepest first, while they fit; the optimum of the relaxation; its price of a byte."""
    chosen, todo = [], []
    left, score = budget, 0.0
    for number, group in enumerate(groups):
        start, steps = _steps(group)
        chosen.append(start)
        left, score = left - int(group.bytes[start]), score + float(group.score[start])
        todo += [(-s[0], number, rank, *s[1:]) for rank, s in enumerate(steps)]
    todo.sort()
    bound, price, stopped = None, 0.0, set()
    for slope, number, _, choice, size, gain in todo:
        if size > left and bound is None:
            bound, price = score + slope * left, -slope  # part of this step: the optimum of the relaxation
        if size > left or number in stopped:
            stopped.add(number)
            continue
        chosen[number], left, score = choice, left - size, score - gain
    return chosen, score if bound is None else bound, price


def _spend(groups: Sequence[Group], chosen: list[int], budget: int) -> None:
    """Take single changes that lower the score and fit, the best score per byte first."""
    left = budget - sum(int(g.bytes[at]) for g, at in zip(groups, chosen, strict=True))
    todo: list[tuple[float, int, int]] = []

    def offer(number: int) -> None:
        group, at = groups[number], chosen[number]
        gain, size = group.score[at] - group.score, group.bytes - group.bytes[at]
        for i in np.flatnonzero((gain > 0) & (size <= left)):
            heapq.heappush(todo, (-float(gain[i]) / max(1e-9, float(size[i])), number, int(i)))

    for number in range(len(groups)):
        offer(number)
    while todo:
        _, number, choice = heapq.heappop(todo)
        group, at = groups[number], chosen[number]
        size = int(group.bytes[choice] - group.bytes[at])
        if size > left or group.score[choice] >= group.score[at]:
            continue
        chosen[number], left = choice, left - size
        offer(number)


def _with_classes(groups: Sequence[Group], budget: int, classes: int) -> tuple[list[Group], float]:
    """Each layer's groups with the formats of its best numbers of bits; and a bound on the score.

    At a price of a byte the layers are apart: each takes the bits for which score + price x bytes is least. The price
    is the least at which all fit, found by bisection.
    """
    layers = _Layers(groups, classes)
    low, high = 0.0, 1e-12
    found = layers.at(low)
    bound = found[1]
    while found[0] > budget and high < 1e12:
        low, high = high, high * 8
        found = layers.at(high)
    for _ in range(40 if low else 0):
        middle = (low * high) ** 0.5
        tried = layers.at(middle)
        bound = max(bound, tried[1] - middle * budget)
        if tried[0] > budget:
            low = middle
        else:
            high, found = middle, tried
    if found[0] > budget:
        raise ValueError(f"no formats of at most {classes} numbers of bits in a layer fit into {budget:,} bytes")
    return layers.only(found[2]), bound


class _Layers:
    """The choices of groups as arrays, and the sets of numbers of bits that a layer may have."""

    def __init__(self, groups: Sequence[Group], classes: int) -> None:
        self.groups = groups
        most = max(len(group.formats) for group in groups)
        self.score, self.bytes = np.full((len(groups), most), np.inf), np.zeros((len(groups), most))
        self.bits = np.zeros((len(groups), most), dtype=int)
        for row, group in enumerate(groups):
            n = len(group.formats)
            self.score[row, :n], self.bytes[row, :n] = group.score, group.bytes
            self.bits[row, :n] = [fmt.bits for fmt in group.formats]
        names: dict[str, int] = {}
        self.layer = np.array([names.setdefault(g.layer or f"\0{row}", len(names)) for row, g in enumerate(groups)])
        self.free = np.array([not group.layer for group in groups])
        known = sorted({fmt.bits for group in groups for fmt in group.formats})
        self.sets = [np.array(chosen) for chosen in combinations(known, min(classes, len(known)))]
        self.masks = [np.isin(self.bits, own) | self.free[:, None] for own in self.sets]
        fits = [np.bincount(self.layer, ~np.isfinite(np.where(m, self.score, np.inf)).any(1)) == 0 for m in self.masks]
        if not np.any(fits, axis=0).all():
            layer = list(names)[int(np.flatnonzero(~np.any(fits, axis=0))[0])]
            raise ValueError(f"the units of {layer!r} have no {classes} numbers of bits in common")

    def at(self, price: float) -> tuple[float, float, np.ndarray]:
        """(bytes, score + price x bytes, number of the set of each layer) of the best choices at a price of a byte."""
        cost = self.score + price * self.bytes
        totals, sizes = [], []
        for mask in self.masks:
            own = np.where(mask, cost, np.inf)
            best = own.argmin(1)[:, None]
            least = np.take_along_axis(own, best, 1)[:, 0]
            totals.append(np.bincount(self.layer, least))
            sizes.append(np.bincount(self.layer, np.take_along_axis(self.bytes, best, 1)[:, 0]))
        total, size = np.stack(totals), np.stack(sizes)
        chosen = total.argmin(0)
        each = np.arange(total.shape[1])
        return float(size[chosen, each].sum()), float(total[chosen, each].sum()), chosen

    def only(self, chosen: np.ndarray) -> list[Group]:
        """The groups with the formats that the chosen set of their layer allows."""
        return [
            group.only(self.masks[chosen[self.layer[row]]][row, : len(group.formats)])
            for row, group in enumerate(self.groups)
        ]


def _tiled(problem: Problem, budget: int) -> Solution | None:
    """A solution that keeps tiles by tying neighbours, None where there is none."""
    blocks = [t.units[at : at + t.multiple] for t in problem.tiles for at in range(0, len(t.units), t.multiple)]
    if any(len(tile.units) % tile.multiple for tile in problem.tiles):
        return None
    try:
        tied = Problem(problem.choices, (*problem.ties, *blocks), problem.classes, problem.layers)
        return solve(tied, budget, exact=False)
    except ValueError:
        return None


def _exact(problem: Problem, groups: Sequence[Group], budget: int, seconds: float, found: Solution | None) -> Solution:
    """What scipy's solver finds, or `found` where that is better."""
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    starts = np.cumsum([0, *(len(group.formats) for group in groups)])
    score = np.concatenate([group.score for group in groups])
    size = np.concatenate([group.bytes for group in groups]).astype(np.float64)
    scale = _UNIT / max(abs(found.score if found else score.mean()), 1e-300)
    rows = _Rows(int(starts[-1]))
    for start, stop in pairwise(starts):
        rows.add(dict.fromkeys(range(start, stop), 1.0), 1, 1)
    unit = float(size.max()) or 1.0  # no entry above 1: rows are kept to an absolute 1e-6
    rows.add(dict(enumerate(size / unit)), -np.inf, budget / unit)
    if problem.classes is not None:
        _class_rows(rows, groups, starts, problem.classes)
    _tile_rows(rows, problem, groups, starts)
    high = np.array([1.0] * int(starts[-1]) + rows.most)
    places = (np.array(rows.row, np.int32), np.array(rows.column, np.int32))  # scipy before 1.15 takes no wider ones
    result = milp(
        np.concatenate([score * scale, np.zeros(len(rows.most))]),
        integrality=np.ones(len(high)),
        bounds=Bounds(np.zeros(len(high)), high),
        constraints=LinearConstraint(
            sparse.csr_array((rows.values, places), shape=(len(rows.low), len(high))),
            rows.low,
            rows.up,
        ),
        options={"time_limit": seconds, "mip_rel_gap": _EXACT},
    )
    bound = result.mip_dual_bound / scale if result.mip_dual_bound is not None else -np.inf
    bound = max(bound, found.bound if found is not None else -np.inf)
    if result.x is not None:
        chosen = [int(result.x[a:b].argmax()) for a, b in pairwise(starts)]
        own = _solution(groups, chosen, bound)
        if own.bytes <= budget and (found is None or own.score <= found.score):
            return own
    if found is None:
        raise ValueError(
            explain(
                f"no assignment within {budget:,} bytes keeps all constraints: {result.message}",
                next_step="raise the budget, or take multiples of fewer rows",
            )
        )
    return Solution(found.assignment, found.bytes, found.score, min(bound, found.score))


class _Rows:
    """Rows of a sparse matrix of constraints low <= A x <= up, and columns beyond the first `columns`."""

    def __init__(self, columns: int) -> None:
        self.columns, self.most = columns, list[float]()
        self.row, self.column, self.values = list[int](), list[int](), list[float]()
        self.low, self.up = list[float](), list[float]()

    def add(self, entries: Mapping[int, float], low: float, up: float) -> None:
        self.row += [len(self.low)] * len(entries)
        self.column += [int(at) for at in entries]
        self.values += entries.values()
        self.low.append(low)
        self.up.append(up)

    def variable(self, most: float) -> int:
        """A new column: an integer from 0 to `most`."""
        self.most.append(most)
        return self.columns + len(self.most) - 1


def _class_rows(rows: _Rows, groups: Sequence[Group], starts: np.ndarray, classes: int) -> None:
    """One variable for each number of bits in a layer: whether any of its groups has it."""
    used: dict[str, dict[int, int]] = {}
    for group, start in zip(groups, starts, strict=False):
        own = used.setdefault(group.layer, {}) if group.layer else None
        for bits in dict.fromkeys(fmt.bits for fmt in group.formats) if own is not None else ():
            assert own is not None
            column = own[bits] if bits in own else own.setdefault(bits, rows.variable(1))
            picks = {int(start) + i: 1.0 for i, fmt in enumerate(group.formats) if fmt.bits == bits}
            rows.add({**picks, column: -1.0}, -np.inf, 0)
    for own in used.values():
        rows.add(dict.fromkeys(own.values(), 1.0), -np.inf, classes)


def _tile_rows(rows: _Rows, problem: Problem, groups: Sequence[Group], starts: np.ndarray) -> None:
    """For each format of the units of a tile: their number is `multiple` times an integer."""
    group_of = {name: number for number, group in enumerate(groups) for name in group.units}
    for tile in problem.tiles:
        counts: dict[Format, dict[int, float]] = {}
        for name in tile.units:
            group = groups[group_of[name]]
            for i, fmt in enumerate(group.formats):
                own, column = counts.setdefault(fmt, {}), int(starts[group_of[name]]) + i
                own[column] = own.get(column, 0.0) + 1
        for own in counts.values():
            own[rows.variable(len(tile.units) // tile.multiple)] = -float(tile.multiple)
            rows.add(own, 0, 0)
