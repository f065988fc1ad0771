"""fuse_norm_quantize: a sum, a norm and the rounding of its result are one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.backends.triton.passes._nodes import computed
from qfx.backends.triton.passes.fuse_norm_quantize import fuse_norm_quantize
from qfx.backends.triton.passes.share_quantize import share_quantize
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.passes.lowered import Gated, inputs, lowered, outputs, quantized, ran
from tests.graphs import Function, after, capture, counts, error, tensors, text

quantize = torch.ops.qfx_triton.quantize_dynamic
BEFORE = """\
%inputs_0: f16[3,32] = input
%inputs_1: f16[3,32] = input
%add: f16[3,32] = aten.add.Tensor(%inputs_0, %inputs_1)
%rms_norm: f16[3,32] = aten.rms_norm(%add, [32], @w, 1e-06)
%quantize_dynamic: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%rms_norm, None, i8/tok)
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)
%getitem_1: f32[3,1] = getitem(%quantize_dynamic, 1)
%add_1: f16[3,32] = aten.add.Tensor(%add, 1)
return [%getitem, %getitem_1, %add_1]
"""
AFTER = """\
%inputs_0: f16[3,32] = input
%inputs_1: f16[3,32] = input
%norm_quantize: (i8[3,32], f32[3,1], u8[0], f16[3,32]) = qfx_triton.norm_quantize(%inputs_0, %inputs_1, @w, None, \
1e-06, False, None, None, None, i8/tok, False, True)
%getitem: f16[3,32] = getitem(%norm_quantize, 3)
%getitem_1: i8[3,32] = getitem(%norm_quantize, 0)
%getitem_2: f32[3,1] = getitem(%norm_quantize, 1)
%add: f16[3,32] = aten.add.Tensor(%getitem, 1)
return [%getitem_1, %getitem_2, %add]
"""
ALONE = """\
%inputs_0: f16[3,32] = input
%norm_quantize: (i8[3,32], f16[3,32]) = qfx_triton.norm_quantize(%inputs_0, None, @w, @b, 1e-05, True, @s, None, None, \
i8, True, False)
%getitem: f16[3,32] = getitem(%norm_quantize, 1)
%getitem_1: i8[3,32] = getitem(%norm_quantize, 0)
return [%getitem_1, %getitem]
"""


def summed(own: Any, x: Tensor, y: Tensor) -> Any:
    total = x + y
    codes, scale, _ = quantize(F.rms_norm(total, [32], own.w, 1e-6), None, "i8/tok")
    return codes, scale, total + 1


def static(own: Any, x: Tensor) -> Any:
    norm = F.layer_norm(x, [32], own.w, own.b)
    return torch.ops.qfx_triton.quantize_static(norm, None, own.s, None, "i8"), norm


def vectors(dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.rand(32, dtype=dtype, device=DEVICE) + 0.5 for name in ("w", "b")}


def test_golden_text() -> None:
    x = inputs(torch.float16)
    gm = capture(Function(summed, w=vectors()["w"]), x, x.flip(0))
    assert text(gm) == BEFORE
    found = ran(gm, fuse_norm_quantize)
    names = next(computed(n) for n in found.graph.nodes if n.op == "call_function")
    assert names == ("add", "rms_norm", "quantize_dynamic")
    assert text(found) == AFTER
    for a, b in zip(outputs(gm, x, x.flip(0)), outputs(found, x, x.flip(0)), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-3, atol=1.0 if a.dtype == torch.int8 else 1e-3)


def test_a_fixed_scale_and_a_result_that_is_read_elsewhere() -> None:
    model = Function(static, **vectors(), s=torch.tensor(0.02, device=DEVICE))
    x = inputs(torch.float16)
    gm, count = after(fuse_norm_quantize, model, x)
    assert count == 1 and text(gm) == ALONE
    codes, norm = outputs(gm, x)
    assert torch.equal(codes, torch.ops.qfx_triton.quantize_static(norm, None, model.s, None, "i8"))
    torch.testing.assert_close(norm, model(x)[1], rtol=2e-3, atol=1e-3)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, [32], None, 1e-6)


@pytest.mark.parametrize(
    ("function", "matches", "left"),
    [
        (lambda _, x: quantize(_normed(x + x[:1]), None, "i8/tok")[:2], 1, {"add": 1}),  # no sum of equal shapes
        (lambda _, x: quantize(_normed(x.add(x.flip(0), alpha=2)), None, "i8/tok")[:2], 1, {"add": 1}),
        (lambda _, x: quantize(_normed(x).reshape(2, 48), None, "i8/tok")[:2], 0, {"rms_norm": 1}),
        (lambda _, x: quantize(F.rms_norm(x, [3, 32], None, 1e-6), None, "i8/tok")[:2], 0, {"rms_norm": 1}),
        (lambda _, x: quantize(F.rms_norm(x, [32]), None, "i8/tok")[:2], 0, {"rms_norm": 1}),  # eps of torch's choice
        (lambda _, x: quantize(_normed(x), None, "i8/dyn")[:2], 0, {"rms_norm": 1}),  # one scale for all rows
        (lambda _, x: quantize(_normed(x), None, "f8e4m3/g32/dyn")[:2], 0, {"rms_norm": 1}),
    ],
)  # fmt: skip
def test_what_is_not_fused(function: Any, matches: int, left: dict[str, int]) -> None:
    gm, count = after(fuse_norm_quantize, Function(function), inputs())
    assert count == matches
    assert left.items() <= counts(gm).items()


def test_two_formats_of_one_norm() -> None:
    def both(_: Any, x: Tensor) -> Any:
        y = _normed(x)
        return *quantize(y, None, "i8/tok")[:2], *quantize(y, None, "u8/tok")

    gm, count = after(fuse_norm_quantize, Function(both), inputs())
    assert count == 1 and counts(gm)["quantize_dynamic"] == 1
    assert error(tensors(Function(both)(inputs())), outputs(gm, inputs())) < 1e-2


def test_a_sum_whose_reader_comes_before_the_norms_weight_stays() -> None:
    def early(own: Any, x: Tensor, y: Tensor) -> Any:
        total = x + y
        weight = total.sum(0).sigmoid()
        return quantize(F.rms_norm(total, [32], weight, 1e-6), None, "i8/tok")[:2]

    gm, count = after(fuse_norm_quantize, Function(early), inputs(), inputs().flip(0))
    assert count == 1 and counts(gm)["add"] == 1
    assert error(tensors(Function(early)(inputs(), inputs().flip(0))), outputs(gm, inputs(), inputs().flip(0))) < 1e-2


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_computes_the_same(layer: bool, dtype: torch.dtype) -> None:
    gm = lowered(quantized(Gated(layer=layer, dtype=dtype), inputs(dtype)))
    found = ran(gm, share_quantize, fuse_norm_quantize)
    left = counts(found)
    assert left["norm_quantize"] == 1 and left["add"] == 1 and "rms_norm" not in left and "layer_norm" not in left
    # codes may differ by one step where torch sums the squares in another order
    assert error(outputs(gm, inputs(dtype)), outputs(found, inputs(dtype))) < (1e-2 if dtype == torch.float16 else 5e-3)
