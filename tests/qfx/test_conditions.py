"""qfx.conditions: what a trace notes about sizes, and for which sizes it is true."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from qfx.capture import Captured, capture_export
from qfx.conditions import conditions, hold, is_number, sizes_of
from qfx.graph import val


class Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.shape[1] // 4) if x.shape[1] % 4 == 0 else x


def captured(length: int, **options: Any) -> Captured:
    return capture_export(Blocks(), (torch.randn(2, length, 3),), **options)


@pytest.mark.parametrize(("length", "met"), [(8, {4, 8, 12}), (7, {5, 6, 7, 9, 10, 11, 13})])
def test_a_branch_holds_for_the_sizes_that_take_it(length: int, met: set[int]) -> None:
    environment = captured(length).environment
    sizes = sizes_of(environment)
    (symbol,) = [symbol for symbol, size in sizes.items() if size == length]
    noted = conditions(environment)
    assert len(noted) == len(set(noted)) > 0
    assert {size for size in range(4, 14) if hold(noted, {**sizes, symbol: size})} == met


def test_a_condition_that_cannot_be_answered_does_not_hold() -> None:
    a, b = sympy.symbols("a b", integer=True)
    assert hold([], {}) and hold([a > 1], {a: 2}) and not hold([a > 1, b > 1], {a: 2, b: 1})
    assert not hold([a > b], {a: 2}), "a symbol of unknown size"


def test_sizes_that_are_fixed() -> None:
    (free,) = captured(8).gm.graph.find_nodes(op="placeholder")
    (fixed,) = captured(8, dynamic=False).gm.graph.find_nodes(op="placeholder")
    assert [is_number(size) for size in val(free).shape] == [False, False, False]
    assert [is_number(size) for size in val(fixed).shape] == [True] * 3
    assert sizes_of(None) == {}


def test_a_symbol_that_became_a_number_is_one() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, i].exp() for i in range(x.shape[1])], dim=1)

    program = torch.export.export(
        Steps(), (torch.randn(2, 5),), dynamic_shapes={"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    )
    (node,) = program.graph.find_nodes(op="placeholder")
    assert [is_number(size) for size in node.meta["val"].shape] == [False, True]
