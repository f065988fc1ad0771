"""What tells that weights changed: versions and places, asked in every call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfx.compiled.frame import Frame
from qfx.compiled.template import State


def tensors() -> list[Tensor]:
    return [torch.zeros(4), nn.Parameter(torch.zeros(2, 3)), torch.zeros(3, dtype=torch.int8)]


def in_place(held: list[Tensor]) -> None:
    held[2].add_(1)


def by_data(held: list[Tensor]) -> None:
    held[1].data = torch.zeros(2, 3)


def within_data(held: list[Tensor]) -> None:
    """Counts no version, and stays where it is: adapters are merged so, and moving averages put in place."""
    held[1].data += 1


def exchanged(held: list[Tensor]) -> None:
    held[0] = torch.ones(4)


def shortened(held: list[Tensor]) -> None:
    held.pop()


@pytest.mark.parametrize("change", [in_place, by_data, within_data, exchanged, shortened])
def test_a_change_is_seen(change: Callable[[list[Tensor]], None]) -> None:
    held = tensors()
    kept = list(held)  # alive, so that no place is used again
    state = State.of(held)
    assert state.holds(held)
    change(held)
    assert not state.holds(held) and state != State.of(held)
    assert kept


def test_reading_and_views_change_nothing() -> None:
    held = tensors()
    state = State.of(held)
    held[1].detach().sum()
    _ = held[0][1:] + 1
    assert state.holds(held)


def test_inference_tensors_have_places_and_words() -> None:
    with torch.inference_mode():
        held = [torch.zeros(4), torch.zeros(5)]
    state = State.of(held)
    assert state.versions == (0, 0) and state.holds(held)
    with torch.inference_mode():
        held[0].add_(1)  # counts no version
    assert not state.holds(held)
    state = State.of(held)
    with torch.inference_mode():
        held[1] = torch.zeros(5)
    assert not state.holds(held)


SHAPES = [(1,), (2,), (3,), (7,), (8,), (9,), (64,), (5, 3), (16, 16)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_ends_and_the_middle_are_looked_at(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    state = State.of([tensor])
    middle = max(0, tensor.numel() * tensor.element_size() - 8) // 2 // 8 * 8 // tensor.element_size()
    for at in (0, middle, tensor.numel() - 1):
        flat = tensor.data.view(-1)
        flat[at] = 1
        assert tensor._version == 0 and not state.holds([tensor]), at
        flat[at] = 0
        assert state.holds([tensor]), at


def test_a_value_elsewhere_goes_unseen() -> None:
    """Each call looks at a few words: what changes a whole tensor is seen, what changes one value may not be."""
    tensor = torch.zeros(1000)
    state = State.of([tensor])
    tensor.data[10] = 1
    assert state.holds([tensor])


def test_of_what_is_not_in_one_piece_the_first_element_is_looked_at() -> None:
    whole = torch.zeros(8, 8)
    column = whole[:, 1]
    state = State.of([column])
    whole.data[0, 2] = 1  # another column's
    assert state.holds([column])
    column.data[0] = 1
    assert not state.holds([column])


def test_tensors_without_words() -> None:
    held = [torch.zeros(0), torch.zeros(3, device="meta"), torch.eye(2).to_sparse().values()[:0]]
    state = State.of(held)
    assert state.words == () and state.holds(held) and len(state.each()) == 3
    mixed = State.of([*held, torch.ones(4)])
    assert len(mixed.words) == 12 and mixed.each()[0][2] == (0, 0, 0) != mixed.each()[3][2]


def test_the_state_of_each_tensor_alone() -> None:
    held = tensors()
    before = State.of(held).each()
    held[1].data += 1
    changed = [old != new for old, new in zip(before, State.of(held).each(), strict=True)]
    assert changed == [False, True, False]


def test_nothing_to_watch() -> None:
    assert State.of([]).holds([]) and not State.of([]).holds(tensors())


def test_training_of_the_frame_or_of_what_was_compiled() -> None:
    outer, inner = nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval()
    frame = Frame(lambda: None, (lambda: None, lambda: inner), lambda: outer)
    assert not frame.training
    for module in (outer, inner):
        module.train()
        assert frame.training
        module.eval()
    assert not frame.training
    assert not Frame(lambda: None, (lambda: None,), lambda: len).training, "a function is in no mode"
