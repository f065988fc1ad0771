"""qfx.passes.cleanup: what does nothing goes, one spelling for each call, outputs never share memory by it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx import run
from qfx.graph import get_tensor
from qfx.passes.cleanup import cleanup
from tests.graphs import Function, capture, counts, error, same, text

GOLDEN = """\
%inputs_0: f32[2,4] = input
%t: f32[4,2] = aten.t(%inputs_0)
%reshape: f32[8] = aten.reshape(%t, [8])
%layer_norm: f32[8] = aten.layer_norm(%reshape, [8], @w, @b)
%sin: f32[2,4] = aten.sin(%inputs_0)
%add: f32[2,4] = aten.add.Tensor(%sin, %sin)
return [%layer_norm, %add]
"""


def _wordy(own: Any, x: Tensor) -> Any:
    y = F.dropout(x, 0.1, training=False) + 0
    y = (y * 1.0).expand(2, 4)[:, 0:].contiguous().to(torch.float32).detach()
    y = torch.cat([torch.empty(0), y], 0)
    return F.layer_norm(y.t().contiguous().view(8), [8], own.w, own.b), x.sin() + x.sin()


def _cleaned(model: torch.nn.Module, *inputs: Any, dynamic: bool = False, **options: Any) -> torch.fx.GraphModule:
    gm = capture(model, *inputs, dynamic=dynamic)
    run.run(gm, [partial(cleanup, **options)])
    return gm


def test_golden_text() -> None:
    model = Function(_wordy, w=torch.randn(8), b=torch.randn(8))
    gm = _cleaned(model, torch.randn(2, 4))
    assert text(gm) == GOLDEN


def test_numbers_stay_the_same() -> None:
    assert same(cleanup, Function(_wordy, w=torch.randn(8), b=torch.randn(8)), torch.randn(2, 4), limit=0.0) > 5


def test_a_second_run_changes_nothing() -> None:
    gm = _cleaned(Function(_wordy, w=torch.randn(8), b=torch.randn(8)), torch.randn(2, 4))
    before = text(gm)
    assert cleanup(gm) is False
    assert text(gm) == before


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: F.dropout(x, 0.5, training=True),
        lambda own, x: x[:, 1:],
        lambda own, x: x[:, ::2],
        lambda own, x: x.expand(3, 2, 4),
        lambda own, x: x.to(torch.float64),
        lambda own, x: x + 1,
        lambda own, x: x * 1.0001,
        lambda own, x: torch.cat([x, x], 1),
        lambda own, x: torch.add(x, x, alpha=2),
    ],
)
def test_what_computes_something_stays(function: Any) -> None:
    gm = _cleaned(Function(lambda own, x: function(own, x).sin()), torch.randn(2, 4))
    assert len(counts(gm)) == 2


def test_adding_an_integer_zero_to_integers_goes_but_a_float_zero_casts() -> None:
    gm = _cleaned(Function(lambda own, x: ((x + 0).neg(), (x + 0.0).sin())), torch.arange(4))
    assert counts(gm) == {"neg": 1, "add": 1, "sin": 1}


def test_dropping_an_empty_part_keeps_the_others() -> None:
    x = torch.randn(2, 3)
    gm = _cleaned(Function(lambda own, x: torch.cat([x[:0], x, x.sin()], 0)), x)
    assert counts(gm) == {"sin": 1, "cat": 1}
    assert error(torch.cat([x, x.sin()]), gm(x)) == 0


def test_random_numbers_are_not_shared() -> None:
    gm = _cleaned(Function(lambda own, x: x + torch.rand(4) + torch.rand(4)), torch.randn(4))
    assert counts(gm)["rand"] == 2


def test_a_returned_copy_of_an_input_stays_a_copy() -> None:
    x = torch.randn(2, 4)
    gm = _cleaned(Function(lambda own, x: (x.clone().view(8), own.w.clone()), w=torch.randn(3)), x)
    flat, weight = gm(x)
    assert flat.data_ptr() != x.data_ptr()
    assert weight.data_ptr() != get_tensor(gm, "w").data_ptr()


def test_a_copy_of_what_is_also_returned_stays_a_copy() -> None:
    gm = _cleaned(Function(lambda own, x: (y := x.sin(), y.clone(), y.view(8).clone().cos())), torch.randn(2, 4))
    assert counts(gm) == {"sin": 1, "clone": 1, "reshape": 1, "cos": 1}


@pytest.mark.parametrize(
    "function",
    [lambda t: t * 1.0, lambda t: t + 0, lambda t: t - 0, lambda t: t / 1, lambda t: torch.cat([t[:0], t])],
)
def test_what_changes_nothing_has_memory_of_its_own_where_it_is_an_output(function: Any) -> None:
    model = Function(lambda own, x: (function(x), y := x.sin(), function(y).t(), function(own.w)), w=torch.randn(3))
    x = torch.randn(2, 4)
    gm = _cleaned(model, x)
    outputs = gm(x)
    places = {t.untyped_storage().data_ptr() for t in (x, get_tensor(gm, "w"), *outputs)}
    assert len(places) == 6
    assert all(torch.equal(a, b) for a, b in zip(outputs, model(x), strict=True))
    assert not cleanup(gm), "and a second run leaves it there"


def test_the_old_value_of_a_changed_input_is_kept() -> None:
    def old_and_new(own: Any, x: Tensor) -> Tensor:
        old = x.clone()
        x.add_(1.0)
        return old.view(8)

    gm = _cleaned(Function(old_and_new), torch.zeros(2, 4))
    assert gm.meta["qfx_mutations"] == {0: "inputs_0"}
    x = torch.zeros(2, 4)
    new, old = gm(x)
    x.copy_(new)
    assert old.eq(0).all()


def test_detach_stays_in_training() -> None:
    model = Function(lambda own, x: x.detach().sin())
    assert "detach" in counts(_cleaned(model, torch.randn(3), training=True))
    assert "detach" not in counts(_cleaned(model, torch.randn(3)))


def test_sizes_come_from_one_node_and_known_sizes_are_numbers() -> None:
    def sizes(own: Any, x: Tensor) -> Tensor:
        y = x.sin()
        assert x.shape[2] == 4  # specialises the symbol
        return y.reshape(y.shape[0] * y.shape[1], y.shape[2]).reshape(x.shape[0], x.shape[1], -1, 2)

    gm = _cleaned(Function(sizes), torch.randn(2, 3, 4), dynamic=True)
    assert counts(gm) == {"sym_size": 2, "sin": 1, "reshape": 1}
    x = torch.randn(5, 6, 4)
    assert error(x.sin().reshape(5, 6, 2, 2), gm(x)) == 0


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda own, x: x.squeeze(1).unsqueeze(1), 0),  # as Mamba hands the weight of its convolution on
        (lambda own, x: x.unsqueeze(0).squeeze(0), 0),
        (lambda own, x: x.unsqueeze(0).unsqueeze(-1).squeeze().unsqueeze(1), 0),
        (lambda own, x: x.squeeze(1).unsqueeze(0), 2),
        (lambda own, x: x.unsqueeze(0), 1),
        (lambda own, x: x.squeeze(1).t().unsqueeze(1), 3),
    ],
)
def test_axes_of_one_that_come_back_go(function: Any, left: int) -> None:
    x = torch.randn(3, 1, 3)
    gm = _cleaned(Function(lambda own, x: function(own, x).sin()), x)
    assert sum(counts(gm).values()) == left + 1
    assert error(function(None, x).sin(), gm(x)) == 0


def test_a_squeezed_weight_that_is_unsqueezed_is_a_parameter() -> None:
    def depthwise(own: Any, x: Tensor) -> Tensor:
        return F.conv1d(x, own.w.squeeze(1).unsqueeze(1), groups=4)

    gm = _cleaned(Function(depthwise, w=torch.randn(4, 1, 3)), torch.randn(2, 4, 9))
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    assert node.args[1].op == "get_attr" and node.args[1].target == "w"


def test_two_transposes_cancel_only_where_they_swap_the_same() -> None:
    x = torch.randn(2, 3, 4)
    assert counts(_cleaned(Function(lambda own, x: x.transpose(1, 2).transpose(-1, -2).sin()), x)) == {"sin": 1}
    assert counts(_cleaned(Function(lambda own, x: x.transpose(1, 2).transpose(0, 1).sin()), x)) == {
        "transpose": 2,
        "sin": 1,
    }
