"""The exact optimum near a good solution."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.allocation import knapsack
from qfx.allocation.knapsack import improved
from qfx.allocation.problem import Group
from qfx.allocation.solve import _exact, _hull, relaxed, solve
from tests.qfx.allocation.test_solve import between, problem


def groups(count: int, choices: int, seed: int) -> list[Group]:
    """Random bytes and scores, no order between them."""
    rng = np.random.default_rng(seed)
    return [Group((f"u{i}",), (), rng.integers(1, 60, choices), rng.lognormal(0, 1, choices)) for i in range(count)]


def budget_of(found: list[Group], share: float) -> int:
    low, high = (sum(int(pick(group.bytes)) for group in found) for pick in (np.min, np.max))
    return int(low + share * (high - low))


def run(found: list[Group], budget: int) -> tuple[float, float, bool]:
    """(score of the fast way, score of the optimum, whether that is proven)."""
    fast, _ = relaxed(found, budget)
    chosen, proven = improved(found, fast, budget, *_hull(found, budget)[1:])
    assert sum(int(g.bytes[at]) for g, at in zip(found, chosen, strict=True)) <= budget
    scores = [sum(float(g.score[at]) for g, at in zip(found, own, strict=True)) for own in (fast, chosen)]
    return scores[0], scores[1], proven


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), choices=st.integers(1, 5), share=st.floats(0, 1))
def test_it_is_the_optimum(seed: int, count: int, choices: int, share: float) -> None:
    found = groups(count, choices, seed)
    budget = budget_of(found, share)
    wanted = min(
        sum(float(g.score[at]) for g, at in zip(found, picks, strict=True))
        for picks in itertools.product(*(range(choices) for _ in found))
        if sum(int(g.bytes[at]) for g, at in zip(found, picks, strict=True)) <= budget
    )
    fast, best, proven = run(found, budget)
    assert proven
    assert best == pytest.approx(wanted) and best <= fast + 1e-12


def test_it_improves_on_the_fast_way() -> None:
    """A negative control: of many problems some are not solved by the fast way."""
    better = 0
    for seed in range(30):
        found = groups(12, 6, seed)
        fast, best, proven = run(found, budget_of(found, 0.4))
        assert proven
        better += best < fast * (1 - 1e-6)
    assert better > 5


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_it_agrees_with_scipy(share: float) -> None:
    found = problem(40, seed=3)
    budget = between(found, share)
    own = solve(found, budget, exact=True)
    other = _exact(found, found.groups, budget, 10.0, None)
    assert own.score <= other.score * (1 + 1e-9)
    assert own.score == pytest.approx(other.score, rel=2e-5)
    assert own.gap == 0


def test_with_few_states_nothing_is_proven_and_nothing_gets_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "_STATES", 3)
    outcomes = []
    for seed in range(30):
        found = groups(12, 6, seed)
        fast, best, proven = run(found, budget_of(found, 0.4))
        assert best <= fast
        outcomes.append(proven)
    assert not all(outcomes)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        found = problem(40, seed)
        solve(found, between(found, 0.3), exact=True)
    assert capfd.readouterr() == ("", "")
