"""share_quantize: one quantization for all that round the same input in the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.backends.triton.passes.share_quantize import share_quantize
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.passes.lowered import Gated, inputs, lowered, outputs, quantized, ran
from tests.graphs import Function, capture, counts, same, text

quantize = torch.ops.qfx_triton.quantize_dynamic
BEFORE = """\
%inputs_0: f32[3,32] = input
%quantize_dynamic: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%inputs_0, @a, i8/tok)
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)
%getitem_1: f32[3,1] = getitem(%quantize_dynamic, 1)
%quantize_dynamic_1: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%inputs_0, @b, i8/tok)
%getitem_2: i8[3,32] = getitem(%quantize_dynamic_1, 0)
return [%getitem, %getitem_1, %getitem_2]
"""
AFTER = """\
%inputs_0: f32[3,32] = input
%quantize_dynamic: (i8[3,32], f32[3,1], u8[0]) = qfx_triton.quantize_dynamic(%inputs_0, @a, i8/tok)
%getitem: i8[3,32] = getitem(%quantize_dynamic, 0)
%getitem_1: f32[3,1] = getitem(%quantize_dynamic, 1)
return [%getitem, %getitem_1, %getitem]
"""


def twice(own: Any, x: Tensor) -> Any:
    codes, scale, _ = quantize(x, own.a, "i8/tok")
    return codes, scale, quantize(x, own.b, "i8/tok")[0]


def model(**changed: Tensor) -> Function:
    return Function(twice, **{"a": torch.full((32,), 2.0), "b": torch.full((32,), 2.0), **changed}).to(DEVICE)


def test_golden_text() -> None:
    gm = ran(capture(model(), inputs()))
    assert text(gm) == BEFORE
    assert text(ran(gm, share_quantize)) == AFTER
    assert same(share_quantize, model(), inputs(), limit=0.0) == 1


def test_other_factors_formats_and_inputs_stay_apart() -> None:
    assert same(share_quantize, model(b=torch.full((32,), 3.0)), inputs(), limit=0.0) == 0
    formats = Function(lambda _, x: (quantize(x, None, "i8/tok")[0], quantize(x, None, "u8/tok")[0]))
    assert same(share_quantize, formats, inputs(), limit=0.0) == 0
    values = Function(lambda _, x: (quantize(x, None, "i8/tok")[0], quantize(x * 2, None, "i8/tok")[0]))
    assert same(share_quantize, values, inputs(), limit=0.0) == 0


def test_fixed_scales_are_the_same_where_their_values_are() -> None:
    def static(own: Any, x: Tensor) -> Any:
        args = (own.s, own.t, own.u)
        return tuple(torch.ops.qfx_triton.quantize_static(x, None, scale, None, "i8") for scale in args)

    scales = {"s": torch.tensor(0.5), "t": torch.tensor(0.5), "u": torch.tensor(0.25)}
    assert same(share_quantize, Function(static, **scales).to(DEVICE), inputs(), limit=0.0) == 1


def test_gate_and_up_share_their_codes() -> None:
    gm = lowered(quantized(Gated(), inputs()))
    after = ran(gm, share_quantize)
    assert counts(gm)["quantize_dynamic"] - counts(after)["quantize_dynamic"] == 1
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm, inputs()), outputs(after, inputs()), strict=True))
