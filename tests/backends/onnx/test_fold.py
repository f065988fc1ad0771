"""qfx.backends.onnx.fold: what depends on no input is computed once, by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.backends.onnx.fold import folded
from tests.graphs import Function, capture, counts, error

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
DEEPER_THAN_PYTHON = 1200


X = torch.randn(3, 3)


@pytest.mark.parametrize(
    ("function", "goes"),
    [
        (lambda own, x: x + torch.matrix_exp(own.w), True),
        (lambda own, x: x + torch.matrix_exp(own.w @ own.w.t() * 0.1 + torch.ones(3)), True),
        (lambda own, x: x + torch.matrix_exp(x * own.w), False),
        (lambda own, x: x + torch.matrix_exp(own.w + torch.rand(3)), False),
    ],
)
def test_constants_go_and_what_is_of_inputs_or_chance_stays(function: Any, goes: bool) -> None:
    model = Function(function, w=torch.randn(3, 3))
    gm = capture(model, X)
    (node,) = (n for n in gm.graph.nodes if "matrix_exp" in str(n.target))
    assert folded(gm, node) is goes
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert ("linalg_matrix_exp" in counts(gm) or "matrix_exp" in counts(gm)) is not goes
    if "rand" not in counts(gm):
        assert error(model(X), gm(X)) < 1e-6


def test_what_is_too_large_stays() -> None:
    model = Function(lambda own, x: x + torch.matrix_exp(own.w.expand(2**20, 3, 3)).sum(0), w=torch.randn(3, 3))
    gm = capture(model, X)
    (node,) = (n for n in gm.graph.nodes if "matrix_exp" in str(n.target))
    assert folded(gm, node) is False


def test_sizes_that_vary_stay_and_are_not_fixed_by_the_question() -> None:
    model = Function(lambda own, x: torch.matrix_exp(torch.ones(x.shape[0], x.shape[0])) @ x)
    gm = capture(model, torch.randn(5, 3), dynamic=True)
    (node,) = (n for n in gm.graph.nodes if "matrix_exp" in str(n.target))
    assert folded(gm, node) is False
    assert not isinstance(node.meta["val"].shape[0], int)


def test_sizes_that_data_tell_are_no_error(tmp_path: Path) -> None:
    """A result of a size that only the data tell (SigLIP 2 resizes positions so) is asked for nothing."""

    def rows(own: Any, x: Tensor, n: Tensor) -> Tensor:
        size: Any = n.item()  # not int(), which asks for it
        torch._check(size >= 2)
        torch._check(size <= 8)
        return torch.matrix_exp(x.new_ones(size, 3, 3) * own.w).sum(0) + x

    gm = capture(Function(rows, w=torch.randn(3, 3)), X, torch.tensor(4), dynamic=True)
    (node,) = (n for n in gm.graph.nodes if "matrix_exp" in str(n.target))
    assert folded(gm, node) is False
    with pytest.raises(qfx.UnsupportedError, match="matrix_exp"):
        qfx.export_onnx(Function(rows, w=torch.randn(3, 3)), (X, torch.tensor(4)), tmp_path / "m.onnx")


@torch.no_grad()
def test_graphs_deeper_than_pythons_recursion() -> None:
    """What leads to an operator without an ONNX form may be many layers: only that operator runs in torch."""

    def deep(own: Any, x: Tensor) -> Tensor:
        x = x @ own.w
        for _ in range(DEEPER_THAN_PYTHON):
            x = x.tanh()
        return torch.matrix_exp(x)

    model = Function(deep, w=torch.randn(3, 3)).eval()
    compiled = torch.compile(model, backend="qfx", options={"cache": False})
    with pytest.warns(qfx.QfxWarning, match="matrix_exp") as told:
        found = compiled(X)
    assert not any("Recursion" in str(w.message) for w in told)
    assert error(model(X), found) < 0.05
    assert qfx.report(compiled).totals["linear_quantized"] == 1
