"""qfx.passes.linear: matrix products with a parameter become aten.linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx import graph
from qfx.passes.linear import linear
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[s0,s1,4] = input
%t: f32[6,4] = aten.t(@w)
%linear: f32[s0,s1,6] = aten.linear(%inputs_0, %t, @b)
return [%linear]
"""


def _conv1d(own: Any, x: Tensor) -> Tensor:
    return torch.addmm(own.b, x.view(-1, x.shape[-1]), own.w).view(*x.shape[:-1], 6)


def test_golden_text() -> None:
    model = Function(_conv1d, w=torch.randn(4, 6), b=torch.randn(6))
    gm, count = after(linear, model, torch.randn(2, 3, 4), dynamic=True)
    assert count == 1
    assert text(gm) == GOLDEN
    node = next(n for n in gm.graph.nodes if graph.op_name(n) == "linear")
    assert graph.fqn_of(node) == "w"
    assert node.meta["stack_trace"]


MATCHES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "addmm": (lambda own, x: torch.addmm(own.b, x, own.w), (4, 6), (5, 4)),
    "addmm of a matrix": (lambda own, x: torch.addmm(x[:, :1].expand(5, 6), x, own.w), (4, 6), (5, 4)),
    "mm": (lambda own, x: torch.mm(x, own.w), (4, 6), (5, 4)),
    "mm transposed": (lambda own, x: torch.mm(x, own.w.t()), (6, 4), (5, 4)),
    "mv": (lambda own, x: torch.mv(own.w, x), (6, 4), (4,)),
    "matmul": (lambda own, x: x @ own.w.T, (6, 4), (2, 3, 4)),
    "matmul of a vector": (lambda own, x: x @ own.w, (4, 6), (4,)),
    "matmul from the left": (lambda own, x: own.w @ x, (6, 4), (2, 4, 5)),
    "bmm of one matrix": (lambda own, x: torch.bmm(x, own.w.expand(2, 4, 6)), (4, 6), (2, 3, 4)),
    "bmm of one in a batch": (lambda own, x: torch.bmm(x, own.w), (1, 4, 6), (1, 3, 4)),
    "bmm of rows in a batch of one": (lambda own, x: torch.bmm(x.view(1, 6, 4), own.w), (1, 4, 6), (2, 3, 4)),
    "bmm transposed": (lambda own, x: torch.bmm(x, own.w.expand(2, 6, 4).mT), (6, 4), (2, 3, 4)),
    "baddbmm": (lambda own, x: torch.baddbmm(own.b, x, own.w.expand(2, 4, 6)), (4, 6), (2, 3, 4)),
}


@pytest.mark.parametrize("name", MATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_function(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function, weight, size = MATCHES[name]
    model = Function(function, w=torch.randn(weight, dtype=dtype), b=torch.randn(6, dtype=dtype))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert same(linear, model, torch.randn(size, dtype=dtype), limit=limit) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: torch.mm(x, x.t()),
        lambda own, x: torch.addmm(own.b, x, own.w, alpha=2.0),
        lambda own, x: torch.addmm(own.b, x, own.w, beta=0.5),
        lambda own, x: torch.mm(own.w, own.w.t()),
        lambda own, x: torch.mm(x, own.w.sin()),
    ],
)
def test_near_misses_stay(function: Any) -> None:
    gm, count = after(linear, Function(function, w=torch.randn(4, 6), b=torch.randn(6)), torch.randn(5, 4))
    assert count == 0
    assert "linear" not in counts(gm)


def test_a_batch_of_different_matrices_stays() -> None:
    gm, count = after(
        linear, Function(lambda own, x: torch.bmm(x, own.w), w=torch.randn(2, 4, 6)), torch.randn(2, 3, 4)
    )
    assert count == 0
    assert counts(gm) == {"bmm": 1}


def test_a_flattened_product_with_more_users_keeps_its_shape() -> None:
    def function(own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.mm(x.view(-1, 4), own.w)
        return y.sum(0), y.view(2, 3, 6)

    assert same(linear, Function(function, w=torch.randn(4, 6)), torch.randn(2, 3, 4)) == 1
