"""qfx.passes._pairs: which channels share a factor, and as which runs they are written."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qfx.passes._pairs import Factors, Part, _runs, factors_of
from tests.passes.test_smooth_k import DIM, KV, attention, case


def of(rope: str) -> Factors:
    gm, _ = case(rope).copies()
    found = factors_of(attention(gm))
    assert isinstance(found, Factors)
    return found


def test_halves_are_pairs() -> None:
    found = of("halves")
    assert found.count == KV * DIM // 2
    assert found.of_keys.tolist() == [[*range(4), *range(4)], [*range(4, 8), *range(4, 8)]]
    (keys,), (queries,) = found.keys, found.queries
    assert keys == Part("k.weight", "k.bias", 0, ((0, 1, 4, 0), (4, 1, 8, 0), (12, 1, 4, 4)))
    assert queries.weight == "q.weight" and queries.runs[:2] == ((0, 1, 4, 0), (4, 1, 4, 0))
    assert torch.equal(queries.spread(torch.arange(8) + 1.0, 32)[:8], torch.tensor([1.0, 2, 3, 4] * 2).double())


def test_neighbours_are_pairs() -> None:
    found = of("neighbours")
    assert found.of_keys.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]]
    assert found.keys[0].runs == ((0, 2, 8, 0), (1, 2, 8, 0))


def test_channels_that_rope_leaves_are_free() -> None:
    assert of("part").of_keys.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5], [6, 7, 6, 7, 8, 9, 10, 11]]
    assert of("written").of_keys.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5], [6, 7, 8, 9, 10, 11, 10, 11]]
    assert of("none").of_keys.tolist() == [[*range(8)], [*range(8, 16)]]
    assert of("none").keys[0].runs == ((0, 1, 16, 0),)


def test_norms_take_one_factor_for_all_heads_or_one_for_each() -> None:
    shared, whole = of("norms"), of("wide norms")
    assert shared.of_keys.tolist() == [[0, 1, 2, 3] * 2] * 2 and shared.keys[0].weight == "k_norm.weight"
    assert whole.count == KV * DIM // 2 and [len(p.runs) for p in (*whole.keys, *whole.queries)] == [3, 7]


def test_records_are_read_back() -> None:
    part = of("neighbours").keys[0]
    record = {"weight": "k.weight", "bias": "k.bias", "axis": 0, "runs": [[0, 2, 8, 0], [1, 2, 8, 0]]}
    assert Part.of(record) == part


@given(st.dictionaries(st.integers(0, 40), st.integers(0, 20)))
def test_runs_say_every_channel_once(pairs: dict[int, int]) -> None:
    ordered = dict(sorted(pairs.items()))
    factor = torch.arange(21) + 2.0
    vector = Part("w", None, 0, _runs(ordered)).spread(factor, 41)
    assert sum(run[2] for run in _runs(ordered)) == len(pairs)
    assert vector.tolist() == [pairs[i] + 2.0 if i in pairs else 1.0 for i in range(41)]
