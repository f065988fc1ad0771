"""qfx.traced_call: what calls of a traced graph may give it, told by what it was traced with."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput

import qfx
from qfx import traced_call
from qfx.capture import capture_export
from qfx.traced_call import always_shared, apart, check_constants, constants, leaves
from tests.graphs import counts

X, Y = torch.randn(2, 4), torch.randn(2, 4)


class Options(nn.Module):
    """A forward whose graph depends on what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        times: int = 1,
        both: bool = False,
        mask: Tensor | None = None,
        word: str = "",
        share: float = 1.0,
    ) -> Tensor:
        y: Tensor = self.first(x * times * share)
        y = y if mask is None else y * mask
        second: Tensor = self.second(y)
        return second if both or word else y


def test_arguments_that_differ_are_given_as_they_are() -> None:
    args, kwargs = (X, 3), {"more": {"z": Y}}
    found = apart(Options(), args, kwargs)
    assert found[0] is args and found[1] is kwargs


def test_each_tensor_is_one_of_its_own() -> None:
    model = Options()
    (first, second), kwargs = apart(model, (X, X), {"more": [X, {"deep": Y}], "own": model.first.weight, "flag": True})
    tensors = [first, second, kwargs["more"][0], kwargs["more"][1]["deep"], kwargs["own"]]
    assert first is X and tensors[3] is Y
    assert len({id(t) for t in tensors}) == 5
    assert all(torch.equal(t, X) for t in tensors[:3])
    assert tensors[4] is not model.first.weight and not tensors[4].requires_grad
    assert kwargs["flag"] is True


def test_views_and_equal_tensors_are_left() -> None:
    args = (X, X[:], X.clone())
    assert apart(Options(), args, {})[0] is args


def test_whether_all_calls_share_the_same_arguments() -> None:
    x, y, z = torch.randn(2), torch.randn(2), torch.randn(2)
    assert always_shared([]) and always_shared([((x, y), {})])
    assert always_shared([((x, x), {"a": x, "b": y}), ((y, y), {"b": z, "a": y})])
    assert not always_shared([((x, x), {}), ((x, y), {})])
    assert not always_shared([((x, y), {}), ((x, x), {})])
    assert not always_shared([((x,), {"a": x, "b": y}), ((x,), {"a": y, "b": x})])


def test_self_attention_is_traced_as_one_where_it_always_is() -> None:
    """nn.MultiheadAttention then reads its packed weight whole, which can be quantized; a file's inputs are three."""
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    for shared, linears in ((True, 2), (False, 4)):
        captured = capture_export(model, (x, x, x), shared=shared)
        assert counts(captured.gm)["linear"] == linears
        assert torch.allclose(captured.gm(*captured.flatten((x, x, x), {}))[0], model(x, x, x)[0], atol=1e-6)


def spec_of(*args: Any, **kwargs: Any) -> pytree.TreeSpec:
    return pytree.tree_flatten((args, kwargs))[1]


