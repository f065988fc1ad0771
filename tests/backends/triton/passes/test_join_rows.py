"""join_rows: the segments of a weight of several formats are one product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.backends.triton import lower
from qfx.backends.triton.device import INTERPRETER
from qfx.backends.triton.passes.join_rows import join_rows
from tests.backends.triton.cases import INTERPRETED
from tests.backends.triton.passes.lowered import inputs, outputs, quantized
from tests.graphs import text

AFTER = """\
%input_1: f32[5,32] = input
%quantize_dynamic: (i8[5,32], f32[5,1], u8[0]) = qfx_triton.quantize_dynamic(%input_1, None, i8/tok)
%getitem: i8[5,32] = getitem(%quantize_dynamic, 0)
%getitem_1: f32[5,1] = getitem(%quantize_dynamic, 1)
%getitem_2: u8[0] = getitem(%quantize_dynamic, 2)
%gemm_mixed: f32[5,24] = qfx_triton.gemm_mixed(%getitem, %getitem_1, %getitem_2, [@triton.t0, @triton.t1, @triton.t2, \
@triton.t3, @triton.t4, @triton.t5], @bias, None, i8/tok, i8/ch,i4/ch, 32, , f32)
return [%gemm_mixed]
"""


def joined(gm: Any) -> tuple[Any, dict[str, str]]:
    own, kernels = graph.copy(gm), dict.fromkeys([n.name for n in gm.graph.nodes], "")
    join_rows(own, INTERPRETER, kernels)
    return own, kernels


def linear(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(32, 24, bias=bias)


def test_golden_text() -> None:
    gm = quantized(linear(), inputs(rows=5), "i8/tok", ["i8/ch", "i4/ch", "i8/ch"])
    found, kernels = joined(gm)
    assert text(found) == AFTER
    named = [name for name, kernel in kernels.items() if kernel == "gemm_mixed i8/tok of i8/ch,i4/ch (Triton)"]
    assert named == ["linear", "linear_1", "slice_1", "slice_2", "cat", "add"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_format", ["i8/tok", "u8/tok", ""])
@pytest.mark.parametrize("w", [["i8/ch", "i4/ch", "i8/ch"], ["u4/g32", "i8/ch"], ["i2/ch", "u3/ch", "u4/ch", "i8/ch"]])
def test_results_are_those_of_the_reference(bias: bool, x_format: str, w: list[str]) -> None:
    x = inputs(rows=5)
    gm = quantized(linear(bias), x, x_format, w)
    found, _ = joined(gm)
    assert "mixed" in text(found)
    (expected,), (y,) = outputs(gm, x), outputs(found, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """Reads the segments' results in another way, too, or joins what is no segment."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.one, self.two, self.what = linear(), linear(bias=what == "biased"), what

    def forward(self, x: Tensor) -> Any:
        a = self.one(x)
        return torch.cat([a, self.two(x + 1)], -1) if self.what != "axis" else torch.cat([a, self.two(x)], 0)


@pytest.mark.parametrize("what", ["inputs", "axis", "biased"])
def test_other_joins_stay(what: str) -> None:
    gm = quantized(Twice(what), inputs(rows=5), "i8/tok", ["i8/ch"])
    found, _ = joined(gm)
    assert text(found) == text(gm)


def test_a_segment_without_a_kernel_leaves_all_as_they_are() -> None:
    gm = quantized(linear(), inputs(rows=5), "", ["i8/ch", "nf4/g32"])
    assert text(joined(gm)[0]) == text(gm)


def test_it_is_part_of_lowering() -> None:
    x = inputs(rows=5)
    gm = quantized(linear(), x, "i8/tok", ["i8/ch", "i4/ch", "i8/ch"])
    found = lower(gm)
    assert set(found.kernels.values()) == {"gemm_mixed i8/tok of i8/ch,i4/ch (Triton)"}
    with torch.no_grad():
        joined, due = found(x)[0], gm(x)[0]
    assert torch.equal(joined, due) if INTERPRETED else torch.allclose(joined, due, rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """What stands around a linear is added to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.linear(x)
        return y


def test_a_residual_is_added_in_the_product() -> None:
    x = inputs(rows=5)
    gm = quantized(Residual(), x, "i8/tok", ["i8/ch", "i4/ch"])
    found = lower(gm)
    assert set(found.kernels.values()) == {"gemm_mixed i8/tok of i8/ch,i4/ch (Triton)"}
    with torch.no_grad():
        torch.testing.assert_close(found(x)[0], gm(x)[0])


class Siblings(nn.Module):
    """Three linears of one input; the second reads another, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(32, 24), nn.Linear(32, 16, bias=False), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x) * 2, self.v(x), self.v(x + 1)


@pytest.mark.parametrize("x_format", ["i8/tok", ""])
def test_siblings_are_one_product(x_format: str) -> None:
    x = inputs(rows=5)
    gm = quantized(Siblings(), x, x_format, ["i8/ch", "i4/ch"])
    found, kernels = joined(gm)
    assert text(found).count("_mixed(") == 2  # one for each input
    assert text(found).count("aten.slice") == 3
    name = "gemm_mixed i8/tok" if x_format else "linear_mixed"
    assert {kernel for node, kernel in kernels.items() if node.startswith("cat")} <= {
        f"{name} of {','.join(['i8/ch,i4/ch'] * n)} (Triton)" for n in (1, 3)
    }
    for expected, y in zip(outputs(gm, x), outputs(found, x), strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
