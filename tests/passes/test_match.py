"""qfx.passes._match: the questions that passes ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfx.passes import _match as m
from tests.graphs import Function, capture

aten = torch.ops.aten


def last(function: Any, *inputs: torch.Tensor, dynamic: bool = False) -> torch.fx.Node:
    gm = capture(Function(lambda own, *x: function(*x)), *(inputs or (torch.randn(2, 4),)), dynamic=dynamic)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    node = output.args[0][0]
    assert isinstance(node, torch.fx.Node)
    return node


@pytest.mark.parametrize(
    ("function", "factor"),
    [
        (lambda x: x * 3, 3.0),
        (lambda x: 3.0 * x, 3.0),
        (lambda x: x / 4, 0.25),
        (lambda x: torch.full((), 2.0) * x, 2.0),
        (lambda x: 3.0 / x, 3.0),  # captured as 3 times the reciprocal
        (lambda x: x * x, None),
        (lambda x: x / 0.0, None),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), None),
        (lambda x: x + 1, None),
    ],
)
def test_scaled(function: Any, factor: float | None) -> None:
    found = m.scaled(last(function))
    assert (None if found is None else found[1]) == factor


def test_additions_with_alpha_are_not_plain() -> None:
    assert m.plain_binary(last(lambda x: x + x), *m.ADD)
    assert not m.plain_binary(last(lambda x: torch.add(x, x, alpha=2)), *m.ADD)


def test_upcasts_are_looked_through_and_downcasts_are_not() -> None:
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert m.skip_upcasts(last(lambda x: x.float().double(), x)).op == "placeholder"
    assert m.skip_upcasts(last(lambda x: x.float().bfloat16(), x)).op == "call_function"
    assert m.skip_casts(last(lambda x: x.float().bfloat16(), x)).op == "placeholder"


def test_numbers() -> None:
    assert m.number(2) == 2.0
    assert m.number(True) is None
    assert m.number(last(lambda x: x)) is None
    assert m.is_number(0.1 + 0.2, 0.3)
    assert not m.is_number(0.3001, 0.3)


def test_arguments_have_names_and_defaults() -> None:
    found = m.arguments(last(lambda x: torch.softmax(x, -1)))
    assert (found["dim"], found["dtype"]) == (-1, None)


def test_symbolic_sizes_are_compared_without_guards() -> None:
    node = last(lambda x, y: x.sin() + y.sum(), torch.randn(2, 3), torch.randn(5, 6), dynamic=True)
    sizes = m.shape(node)
    assert m.same_sizes(sizes, sizes)
    assert not m.same_size(sizes[0], sizes[1])
    assert not m.same_size(sizes[0], 2)
    assert m.known(7) == 7
    assert m.is_last(-1, node) and m.is_last(1, node) and not m.is_last(0, node)