def test_leaves_in_the_traced_order() -> None:
    spec = spec_of(1, {"a": 2, "b": [3, 4]}, c=5, d=6)
    assert leaves((1, {"b": [3, 4], "a": 2}), {"d": 6, "c": 5}, spec) == [1, 2, 3, 4, 5, 6]
    assert leaves((1, {"a": 2, "b": [3, 4]}), {"c": 5, "d": 6}, spec) == [1, 2, 3, 4, 5, 6]
    assert leaves((1,), {"c": 2}, None) == [1, 2]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (
            (1, 2),
            {"c": 3},
            r"expected a batch with 1 by position and the inputs \['c'\], found 2 by position and \['c'\]",
        ),
        ((), {"c": 3}, r"with 1 by position and the inputs \['c'\], found \['c'\]"),
        ((1,), {"q": 3}, r"found 1 by position and \['q'\]"),
        ((1,), {}, r"found 1 by position and \[\]"),
    ],
)
def test_other_arguments_are_refused(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaves(args, kwargs, spec_of(1, c=2))


@pytest.mark.parametrize("value", [{"a": 1}, {"a": 1, "q": 2}, [1, 2], {"a": 1, "b": 2, "c": 3}])
def test_other_structures_are_refused(value: Any) -> None:
    """Taken by their order alone, values would change places."""
    with pytest.raises(ValueError, match="built otherwise.*\n.*same structure"):
        leaves(({"b": 3},), {"more": value}, spec_of({"b": 1}, more={"a": 1, "b": 2}))


def test_a_transformers_output_is_looked_into() -> None:
    spec = spec_of(states=BaseModelOutput(last_hidden_state=X))
    assert leaves((), {"states": BaseModelOutput(last_hidden_state=Y)}, spec)[0] is Y
    with pytest.raises(ValueError, match="built otherwise"):
        leaves((), {"states": BaseModelOutput(last_hidden_state=Y, hidden_states=(X,))}, spec)


VALUES = [None, True, False, 0, 1, 1.0, -0.5, math.inf, "", "a", 2j, torch.float16, torch.device("cpu")]


@pytest.mark.parametrize("value", [*VALUES, math.nan], ids=repr)
def test_the_same_value_is_taken(value: Any) -> None:
    flat = leaves((X,), {"v": value}, None)
    check_constants(flat, constants((X,), {"v": value}), spec_of(X, v=value))


@pytest.mark.parametrize("found", VALUES, ids=repr)
def test_another_value_is_refused(found: Any) -> None:
    for want in VALUES:
        if want is not found:
            with pytest.raises(ValueError, match="'v' differs") as refused:
                check_constants([X, found], {1: want}, spec_of(X, v=want))
            assert f"expected: {want!r}" in str(refused.value) and f"found: {found!r}" in str(refused.value)


def test_names_of_arguments() -> None:
    spec = spec_of(X, [1, {"deep": 2}], name={"a": 3, "b": X})
    for index, name in ((1, "argument 2 by position"), (2, "argument 2 by position"), (3, "'name'")):
        with pytest.raises(ValueError, match=re.escape(f"{name} differs")):
            check_constants([X, *[None] * 3, X], {index: index}, spec)
    with pytest.raises(ValueError, match="flat argument 1 differs"):
        check_constants([X, 1], {1: 2}, None)


def test_of_other_objects_the_type_is_seen() -> None:
    check_constants([object()], {0: object()}, None)
    with pytest.raises(ValueError, match=r"expected: <object object.*\n.*found: a tensor of shape \[2, 4\]"):
        check_constants([X], {0: object()}, None)


def test_long_values_are_cut_in_errors() -> None:
    assert len(traced_call.said("a" * 500)) == 80


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [("times", 1, 50), ("share", 1.0, 50.0), ("both", False, True), ("word", "", "yes"), ("mask", None, Y)],
)
def test_data_whose_values_differ_are_refused(name: str, first: Any, second: Any) -> None:
    """Before, the first batch's value stood for those of all."""
    model = Options().eval()
    for one, other in ((first, second), (second, first)):
        with pytest.raises(ValueError, match=f"'?{name}'? differs from what the graph was traced with"):
            qfx.quantize(model, "w8a8-static", [{"x": X, name: one}, {"x": Y, name: other}])
    assert type(model.first) is nn.Linear, "nothing was changed"
    again = qfx.quantize(model, "w8a8-static", [{"x": X, name: second}, {"x": Y, name: second}])
    assert type(again.first) is not nn.Linear


def test_values_by_position() -> None:
    captured = capture_export(Options(), (X, 3))
    assert captured.flatten((Y, 3), {})[0] is Y
    with pytest.raises(ValueError, match="argument 2 by position differs"):
        captured.flatten((Y, 4), {})


def test_a_tensor_is_needed_where_one_was() -> None:
    captured = capture_export(Options(), (X,), {"mask": Y})
    with pytest.raises(ValueError, match=r"'mask' differs from what the graph was traced with\n.*a tensor\n.*None"):
        captured.flatten((X,), {"mask": None})
