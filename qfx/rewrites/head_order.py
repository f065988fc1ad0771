"""Which order of heads puts equal formats side by side. Query heads stay with the others of their KV head.

    q: [i8 i4 | i8 i4]    k, v: [i4 | i4]      KV heads 0 and 1 with two query heads each
    ->
    q: [i8 i4 | i4 i8]    k, v: [i4 | i4]      three runs where there were four

Heads are compared by keys: what they are in each role. Cost is the number of places where a role's key changes from one
head to the next. Equal groups stay together; the rest is searched: all orders where they are few, else from each group
on the nearest one.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from functools import cache

Key = tuple[Hashable, ...]

_ALL_GROUPS = 6  # kinds of groups whose orders are all tried
_ALL_HEADS = 3  # kinds of heads within a group whose orders are all tried


def order_heads(query: Sequence[Key], kv: Sequence[Key]) -> tuple[list[int], list[int]]:
    """(query heads, KV heads) in the order to put them: at place i comes head order[i].

    query: the keys of each query head, a multiple of the KV heads; head i belongs to KV head i * len(kv) // len(query).
    kv: the keys of each KV head. Equal heads keep their order, and all do where no order costs less.
    """
    assert kv and len(query) % len(kv) == 0, (len(query), len(kv))
    size = len(query) // len(kv)
    groups = [tuple(range(g * size, (g + 1) * size)) for g in range(len(kv))]
    kinds: dict[Key, list[int]] = {}
    for g, members in enumerate(groups):
        kinds.setdefault((kv[g], tuple(sorted(map(repr, (query[h] for h in members))))), []).append(g)
    best = (_cost(query) + _cost(kv), list(range(len(query))), list(range(len(kv))))
    for sequence in _sequences(list(kinds.values()), kv, query, groups):
        cost, heads = _arranged([groups[g] for g in sequence], query)
        cost += _cost([kv[g] for g in sequence])
        if cost < best[0]:
            best = (cost, heads, sequence)
    return best[1], best[2]


def _distance(a: Key, b: Key) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def _cost(keys: Sequence[Key]) -> int:
    return sum(_distance(a, b) for a, b in itertools.pairwise(keys))


def _sequences(
    kinds: list[list[int]], kv: Sequence[Key], query: Sequence[Key], groups: Sequence[Sequence[int]]
) -> Iterator[list[int]]:
    """Orders of the groups to look at, those of one kind side by side."""
    if len(kinds) <= _ALL_GROUPS:
        for order in itertools.permutations(kinds):
            yield [g for kind in order for g in kind]
        return

    @cache
    def apart(a: int, b: int) -> int:
        pair = [groups[kinds[a][0]], groups[kinds[b][0]]]
        return _distance(kv[kinds[a][0]], kv[kinds[b][0]]) + _arranged(pair, query)[0]

    for start in range(len(kinds)):
        near, left = [start], set(range(len(kinds))) - {start}
        while left:
            near.append(min(sorted(left), key=lambda kind: apart(near[-1], kind)))
            left.remove(near[-1])
        yield [g for kind in near for g in kinds[kind]]


def _arranged(groups: Sequence[Sequence[int]], query: Sequence[Key]) -> tuple[int, list[int]]:
    """(cost, heads) of the best order within each group, the groups standing as they do (Viterbi's algorithm)."""
    states: list[tuple[int, list[int]]] = [(0, [])]
    for members in groups:
        reached = []
        for inner in _inner(members, query):
            own = _cost([query[h] for h in inner])
            joined = [(c + (_distance(query[p[-1]], query[inner[0]]) if p else 0), p) for c, p in states]
            cost, path = min(joined, key=lambda state: state[0])
            reached.append((cost + own, [*path, *inner]))
        states = reached
    return min(states, key=lambda state: state[0])


def _inner(members: Sequence[int], query: Sequence[Key]) -> list[list[int]]:
    """Orders of the heads of a group, equal ones side by side."""
    kinds: dict[Key, list[int]] = {}
    for head in members:
        kinds.setdefault(query[head], []).append(head)
    if len(kinds) <= _ALL_HEADS:
        return [[h for kind in order for h in kind] for order in itertools.permutations(kinds.values())]
    up = [h for key in sorted(kinds, key=repr) for h in kinds[key]]
    down = [h for key in sorted(kinds, key=repr, reverse=True) for h in kinds[key]]
    return [up, down]
