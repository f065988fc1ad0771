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


def exchanged(held: list[Tensor]) -> None:
    held[0] = torch.ones(4)


def shortened(held: list[Tensor]) -> None:
    held.pop()


@pytest.mark.parametrize("change", [in_place, by_data, exchanged, shortened])
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


def test_inference_tensors_have_places_alone() -> None:
    with torch.inference_mode():
        held = [torch.zeros(4), torch.zeros(5)]
    state = State.of(held)
    assert state.versions == (0, 0) and state.holds(held)
    with torch.inference_mode():
        held[0].add_(1)  # leaves no trace
    assert state.holds(held)
    with torch.inference_mode():
        held[1] = torch.zeros(5)
    assert not state.holds(held)


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
