"""qfx.common_sizes: one trace for all calls of some data, of which the sizes that differ vary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.capture import capture_export
from qfx.common_sizes import CommonSizes, OtherSize
from qfx.conditions import is_number
from qfx.graph import val


def call(*shape: int, **named: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(shape),), {name: torch.randn(own) for name, own in named.items()}


def of(*calls: tuple[tuple[Any, ...], dict[str, Any]]) -> CommonSizes:
    return CommonSizes.of(*calls[0], calls)


def test_axes_that_differ_vary() -> None:
    found = of(call(2, 8, y=(8, 3)), call(2, 5, y=(5, 3)), call(2, 8, y=(8, 3)))
    assert found.varying == (frozenset({1}), frozenset({0})) and found.any_varies
    assert found.others == ({8: 5},), "each kind of call once, the example's left out"
    same = of(call(2, 8), call(2, 8))
    assert same.varying == (frozenset(),) and same.others == () and not same.any_varies


def test_what_is_no_tensor_has_no_sizes() -> None:
    kinds = [((torch.randn(2, n), 0.5, None), {"flag": True}) for n in (4, 6)]
    assert CommonSizes.of(*kinds[0], kinds).varying == (frozenset({1}), frozenset(), frozenset(), frozenset())


def test_sizes_that_say_nothing_are_left_out() -> None:
    assert of(call(4, 4), call(2, 3)).others == (), "the example's 4 stands for 2 and for 3"
    assert of(call(4, 4), call(3, 3)).others == ({4: 3},)
    found = of(call(4, 8), call(1, 8), call(4, 6))
    assert found.others == ({4: 4, 8: 6},), "torch fixes sizes of 1"
    assert found.varying == (frozenset({0, 1}),)


def test_other_arguments_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected a batch with"):
        of(call(2, 8), call(2, 8, y=(2, 2)))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(3, 3), function

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, 3] -> [B, T, 3]"""
        return self.function(torch.as_tensor(self.fc(x)))


def running(x: Tensor) -> Tensor:
    """A sum over tokens, one after the other."""
    found, state = [], torch.zeros_like(x[:, 0])
    for i in range(x.shape[1]):
        state = state + x[:, i]
        found.append(state)
    return torch.stack(found, dim=1)


def chunks(x: Tensor) -> Tensor:
    """The same by chunks of 4, with the rest filled up."""
    padded = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
    found, state = [], torch.zeros_like(x[:, :1])
    for i in range(padded.shape[1]):
        found.append(padded[:, i].cumsum(1) + state)
        state = found[-1][:, -1:]
    return torch.cat(found, dim=1)[:, : x.shape[1]]


def whole(x: Tensor) -> Tensor:
    return x.cumsum(1)


def calls_of(*lengths: int, batch: int = 2) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [call(batch, length, 3) for length in lengths]


@pytest.mark.parametrize("function", [running, chunks])
def test_a_loop_over_tokens_does_not_hold_for_other_lengths(function: Callable[[Tensor], Tensor]) -> None:
    model = Function(function).eval()
    for calls in (calls_of(30, 10), calls_of(10, 30), calls_of(30, 30, 29, 9)):
        with pytest.raises(OtherSize):
            capture_export(model, *calls[0], calls=calls)


def test_a_loop_holds_for_lengths_of_as_many_steps() -> None:
    model, calls = Function(chunks).eval(), calls_of(7, 5, 6)
    captured = capture_export(model, *calls[0], calls=calls)
    for (x,), _ in calls:
        torch.testing.assert_close(captured.gm(x)[0], model(x))


@pytest.mark.parametrize("function", [running, chunks, whole])
def test_of_one_length_the_batch_alone_varies(function: Callable[[Tensor], Tensor]) -> None:
    model, calls = Function(function).eval(), [*calls_of(9, 9, batch=4), *calls_of(9, batch=3), *calls_of(9, batch=1)]
    captured = capture_export(model, *calls[0], calls=calls)
    (node,) = captured.gm.graph.find_nodes(op="placeholder")
    assert [is_number(size) for size in val(node).shape] == [False, True, True]
    for (x,), _ in calls:
        torch.testing.assert_close(captured.gm(*captured.flatten((x,), {}))[0], model(x))
    with pytest.raises(ValueError, match=r"does not fit the traced graph[\s\S]*9[\s\S]*8"):
        captured.flatten((torch.randn(4, 8, 3),), {})


def test_without_a_loop_lengths_vary() -> None:
    model, calls = Function(whole).eval(), calls_of(30, 10, 7)
    captured = capture_export(model, *calls[0], calls=calls)
    (node,) = captured.gm.graph.find_nodes(op="placeholder")
    assert [is_number(size) for size in val(node).shape] == [True, False, True]
    for (x,), _ in calls:
        torch.testing.assert_close(captured.gm(x)[0], model(x))


def test_what_torch_does_not_trace_is_an_other_size_where_sizes_vary() -> None:
    def number(x: Tensor) -> Tensor:
        if isinstance(x.shape[1], torch.SymInt):
            raise TypeError("no number")
        return x

    model = Function(number).eval()
    with pytest.raises(OtherSize, match="no number"):
        capture_export(model, *call(2, 8, 3), calls=calls_of(8, 6))
    assert capture_export(model, *call(2, 8, 3), calls=calls_of(8, 8)).fixed == ""


def test_a_length_that_a_later_layer_fixes_is_seen_at_the_end() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            y = x.exp()
            return [y] * len(range(y.shape[1]))

    calls = calls_of(6, 5)
    with pytest.raises(OtherSize):
        capture_export(Last(), *calls[0], calls=calls)
