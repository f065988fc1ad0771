"""The times of calls that take turns."""

from __future__ import annotations

import pytest

from examples.benchmarks.peers.turns import in_turn


@pytest.mark.parametrize(("each", "order"), [(1, "ababab"), (2, "aabbaabbaabb")])
def test_all_calls_take_turns_and_the_first_round_does_not_count(each: int, order: str) -> None:
    said: list[str] = []
    calls = {name: (lambda name=name: said.append(name)) for name in "ab"}
    found = in_turn(calls, 2, each)
    assert said == list(order)
    assert set(found) == {"a", "b"} and all(seconds >= 0 for seconds in found.values())
