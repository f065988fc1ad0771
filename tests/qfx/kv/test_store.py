"""Store: what is kept in float, what is stored when, and that it is stored once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.kv.formats import cache_formats
from qfx.kv.store import Store

FORMATS: tuple[Any, ...] = (
    "i8", "i4", "i3", {"k": "u4/g8/f16", "v": "i8", "residual": 3, "sinks": 2},
    {"k": ["i8", "u2/g16/f16"], "v": ["u3/g8/f16", "f16"], "residual": 0, "sinks": 1},
)  # fmt: skip


def pair(tokens: int, *, batch: int = 2, heads: int = 2, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, heads, tokens, width, generator=g) for _ in range(2))
    return keys, values


def made(kv: Any, like: tuple[Tensor, Tensor], **how: Any) -> Store:
    return Store(cache_formats(kv, 1)[0], *like, where="layer 3", **how)


def filled(kv: Any, tokens: int, **how: Any) -> Store:
    new = pair(tokens, **how)
    store = made(kv, new)
    store.append(*new)
    return store


@settings(max_examples=40, deadline=None)
@given(kv=st.sampled_from(FORMATS), calls=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_it_does_not_matter_in_how_many_calls_tokens_come(kv: Any, calls: list[int]) -> None:
    keys, values = pair(sum(calls))
    store, at = made(kv, (keys, values)), 0
    for n in calls:
        seen = store.append(keys[:, :, at : at + n], values[:, :, at : at + n])
        at += n
        assert len(seen) == at == store.tokens
        assert torch.equal(seen.dense(0)[:, :, -n:], keys[:, :, at - n : at]), "new tokens are read as they came"
    whole = made(kv, (keys, values))
    whole.append(keys, values)
    for role in (0, 1):
        assert torch.equal(store.view().dense(role), whole.view().dense(role))
    assert store.stored == store.fmt.stored(at)


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_sinks_and_the_newest_stay_as_they_are(kv: Any) -> None:
    keys, values = pair(100)
    store = made(kv, (keys, values))
    store.append(keys, values)
    fmt, view = store.fmt, store.view()
    end = fmt.sinks + store.stored
    for role, x in enumerate((keys, values)):
        back = view.dense(role)
        assert torch.equal(back[:, :, : fmt.sinks], x[:, :, : fmt.sinks])
        assert torch.equal(back[:, :, end:], x[:, :, end:]) and x.shape[2] - end >= fmt.residual
        assert 0 < (back - x).abs().max() < 1.5


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_history_is_read_as_before_after_more_tokens(kv: Any) -> None:
    store = filled(kv, 90)
    kept, before = store.stored + store.fmt.sinks, store.view().dense(0)
    for n in range(20):
        store.append(*pair(7, seed=n))
    assert torch.equal(store.view().dense(0)[:, :, :kept], before[:, :, :kept])


@pytest.mark.parametrize("kv", FORMATS, ids=str)
def test_what_a_call_got_stays_as_it_was(kv: Any) -> None:
    store = filled(kv, 60)
    seen = store.append(*pair(3, seed=1))
    before = seen.dense(0), seen.dense(1)
    for n in range(3):
        store.append(*pair(200, seed=2 + n))
    store.each(lambda t: t.flip(0))
    assert torch.equal(seen.dense(0), before[0]) and torch.equal(seen.dense(1), before[1])


def test_memory_is_that_of_the_format_but_for_room_to_grow() -> None:
    for kv in FORMATS:
        store = filled(kv, 1500)
        exact = store.fmt.nbytes(2, 16, 1500, batch=2, dtype=torch.float32)
        room = store.fmt.nbytes(2, 16, 1500 + 256 + store.fmt.step, batch=2, dtype=torch.float32)
        assert exact <= store.nbytes <= room


@settings(max_examples=40, deadline=None)
@given(kv=st.sampled_from(FORMATS), tokens=st.integers(1, 90), data=st.data())
def test_the_newest_can_be_removed(kv: Any, tokens: int, data: st.DataObject) -> None:
    gone = data.draw(st.integers(0, tokens))
    store = filled(kv, tokens)
    before = store.view().dense(0), store.view().dense(1)
    store.remove(gone)
    assert store.tokens == tokens - gone
    for role in (0, 1):
        assert torch.equal(store.view().dense(role), before[role][:, :, : tokens - gone])
    store.append(*pair(50, seed=9))
    assert store.tokens == tokens - gone + 50
    assert store.stored % store.fmt.step == 0


def test_tokens_of_a_cut_group_stay_readable_and_are_stored_again() -> None:
    store = filled({"k": "u4/g32/f16", "v": "u4/g8/f16", "residual": 0, "sinks": 0}, 64)
    before = store.view().dense(0)
    store.remove(20)
    assert (store.stored, store.rest[0].shape[2]) == (32, 12)
    assert torch.equal(store.rest[0], before[:, :, 32:44])
    store.append(*pair(20, seed=1))
    assert store.stored == 64
    again = store.view().dense(0)
    assert torch.equal(again[:, :, :32], before[:, :, :32])
    assert (again[:, :, 32:44] - before[:, :, 32:44]).abs().max() < 0.5


def test_more_than_there_are_cannot_be_removed() -> None:
    with pytest.raises(ValueError, match=r"(?s)layer 3.*at most 9 tokens.*found: 10"):
        filled("i8", 9).remove(10)


def test_what_a_window_leaves_behind_is_dropped_in_steps() -> None:
    store, total = filled("i8", 300), 300
    held = []
    for n in range(40):
        store.append(*pair(25, seed=n))
        store.drop(keep=99)
        total += 25
        held.append(len(store.view()))
        assert store.tokens == total
    assert max(held) < 99 + 256 + 25 and min(held) >= 99
    assert store.nbytes <= store.fmt.nbytes(2, 16, 99 + 3 * 256, batch=2)


def test_dropped_tokens_are_the_oldest() -> None:
    keys, values = pair(700)
    for kv in ("i8", {"k": "i4", "v": "i4", "sinks": 0}):
        store = made(kv, (keys, values))
        store.append(keys, values)
        before = store.view().dense(1)
        store.drop(keep=100)
        left = len(store.view())
        assert 100 <= left < 100 + 256 + 32
        assert torch.equal(store.view().dense(1), before[:, :, -left:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, r"keys of another batch.*layer 3.*expected: 2.*found: 3"),
        ({"heads": 4}, r"keys of another number of heads.*expected: 2.*found: 4"),
        ({"width": 8}, r"keys of another size of a head.*expected: 16.*found: 8"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, int], message: str) -> None:
    store = filled("i8", 9)
    with pytest.raises(ValueError, match=f"(?s){message}.*start with a new cache"):
        store.append(*pair(1, **change))
    assert store.tokens == 9


def test_other_dtypes_and_lengths_are_refused() -> None:
    store, (keys, values) = filled("i8", 9), pair(2)
    with pytest.raises(ValueError, match=r"(?s)values of another dtype.*float32.*float16"):
        store.append(keys, values.half())
    with pytest.raises(ValueError, match=r"(?s)values of another number of tokens.*expected: 2.*found: 1"):
        store.append(keys, values[:, :, :1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kv", ["i8", "i4"])
def test_values_that_are_not_finite_are_refused_with_the_layer(kv: str, bad: float) -> None:
    store, (keys, values) = filled(kv, 40), pair(1)
    values[1, 0, 0, 3] = bad
    with pytest.raises(ValueError, match="layer 3, values.*not finite"):
        store.append(keys, values)
    keys[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="layer 3, keys.*not finite"):
        store.append(keys, values)
    assert store.tokens == 40


def test_large_values_that_sum_up_to_infinity_are_taken() -> None:
    keys, values = pair(1)
    store = made("f32", (keys, values))
    store.append(keys * 0 + 3e38, values)
    assert torch.equal(store.view().dense(0), keys * 0 + 3e38)


def test_heads_that_the_formats_do_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)layer 3 has formats for other heads.*2 heads.*found: 3"):
        made({"k": ["i8"] * 3, "v": "i8"}, pair(1))


def test_heads_of_the_same_formats_share_memory() -> None:
    keys, values = pair(40, heads=4)
    store = made({"k": ["i8", "fp8", "i8", "i8"], "v": ["i8", "fp8", "i8", "i8"]}, (keys, values))
    store.append(keys, values)
    assert [part.heads.tolist() for part in store.parts if part.heads is not None] == [[0, 2, 3], [1]]
    only = made("i8", (keys, values))
    only.append(keys, values)
    assert torch.equal(store.view().dense(0)[:, [0, 2, 3]], only.view().dense(0)[:, [0, 2, 3]])
    assert not torch.equal(store.view().dense(0)[:, 1], only.view().dense(0)[:, 1])


def test_memory_of_a_prompt_is_freed() -> None:
    keys, values = pair(2000)
    store = made("i4", (keys, values))
    store.append(keys, values)
    for kept in (*store.first, *store.rest):
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_new_tokens_keep_their_gradients_and_what_is_held_has_none() -> None:
    store, (keys, values) = filled("i8", 40), pair(2, seed=1)
    seen = store.append(keys.requires_grad_(), values)
    seen.dense(0)[:, :, -2:].sum().backward()
    assert keys.grad is not None and bool((keys.grad == 1).all())
    assert not any(t.requires_grad for t in store.rest)
    store.append(*pair(1, seed=2))
    assert torch.equal(store.view().dense(0)[:, :, -3:-1], keys)
