"""qfx.passes.experts: products with the matrices of many experts become qfx::grouped_linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfx import graph
from qfx.passes.experts import experts
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: bf16[5,16] = input
%inputs_1: i32[3] = input
%grouped_linear: bf16[5,8] = qfx.grouped_linear(%inputs_0, @w, %inputs_1)
return [%grouped_linear]
"""
OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)


def test_golden_text_and_name() -> None:
    model = Function(lambda own, x, offs: torch._grouped_mm(x, own.w.mT, offs=offs), w=torch.randn(3, 8, 16).bfloat16())
    gm, count = after(experts, model, torch.randn(5, 16).bfloat16(), OFFS)
    assert count == 1
    assert text(gm) == GOLDEN
    node = next(n for n in gm.graph.nodes if graph.op_name(n) == "grouped_linear")
    assert graph.fqn_of(node) == "w"


@pytest.mark.parametrize("turned", [True, False])
def test_grouped_products(turned: bool) -> None:
    def function(own: Any, x: Tensor, offs: Tensor) -> Tensor:
        return torch._grouped_mm(x, own.w.mT if turned else own.w, offs=offs)

    w = torch.randn(3, 8, 16) if turned else torch.randn(3, 16, 8)
    assert same(experts, Function(function, w=w.bfloat16()), torch.randn(5, 16).bfloat16(), OFFS, limit=1e-2) == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_as_many_rows_for_each_expert(dynamic: bool) -> None:
    model = Function(lambda own, x: torch.bmm(x, own.w), w=torch.randn(3, 16, 8))
    assert same(experts, model, torch.randn(3, 5, 16), dynamic=dynamic) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("left", [True, False])
def test_a_matrix_picked_for_each_row(left: bool, dynamic: bool) -> None:
    def function(own: Any, x: Tensor, ids: Tensor) -> Tensor:
        if left:
            return torch.bmm(own.w[ids], x.unsqueeze(-1)).squeeze(-1)
        return torch.bmm(x.unsqueeze(1), own.w[ids]).squeeze(1)

    model = Function(function, w=torch.randn(4, 8, 16) if left else torch.randn(4, 16, 8))
    ids = torch.tensor([2, 0, 0, 3, 2, 0])  # nothing goes to expert 1
    gm, _ = after(experts, model, torch.randn(6, 16), ids, dynamic=dynamic)
    assert counts(gm)["grouped_linear"] == 1
    assert "bmm" not in counts(gm)
    assert same(experts, model, torch.randn(6, 16), ids, dynamic=dynamic) == 1


def test_near_misses_stay() -> None:
    x, ids = torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    for function in (
        lambda own, x, ids: torch.bmm(x, x.mT),  # no parameter
        lambda own, x, ids: torch.bmm(x, own.w[ids]),  # several rows for each picked matrix
        lambda own, x, ids: torch.bmm(x, own.w.sin()),  # computed
    ):
        _, count = after(experts, Function(function, w=torch.randn(3, 16, 8)), x, ids)
        assert count == 0
