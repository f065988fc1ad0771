"""fuse_hadamard_quantize: a rotation and the rounding of its result are one op; the rule of qfx::hadamard."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.backends.triton import lower
from qfx.backends.triton.device import INTERPRETER
from qfx.backends.triton.hadamard import pack_hadamard
from qfx.backends.triton.passes.fuse_hadamard_quantize import fuse_hadamard_quantize
from qfx.backends.triton.rules_rotation import hadamard as rule
from qfx.backends.triton.site import Site
from qfx.graph import schema_name
from tests.backends.triton.passes.lowered import inputs, outputs, quantized, ran
from tests.graphs import Function, capture, text

OPS = torch.ops.qfx_triton
BEFORE = """\
%x: f16[3,32] = input
%hadamard: f16[3,32] = qfx_triton.hadamard(%x, [@a, @b, @c], 16, False)
%quantize_dynamic: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%hadamard, None, i8/tok)
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)
%getitem_1: f32[3,1] = getitem(%quantize_dynamic, 1)
return [%getitem, %getitem_1]
"""
AFTER = """\
%x: f16[3,32] = input
%hadamard_quantize: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.hadamard_quantize(%x, [@a, @b, @c], 16, \
False, i8/tok)
%getitem: i8[3,32] = getitem(%hadamard_quantize, 0)
%getitem_1: f32[3,1] = getitem(%hadamard_quantize, 1)
return [%getitem, %getitem_1]
"""


class Rounded(nn.Module):
    """Rotates x by the packed matrices a, b, c and does the rest by a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        for name, part in zip("abc", pack_hadamard(16, 3), strict=True):
            self.register_buffer(name, part)
        self.register_buffer("s", torch.ones(32))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def rotated(own: Any, x: Tensor) -> Any:
    y = OPS.hadamard(x, [own.a, own.b, own.c], 16, False)
    return OPS.quantize_dynamic(y, None, "i8/tok")[:2]


def test_golden_text() -> None:
    x = inputs(torch.float16)
    gm = capture(Rounded(rotated), x)
    assert text(gm) == BEFORE
    found = ran(gm, fuse_hadamard_quantize)
    assert text(found) == AFTER
    for a, b in zip(outputs(gm, x), outputs(found, x), strict=True):
        assert torch.equal(a, b)


def read_twice(own: Any, x: Tensor) -> Any:
    y = OPS.hadamard(x, [own.a, own.b, own.c], 16, False)
    return y, OPS.quantize_dynamic(y, None, "i8/tok")[0]


def smoothed(own: Any, x: Tensor) -> Any:
    return OPS.quantize_dynamic(OPS.hadamard(x, [own.a, own.b, own.c], 16, False), own.s, "i8/tok")[0]


def of_other_format(own: Any, x: Tensor) -> Any:
    return OPS.quantize_dynamic(OPS.hadamard(x, [own.a, own.b, own.c], 16, False), None, "u8/tok")[0]


@pytest.mark.parametrize("function", [read_twice, smoothed, of_other_format])
def test_what_is_left_as_it_is(function: Any) -> None:
    gm = capture(Rounded(function), inputs(torch.float16))
    before = text(gm)
    assert text(ran(gm, fuse_hadamard_quantize)) == before


class Rotated(nn.Module):
    """A linear whose input is rotated, as the rewrite `rotate-down` has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(torch.ops.qfx.hadamard(x, 16, 3, False))
        return y


@pytest.mark.parametrize(("x_format", "w_format"), [("i8/tok", "i8/ch"), ("i8/tok", "i4/g32"), ("", "i4/g32")])
def test_a_rotated_linear_is_lowered(x_format: str, w_format: str) -> None:
    x = inputs(rows=5)
    gm = quantized(Rotated(), x, x_format, w_format)
    lowered = lower(gm)
    (expected,), (found,) = gm(x), lowered(x)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.02)  # a code may be another where it rounds a tie
    named = {"hadamard_quantize (Triton)"} if x_format else {"hadamard of 16 channels (Triton)"}
    assert named <= set(lowered.kernels.values())
    assert not any("(torch)" in kernel for kernel in lowered.kernels.values())


def test_f64_is_left_to_torch() -> None:
    gm = capture(Function(lambda _, x: torch.ops.qfx.hadamard(x, 16, 3, False)), inputs().double())
    (node,) = [n for n in gm.graph.nodes if schema_name(n) == "qfx::hadamard"]
    assert rule(Site(gm, node, INTERPRETER)) == "it rotates f16, bf16 and f32, not float64"
