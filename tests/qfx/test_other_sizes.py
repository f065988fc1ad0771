"""qfx.other_sizes: a graph whose forward looks at sizes is tried where the example does not tell."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.capture import capture_export
from qfx.errors import QfxWarning
from qfx.other_sizes import _looked_at, _near, fixed_sizes, other_sizes

BLOCK = 4


class Looks(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.linear = function, nn.Linear(3, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.linear(self.function(x))
        return found if mask is None else found * mask[..., None]


def blocks(x: Tensor) -> Tensor:
    """As attention in blocks does it: what is missing is filled up where something is."""
    length = x.shape[1]
    if length % BLOCK:
        x = nn.functional.pad(x, (0, 0, 0, -length % BLOCK))
    found: Tensor = x.unflatten(1, (-1, BLOCK)).cumsum(2)
    return found.flatten(1, 2)[:, :length]


def long(x: Tensor) -> Tensor:
    return x * 2 if x.shape[1] > 9 else x


def endless(x: Tensor) -> Tensor:
    """With scores of what is masked: infinite, and NaN behind a linear layer."""
    found = blocks(x)
    return found.masked_fill(torch.arange(found.shape[1])[:, None] == 1, float("-inf"))


def short(x: Tensor) -> Tensor:
    """A model that takes no more."""
    if x.shape[1] > 20:
        raise ValueError("too long")
    return x


def notes_of(function: Callable[[Tensor], Tensor], length: int, **given: Any) -> list[str]:
    model, x = Looks(function).eval(), torch.randn(2, length, 3)
    named = {name: value(x) for name, value in given.items()}
    captured = capture_export(model, (x,), named)
    return [note.reason for note in other_sizes(captured, model, (x,), named, "Looks")]


@pytest.mark.parametrize(
    ("function", "length", "missed"),
    [
        (blocks, 7, ""),  # traced with its padding, which may be of nothing
        (blocks, 8, "not for 2, 19, 39"),
        (endless, 7, ""),
        (endless, 8, "not for 2, 19, 39"),
        (long, 7, "not for 10, 25, 40"),
        (long, 12, "not for 2, 5, 9"),
        (short, 7, ""),  # the model does not take them either
        (torch.tanh, 7, ""),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_sizes_for_which_a_graph_does_not_hold(
    function: Callable[[Tensor], Tensor], length: int, missed: str, masked: bool
) -> None:
    given = {"mask": lambda x: torch.ones(x.shape[:2])} if masked else {}
    notes = notes_of(function, length, **given)
    assert len(notes) == bool(missed)
    assert all(
        missed in note and f"the example's ({length})" in note and "dimension 1 of 'x'" in note for note in notes
    )


def test_infinite_results_are_near_their_like_alone() -> None:
    inf, nan = float("inf"), float("nan")
    b = torch.tensor([1.0, inf, -inf, nan])
    assert _near(b, b.clone()) and _near(b + torch.tensor([1e-4, 0, 0, 0]), b)
    for at, other in ((0, 1.1), (0, nan), (0, inf), (1, 5.0), (2, inf), (3, 0.0)):
        a = b.clone()
        a[at] = other
        assert not _near(a, b)


@pytest.mark.parametrize("example", [2, 7, 128])
def test_of_short_examples_all_sizes_are_looked_at(example: int) -> None:
    assert _looked_at(example) == list(range(2, max(40, 2 * example) + 1))


@pytest.mark.parametrize("example", [129, 3000, 16_000, 480_000])
def test_of_long_examples_some_sizes_are_looked_at(example: int) -> None:
    """Conditions of audio take a second for each thousand sizes: for half a minute a quarter of an hour."""
    found = _looked_at(example)
    assert len(found) <= 256 and found == sorted(set(found)) and found[0] == 2 and found[-1] == 2 * example
    for block in (2, 3, 60):  # sizes that fill blocks, and that do not, on both sides
        assert {size % block for size in found if size < example} == set(range(block))
        assert {size % block for size in found if size > example} == set(range(block))
    assert max(b - a for a, b in itertools.pairwise(found)) <= example // 30 + 1


def test_a_long_example_is_told_of_blocks_too() -> None:
    (note,) = notes_of(blocks, 400)
    assert "the example's (400)" in note and "not for 2, " in note


def test_without_varying_sizes_nothing_is_tried() -> None:
    model, x = Looks(blocks).eval(), torch.randn(2, 8, 3)
    captured = capture_export(model, (x,), {}, dynamic=False)
    assert other_sizes(captured, model, (x,), {}, "Looks") == []


def test_a_file_of_such_a_model_is_written_with_a_warning(tmp_path: Any) -> None:
    model, x = Looks(blocks).eval(), torch.randn(2, 8, 3)
    with pytest.warns(QfxWarning, match=r"Looks: its forward looks at the size of .* not for 2, 19, 39"):
        qfx.export_onnx(model, (x,), tmp_path / "m.onnx", strict=True)
    qfx.export_onnx(model, (x,), tmp_path / "fixed.onnx", dynamic=False)
    qfx.export_onnx(model, (x[:, :7],), tmp_path / "whole.onnx")
    whole: Any = qfx.onnx.load(tmp_path / "whole.onnx")
    for length in (4, 5, 8):
        y = torch.randn(2, length, 3)
        (found,) = whole(x=y).values()
        assert torch.allclose(found, model(y), atol=1e-5)


def in_a_loop(x: Tensor) -> Tensor:
    """Python counts the samples, so that torch.export fixes their number."""
    return torch.stack([sample * 2 for sample in x])


def test_a_batch_that_the_forward_counts_is_told(tmp_path: Any) -> None:
    model, x = Looks(in_a_loop).eval(), torch.randn(4, 5, 3)
    (note,) = fixed_sizes(capture_export(model, (x,)), "Looks")
    assert note.minor and note.node == "Looks"
    assert note.reason == "its forward computes with the size of dimension 0 of 'x' (4), which is fixed in the graph"
    with pytest.warns(QfxWarning, match=r"Looks: .* dimension 0 of 'x' \(4\), which is fixed"):
        qfx.export_onnx(model, (x,), tmp_path / "m.onnx", strict=True)
    qfx.export_onnx(model, (x,), tmp_path / "fixed.onnx", dynamic=False)  # asked for: nothing is said


def test_a_number_of_tokens_that_the_forward_counts_is_told() -> None:
    class Recurrent(nn.Module):
        """As a state space model that goes from token to token."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 3)

        def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
            states = [self.table(input_ids[:, 0])]
            for at in range(1, input_ids.shape[1]):
                states.append(states[-1] * 0.5 + self.table(input_ids[:, at]))
            found: Tensor = torch.stack(states, 1) + features[..., None]
            return found

    inputs = torch.zeros(4, 5, dtype=torch.int64), torch.randn(4, 5)
    (note,) = fixed_sizes(capture_export(Recurrent(), inputs), "Recurrent")
    assert "its forward computes with the size of dimension 1 of 'input_ids' (5), which is fixed" in note.reason


@pytest.mark.parametrize("shape", [(4, 5, 3), (1, 5, 3)])
def test_a_batch_that_varies_or_is_one_is_not_told(shape: tuple[int, ...]) -> None:
    model, x = Looks(blocks).eval(), torch.randn(shape)
    assert fixed_sizes(capture_export(model, (x,)), "Looks") == []


def test_features_are_no_batch() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return x.view(-1, 3) * by

    captured = capture_export(Scaled(), (torch.randn(4, 3), torch.randn(3)))
    assert fixed_sizes(captured, "Scaled") == []


def test_where_no_axis_varies_one_note_is_enough() -> None:
    model, x = Looks(in_a_loop).eval(), torch.randn(4, 5, 3)
    captured = dataclasses.replace(capture_export(model, (x,)), fixed="no axis of an input varies: why")
    assert fixed_sizes(captured, "Looks") == []
