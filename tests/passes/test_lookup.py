"""qfx.passes.lookup: rows that a forward picks from a table by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.passes.lookup import lookup
from qfx.passes.masks import NATURAL
from tests.graphs import Function, after, capture, same, text

GOLDEN = """\
%inputs_0: f32[2,3] = input
%arange: i64[3] = aten.arange(3, device=cpu)
%unsqueeze: i64[1,3] = aten.unsqueeze(%arange, 0)
%repeat: i64[2,3] = aten.repeat(%unsqueeze, [2, 1])
%embedding: f32[2,3,4] = aten.embedding(@table.weight, %repeat)
%unsqueeze_1: f32[2,3,1] = aten.unsqueeze(%inputs_0, 2)
%add: f32[2,3,4] = aten.add.Tensor(%embedding, %unsqueeze_1)
return [%add]
"""
X = torch.randn(2, 3)


def positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1], device=x.device)


def read(rows: Callable[[Any, Tensor], Tensor]) -> Function:
    def function(own: Any, x: Tensor) -> Tensor:
        return rows(own, x) + x[..., None]

    return Function(function, table=nn.Embedding(9, 4), weight=torch.randn(9, 4), bias=torch.randn(9, 4))


def whisper(own: Any, x: Tensor) -> Tensor:
    found: Tensor = own.table.weight[positions(x)[None].repeat(x.shape[0], 1)]
    return found


def test_golden() -> None:
    gm, count = after(lookup, read(whisper), X)
    assert count == 1 and text(gm) == GOLDEN


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (whisper, 1),
        (lambda own, x: own.table.weight[positions(x) + 2], 1),  # as BART counts
        (lambda own, x: own.weight[positions(x)[None].expand(2, -1)], 1),
        (lambda own, x: own.table.weight[positions(x) - 2], 0),  # the last rows, too
        (lambda own, x: own.table.weight[(x > 0).long().sum() + positions(x)], 0),  # of data
        (lambda own, x: own.bias[positions(x)], 0),  # an expert's
        (lambda own, x: own.table.weight[: x.shape[1]], 0),
        (lambda own, x: own.table.weight.t()[positions(x)][:, :4], 0),
        (lambda own, x: own.table.weight[:, positions(x)][:3, :1], 0),
        (lambda own, x: own.table(positions(x)), 0),
    ],
)
def test_rows_of_tables(rows: Callable[[Any, Tensor], Tensor], count: int, dynamic: bool) -> None:
    assert same(lookup, read(rows), X, dynamic=dynamic) == count


@pytest.mark.parametrize("known", [False, True])
def test_rows_of_an_input_that_is_known_to_count_places(known: bool) -> None:
    model = Function(lambda own, at: own.table.weight[at], table=nn.Embedding(9, 4))
    gm = capture(model, torch.tensor([[2, 0, 8]]))
    if known:
        next(iter(gm.graph.find_nodes(op="placeholder"))).meta[NATURAL] = True
    assert lookup(gm) == known
    assert known == any("embedding" in str(n.target) for n in gm.graph.nodes)
