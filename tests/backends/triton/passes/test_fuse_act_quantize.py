"""fuse_act_quantize: an activation function, a product and the rounding of the result are one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.backends.triton.passes.fuse_act_quantize import fuse_act_quantize
from qfx.ops import floats as float_ops
from tests.backends.triton.passes.lowered import Gated, inputs, lowered, outputs, quantized, ran
from tests.graphs import Function, after, capture, counts, error, tensors, text

quantize = torch.ops.qfx_triton.quantize_dynamic
BEFORE = """\
%inputs_0: f16[3,32] = input
%inputs_1: f16[3,32] = input
%silu: f16[3,32] = aten.silu(%inputs_0)
%mul: f16[3,32] = aten.mul.Tensor(%inputs_1, %silu)
%quantize_dynamic: (i8[3,32], f32[3,1], u8[3,1]) = qfx_triton.quantize_dynamic(%mul, @s, u8/tok)
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)
%getitem_1: u8[3,1] = getitem(%quantize_dynamic, 2)
return [%getitem, %getitem_1]
"""
AFTER = """\
%inputs_0: f16[3,32] = input
%inputs_1: f16[3,32] = input
%act_quantize: (i8[3,32], f32[3,1], u8[3,1]) = qfx_triton.act_quantize(%inputs_0, %inputs_1, silu, None, None, @s, \
u8/tok, False)
%getitem: i8[3,32] = getitem(%act_quantize, 0)
%getitem_1: u8[3,1] = getitem(%act_quantize, 2)
return [%getitem, %getitem_1]
"""


def gated(own: Any, x: Tensor, y: Tensor) -> Any:
    codes, _, zero = quantize(y * F.silu(x), own.s, "u8/tok")
    return codes, zero


def test_golden_text() -> None:
    x = inputs(torch.float16)
    gm = capture(Function(gated, s=torch.rand(32) + 0.5).to(x.device), x, x.flip(0))
    assert text(gm) == BEFORE
    found = ran(gm, fuse_act_quantize)
    assert text(found) == AFTER
    for a, b in zip(outputs(gm, x, x.flip(0)), outputs(found, x, x.flip(0)), strict=True):
        assert int((a.int() - b.int()).abs().max()) <= 1


ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": torch.ops.qfx.quick_gelu,
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kept", [False, True])
def test_functions_without_a_gate(act: str, kept: bool) -> None:
    def alone(_: Any, x: Tensor) -> Any:
        y = ACTS[act](x)
        found = quantize(y, None, "i8/tok")[:2]
        return (*found, y.cos()) if kept else found

    gm, count = after(fuse_act_quantize, Function(alone), inputs())
    assert count == 1
    fused = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert fused.args[2] == act and fused.args[-1] is kept
    codes, *rest = outputs(gm, inputs())
    expected, *floats = tensors(Function(alone)(inputs()))
    assert int((codes.int() - expected.int()).abs().max()) <= 1
    assert error(floats, rest) < 1e-5


def test_the_inlined_quick_gelu_is_known() -> None:
    model = Function(lambda _, x: quantize(torch.ops.qfx.quick_gelu(x), None, "i8/tok")[:2])
    gm = capture(model, inputs())
    for node in gm.graph.nodes:
        if node.target is torch.ops.qfx.quick_gelu.default:
            node.target = float_ops.quick_gelu
    assert counts(ran(gm, fuse_act_quantize))["act_quantize"] == 1


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda _, x: quantize(F.silu(x) * x[:1], None, "i8/tok")[:2], "silu"),  # one row for all
        (lambda _, x: quantize(F.silu(x) * 2, None, "i8/tok")[:2], "silu"),
        (lambda _, x: quantize(torch.tanh(x) * x, None, "i8/tok")[:2], "tanh"),
        (lambda _, x: quantize((F.silu(x) * x).t(), None, "i8/tok")[:2], "silu"),
        (lambda _, x: (quantize((y := F.silu(x)) * x, None, "i8/tok")[0], y), "silu"),  # it is read elsewhere
    ],
)
def test_what_is_not_fused(function: Any, left: str) -> None:
    gm, count = after(fuse_act_quantize, Function(function), inputs())
    assert count == 0 and left in counts(gm)


def test_a_block_computes_the_same() -> None:
    gm = lowered(quantized(Gated(), inputs()))
    found = ran(gm, fuse_act_quantize)
    assert counts(found)["act_quantize"] == 1 and not {"silu", "mul"} & set(counts(found))
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 5e-3
