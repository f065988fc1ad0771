from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx import Format
from qfx.allocation.problem import Choice, Problem, Tile
from qfx.allocation.solve import solve

FORMATS = [Format.parse(f) for f in ("u2/g64", "u3/g32", "u4/g32", "u6/g64", "i8/ch")]


def problem(units: int, seed: int = 0, formats: int = 5, layers: int = 3, **constraints: object) -> Problem:
    """Units of several sizes whose loss falls with bits, by about 4 a bit."""
    rng = np.random.default_rng(seed)
    choices = {}
    for i in range(units):
        scale, size = 10 ** rng.normal(-3, 1), int(rng.integers(1, 9)) * 64
        choices[f"u{i}"] = [
            Choice(f"u{i}", f, size * f.bits + int(rng.integers(16)), scale * 4.0**-f.bits * rng.uniform(0.5, 2))
            for f in FORMATS[:formats]
        ]
    return Problem(choices, layers={f"u{i}": f"layers.{i % layers}" for i in range(units)}, **constraints)  # type: ignore[arg-type]


def best(found: Problem, budget: int) -> float | None:
    """By trying everything."""
    names = list(found.choices)
    scores = [
        found.value(assignment)[1]
        for picks in itertools.product(*([c.format for c in found.choices[n]] for n in names))
        for assignment in [dict(zip(names, picks, strict=True))]
        if found.value(assignment)[0] <= budget and not found.violations(assignment)
    ]
    return min(scores, default=None)


def between(found: Problem, share: float) -> int:
    sizes = [(min(c.bytes for c in each), max(c.bytes for c in each)) for each in found.choices.values()]
    low, high = (sum(side) for side in zip(*sizes, strict=True))
    return int(low + share * (high - low))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), ties=st.booleans())
def test_it_finds_the_optimum(seed: int, share: float, ties: bool) -> None:
    found = problem(4, seed, 4, ties=(("u0", "u2"),) if ties else ())
    budget = between(found, share)
    exact, fast = solve(found, budget, exact=True), solve(found, budget, exact=False)
    wanted = best(found, budget)
    assert wanted is not None
    assert exact.score == pytest.approx(wanted, rel=2e-5)
    for solution in (exact, fast):
        size, score = found.value(solution.assignment)
        assert size == solution.bytes
        assert score == pytest.approx(solution.score)
        assert size <= budget
        assert not found.violations(solution.assignment)
        assert solution.bound <= wanted * (1 + 1e-6) <= solution.score * (1 + 1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 1), classes=st.integers(1, 2))
def test_classes_of_a_layer_are_kept(seed: int, share: float, classes: int) -> None:
    found = problem(5, seed, 3, layers=2, classes=classes)
    budget = between(found, share)
    wanted = best(found, budget)
    assert wanted is not None
    for exact in (True, False):
        solution = solve(found, budget, exact=exact)
        assert not found.violations(solution.assignment)
        assert solution.bytes <= budget
        assert solution.bound <= wanted * (1 + 1e-6) <= solution.score * (1 + 1e-5)
        assert not exact or solution.score == pytest.approx(wanted, rel=2e-5)


def test_classes_cost_something() -> None:
    """A negative control: without the constraint layers have more numbers of bits, and a lower score."""
    found, free = problem(30, classes=1), problem(30)
    budget = between(free, 0.4)
    assert solve(free, budget).score < solve(found, budget).score
    assert len(Problem(free.choices, (), 1, free.layers).violations(solve(free, budget).assignment)) == 3


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_tiles_are_kept(share: float) -> None:
    found = problem(6, 1, 3, tiles=(Tile(tuple(f"u{i}" for i in range(6)), 2),))
    budget = between(found, share)
    solution = solve(found, budget)
    assert not found.violations(solution.assignment)
    assert solution.score == pytest.approx(best(found, budget), rel=2e-5)


def test_tiles_that_do_not_fit_are_refused() -> None:
    found = problem(5, tiles=(Tile(tuple(f"u{i}" for i in range(5)), 2),))
    with pytest.raises(ValueError, match=r"no assignment within [\d,]+ bytes keeps all constraints"):
        solve(found, between(found, 0.5))


def test_a_budget_below_the_minimum_names_it() -> None:
    found = problem(8)
    least = between(found, 0)
    assert solve(found, least).bytes == least
    with pytest.raises(
        ValueError, match=f"a budget of {least - 1:,} bytes is too small\n  expected: at least {least:,}"
    ):
        solve(found, least - 1)


def test_a_budget_for_everything_gives_the_best_of_each() -> None:
    found = problem(8)
    solution = solve(found, 10**9)
    assert solution.score == pytest.approx(sum(min(c.score for c in each) for each in found.choices.values()))
    assert solution.gap < 1e-12


def test_more_bytes_are_never_worse() -> None:
    found = problem(60)
    scores = [solve(found, between(found, share)).score for share in np.linspace(0, 1, 9)]
    assert all(more <= less * 1.002 for less, more in itertools.pairwise(scores))


def test_choices_that_others_beat_are_not_taken() -> None:
    """More bytes for more loss."""
    bad = [Choice("a", FORMATS[i], *pair) for i, pair in enumerate(((10, 4.0), (20, 5.0), (30, 1.0)))]
    assert solve(Problem({"a": bad}), 25).assignment == {"a": FORMATS[0]}
    assert solve(Problem({"a": bad}), 30).assignment == {"a": FORMATS[2]}


def test_layers_without_enough_bits_in_common_are_refused() -> None:
    choices = {n: [Choice(n, f, 10, 1.0)] for n, f in zip("ab", FORMATS, strict=False)}
    found = Problem(choices, classes=1, layers=dict.fromkeys("ab", "layers.7"))
    with pytest.raises(ValueError, match="the units of 'layers.7' have no 1 numbers of bits in common"):
        solve(found, 100)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [None, 2])
def test_ten_thousand_units_take_seconds(classes: int | None) -> None:
    found = problem(10_000, layers=500, classes=classes)
    started = time.process_time()
    solution = solve(found, between(found, 0.4))
    seconds = time.process_time() - started
    print(f"classes {classes}: {seconds:.1f} s, gap {solution.gap:.1e}")
    assert seconds < 5
    assert solution.gap < 1e-3
    assert not found.violations(solution.assignment)
