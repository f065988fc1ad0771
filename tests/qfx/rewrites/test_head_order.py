"""qfx.rewrites.head_order: equal heads side by side, groups kept whole, and never worse than before."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.rewrites.head_order import Key, order_heads


def runs(keys: Sequence[Key]) -> int:
    """Over all roles: how often the format changes from one head to the next."""
    return sum(a != b for one, two in itertools.pairwise(keys) for a, b in zip(one, two, strict=True))


def total(query: Sequence[Key], kv: Sequence[Key], heads: Sequence[int], groups: Sequence[int]) -> int:
    return runs([query[h] for h in heads]) + runs([kv[g] for g in groups])


def keys(*texts: str) -> list[Key]:
    return [tuple(text) for text in texts]


def allowed(query: int, kv: int) -> list[tuple[list[int], list[int]]]:
    """Every order that keeps groups whole."""
    size = query // kv
    members = [list(itertools.permutations(range(g * size, (g + 1) * size))) for g in range(kv)]
    return [
        ([h for group in choice for h in group], list(groups))
        for groups in itertools.permutations(range(kv))
        for choice in itertools.product(*(members[g] for g in groups))
    ]


def test_heads_with_their_own_kv_head() -> None:
    kinds = keys("88", "44", "88", "44")
    assert order_heads(kinds, kinds) == ([0, 2, 1, 3], [0, 2, 1, 3])


def test_groups_are_kept_whole_and_turned_so_that_runs_meet() -> None:
    query = keys("8", "4", "8", "4")
    heads, groups = order_heads(query, keys("4", "4"))
    assert (heads, groups) == ([1, 0, 2, 3], [0, 1])  # 4 8 | 8 4
    heads, groups = order_heads(keys("8", "4", "8", "4", "8", "8", "4", "4"), keys("4", "4", "4", "4"))
    assert total(keys("8", "4", "8", "4", "8", "8", "4", "4"), keys(*"4444"), heads, groups) == 3
    assert sorted(groups) == [0, 1, 2, 3]


def test_groups_of_equal_kv_formats_meet() -> None:
    heads, groups = order_heads(keys(*"44444444"), keys(*"8484"))
    assert groups == [0, 2, 1, 3] and heads == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("count", [1, 4])
def test_what_cannot_be_better_stays(count: int) -> None:
    same = keys(*("8" * count))
    assert order_heads(same, same) == (list(range(count)), list(range(count)))
    sorted_already = keys("8", "8", "4", "4")
    assert order_heads(sorted_already, sorted_already)[0] == [0, 1, 2, 3]


def test_one_kv_head_for_all() -> None:
    assert order_heads(keys(*"8484"), keys("4")) == ([0, 2, 1, 3], [0])


def test_many_kinds_of_groups() -> None:
    """More kinds than are all tried: each meets its nearest."""
    kinds = keys(*(f"{a}{b}" for a in "23456789" for b in "48"))
    mixed = [kinds[i * 7 % 16] for i in range(16)]
    heads, groups = order_heads(mixed, mixed)
    assert heads == groups and sorted(heads) == list(range(16))
    before = total(mixed, mixed, range(16), range(16))
    assert (before, total(mixed, mixed, heads, groups)) == (60, 32)  # 30 is the least: one role changes at each step


FORMATS = st.sampled_from("248")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_heads(data: st.DataObject) -> None:
    """The order is allowed, never worse than before, and the best of all where it is searched in full."""
    kv_heads, size = data.draw(st.sampled_from([(1, 3), (2, 2), (3, 1), (4, 1), (2, 3)]))
    query = [(data.draw(FORMATS), data.draw(FORMATS)) for _ in range(kv_heads * size)]
    kv = [(data.draw(FORMATS),) for _ in range(kv_heads)]
    heads, groups = order_heads(query, kv)
    choices = allowed(len(query), kv_heads)
    assert (heads, groups) in choices
    found = total(query, kv, heads, groups)
    assert found <= total(query, kv, range(len(query)), range(kv_heads))
    assert found == min(total(query, kv, *choice) for choice in choices)
