"""qfx.passes.low_rank: the best factors for an error, and the two linears beside one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfx import annotation, graph
from qfx.format import Format
from qfx.passes.linear import linear as linear_pass
from qfx.passes.low_rank import Site, apply, factors
from qfx.passes.rewrites import apply_record
from tests.graphs import after

LINEAR = torch.ops.aten.linear.default


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()  # type: ignore[no-any-return]


def test_a_graph_gets_two_linears_beside_the_one() -> None:
    model, x = Plain().eval(), torch.randn(2, 6)
    gm, _ = after(linear_pass, model, x)
    node = next(n for n in gm.graph.nodes if n.target is LINEAR)
    annotation.set(node, "w", Format.parse("i4/g32"))
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    apply_record(gm, {"name": "low-rank", "linear": "fc", "factor": "a", "second": "b"}, {"a": a, "b": b})
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], (model.fc(x) + x @ a.T @ b.T).relu())
    linears = [n for n in gm.graph.nodes if n.target is LINEAR]
    assert [annotation.text(n) for n in linears] == ["w=i4/g32", "", ""]
    assert [graph.fqn_of(n) for n in linears] == ["fc", "fc.low_a", "fc.low_b"]
    gm.graph.lint()


def test_a_live_module_holds_the_factors_until_it_is_packed() -> None:
    model = Plain()
    apply(model, Site("fc"), torch.randn(2, 6), torch.randn(4, 2))
    assert {name: tuple(t.shape) for name, t in model.fc.named_buffers()} == {"low_a": (2, 6), "low_b": (4, 2)}


def test_factors_are_the_best_for_the_inputs() -> None:
    """No worse than factors of the plain error, and, at full rank, the error itself."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(5, 8, generator=generator)
    x = torch.randn(100, 8, generator=generator) * torch.logspace(-2, 1, 8)
    root = torch.linalg.cholesky((x.T @ x).flip(0, 1)).flip(0, 1)  # upper: R R^T = H
    torch.testing.assert_close(root @ root.T, x.T @ x, rtol=1e-3, atol=1e-3)
    left = {}
    for name, given in (("weighed", root), ("plain", torch.eye(8))):
        a, b = factors(error, given, 2)
        assert a.shape == (2, 8) and b.shape == (5, 2)
        left[name] = float((x @ (error - b @ a).T).square().sum())
    assert left["weighed"] < 0.9 * left["plain"]
    a, b = factors(error, root, 99)
    torch.testing.assert_close(b @ a, error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_left_is_the_rest_of_the_singular_values(rank: int) -> None:
    error = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    a, b = factors(error, torch.eye(6), rank)
    rest = torch.linalg.svdvals(error)[rank:].square().sum()
    torch.testing.assert_close((error - b @ a).square().sum(), rest)
