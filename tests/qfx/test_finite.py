"""qfx.finite: a trace of a model that looks for overflow takes the branch of finite values, and no other branch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.capture import capture_export
from qfx.errors import UnsupportedError
from qfx.finite import TakenFinite
from qfx.measuring.measure import sqnr_db
from tests.graphs import Function, error
from tests.quantized import call, quantized, sqnr

X = torch.randn(3, 4, dtype=torch.float16)
CLAMPED: dict[str, Callable[[Tensor], Tensor]] = {
    "isfinite": lambda y: y if torch.isfinite(y).all() else y.clamp(-1, 1),
    "not isfinite": lambda y: y.clamp(-1, 1) if not torch.isfinite(y).all() else y,
    "all of isfinite": lambda y: y if torch.all(torch.isfinite(y)) else y.clamp(-1, 1),
    "isinf": lambda y: y.clamp(-1, 1) if torch.isinf(y).any() else y,
    "isnan": lambda y: y.clamp(-1, 1) if torch.any(torch.isnan(y)) else y,
    "isinf or isnan": lambda y: y.clamp(-1, 1) if torch.isinf(y).any() or torch.isnan(y).any() else y,
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "some are finite": lambda y: y if torch.isfinite(y).any() else -y,
    "all are infinite": lambda y: y if torch.isinf(y).all() else -y,
    "some are positive": lambda y: y if (y > 0).any() else -y,
    "of a sum": lambda y: y if y.sum().isfinite() > 0 else -y,
}


def model(branch: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Function(lambda own, x: branch(own.part(x)), part=nn.Sequential(nn.Linear(4, 4))).to(X.dtype).eval()


@pytest.mark.parametrize("name", CLAMPED)
def test_the_branch_of_finite_values_is_traced(name: str) -> None:
    net = model(CLAMPED[name])
    with torch.no_grad():
        gm = capture_export(net, (X,)).gm
        assert not any("clamp" in str(node.target) for node in gm.graph.nodes)
        assert error(net(X), gm(X)[0]) == 0
    assert qfx.quantize(net, "w8a8-static", [X]) is net


@pytest.mark.parametrize("name", OTHERS)
def test_other_questions_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"data-dependent .*test_finite.py:\d+, in <lambda>"):
        capture_export(model(OTHERS[name]), (X,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    """Their values may be Inf by intent: no trace knows."""

    def forward(own: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask.isneginf(), 0) if torch.isinf(mask).any() else x

    x = torch.randn(3, 4, dtype=dtype)
    with pytest.raises(UnsupportedError, match=r"data-dependent .*test_finite.py:\d+, in forward"):
        capture_export(Function(forward), (x, torch.zeros_like(x)))
    capture_export(Function(forward), (x.half(), torch.zeros_like(x).half()))


def test_what_is_refused_is_calibrated_in_parts() -> None:
    net = model(OTHERS["some are positive"])
    with pytest.raises(UnsupportedError, match=r"test_finite.py:\d+[\s\S]*a part of it can be calibrated by itself"):
        qfx.quantize(net, "w8a8-static", [X])
    wanted = net(X).detach()
    qfx.quantize(net.get_submodule("part"), "w8a8-static", [X])
    assert 30 < sqnr_db(wanted, net(X)) < 80


def test_bart_in_float16_is_calibrated() -> None:
    found = quantized("bart", "w8a8-static", dtype=torch.float16)
    assert sqnr(found.outputs, call(found.model, found.inputs)) >= 25


def test_values_are_left_alone_and_tensors_are_let_go() -> None:
    with TakenFinite() as mode:
        bad = torch.tensor([1.0, float("inf")], dtype=torch.float16)
        assert torch.equal(torch.isfinite(bad), torch.tensor([True, False]))
        assert bool(bad.isfinite().all()) is False, "a method is not asked for"
        assert bool(torch.isfinite(bad).all()) and not bool(torch.isinf(bad).any())
        assert len(mode._known) == 0
    assert not bool(torch.isfinite(bad).all())
