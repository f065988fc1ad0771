"""fuse_residual: what is added to a product is added in its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.backends.triton.passes._nodes import computed
from qfx.backends.triton.passes.fuse_residual import fuse_residual
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.passes.lowered import Gated, inputs, lowered, outputs, quantized, ran
from tests.graphs import Function, counts, error, text

AFTER = """\
%inputs_0: f32[3,32] = input
%quantize_dynamic: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%inputs_0, None, i8/tok)  \
# x=i8/tok w=i8/ch
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)  # x=i8/tok w=i8/ch
%getitem_1: f32[3,1] = getitem(%quantize_dynamic, 1)  # x=i8/tok w=i8/ch
%getitem_2: u8[0] = getitem(%quantize_dynamic, 2)  # x=i8/tok w=i8/ch
%gemm8: f32[3,32] = qfx_triton.gemm8(%getitem, %getitem_1, %getitem_2, [@triton.t0, @triton.t1, @triton.t2], @fc.bias, \
%inputs_0, i8/tok, i8/ch, , f32)  # x=i8/tok w=i8/ch
return [%gemm8]
"""


def product(function: Any, *, bias: bool = True) -> Any:
    """The lowered graph of a function of a linear `fc` [32, 32] and x."""
    torch.manual_seed(0)
    return lowered(quantized(Function(function, fc=nn.Linear(32, 32, bias=bias, device=DEVICE)), inputs()))


def test_golden_text() -> None:
    gm = product(lambda own, x: x + own.fc(x))
    found = ran(gm, fuse_residual)
    node = next(n for n in found.graph.nodes if "gemm8" in n.name or n.name == "add")
    assert computed(node) == ("linear", "add")
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 1e-6
    assert text(found) == AFTER


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: own.fc(x) + x[:1],
        lambda own, x: own.fc(x) + 1,
        lambda own, x: torch.add(own.fc(x), x, alpha=2),
        lambda own, x: (y := own.fc(x)) + y,
    ],
)
def test_other_sums(function: Any) -> None:
    gm = product(function)
    assert counts(ran(gm, fuse_residual)) == counts(gm)


def test_a_product_that_is_read_elsewhere_stays() -> None:
    def both(own: Any, x: Tensor) -> Any:
        y = own.fc(x)
        return x + y, y

    gm = product(both)
    assert counts(ran(gm, fuse_residual)) == counts(gm)


def test_a_block_computes_the_same() -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        gm = lowered(quantized(Gated(dtype=dtype), inputs(dtype)))
        found = ran(gm, fuse_residual)
        assert counts(gm)["add"] - counts(found).get("add", 0) == 1
        assert error(outputs(gm, inputs(dtype)), outputs(found, inputs(dtype))) < limit
