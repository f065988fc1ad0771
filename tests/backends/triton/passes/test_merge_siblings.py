"""merge_siblings: linears of one input are one linear, whose result is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.backends.triton import lower
from qfx.backends.triton.passes._nodes import computed
from qfx.backends.triton.passes.merge_siblings import merge_siblings
from qfx.format import Format
from qfx.packing import pack_weight
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.passes.lowered import Gated, K, inputs, outputs, quantized, ran
from tests.graphs import Function, after, counts, error, text

BEFORE = """\
%x: f32[3,32] = input
%linear: f32[3,32] = qfx.linear(%x, @first.w_codes, @first.w_scale, None, None, None, None, None, i8/tok, i8/ch)  \
# x=i8/tok w=i8/ch
%add: f32[3,32] = aten.add.Tensor(%x, %linear)
%rms_norm: f32[3,32] = aten.rms_norm(%add, [32], @norm.weight, 1e-06)
%linear_1: f32[3,96] = qfx.linear(%rms_norm, @gate.merged_w_codes, @gate.merged_w_scale, None, @gate.merged_w_bias, \
None, None, None, i8/tok, i8/ch)  # x=i8/tok w=i8/ch
%slice_1: f32[3,48] = aten.slice.Tensor(%linear_1, 1, 0, 48)
%silu: f32[3,48] = aten.silu(%slice_1)
%slice_2: f32[3,48] = aten.slice.Tensor(%linear_1, 1, 48, 96)
%mul: f32[3,48] = aten.mul.Tensor(%silu, %slice_2)
%linear_2: f32[3,32] = qfx.linear(%mul, @down.w_codes, @down.w_scale, None, @down.bias, None, None, None, i8/tok, \
i8/ch)  # x=i8/tok w=i8/ch
%add_1: f32[3,32] = aten.add.Tensor(%add, %linear_2)
return [%add_1, %linear_2]
"""


def test_golden_text() -> None:
    gm = quantized(Gated(), inputs())
    found = ran(gm, merge_siblings)
    names = [computed(n) for n in found.graph.nodes if graph.schema_name(n) == "qfx::linear"]
    assert names == [("linear",), ("linear_1", "linear_2"), ("linear_3",)]
    assert text(found) == BEFORE
    assert error(outputs(gm, inputs()), outputs(found, inputs())) == 0.0, "sums of integers are exact"


@pytest.mark.parametrize("x_format", ["", "i8/tok"])
@pytest.mark.parametrize("w_format", ["i8/ch", "i4/g16", "u4/g16", "u3/g10", "nf4/g16", "f8e4m3/ch", "f4e2m1/g32/e8m0"])
def test_every_format_by_row(x_format: str, w_format: str) -> None:
    gm = quantized(Gated(), inputs(), x_format, w_format)
    found = ran(gm, merge_siblings)
    assert counts(gm)["linear"] - counts(found)["linear"] == 1
    assert error(outputs(gm, inputs()), outputs(found, inputs())) < 1e-5


def test_formats_with_something_for_all_rows_stay() -> None:
    for w_format in ("i8", "nf4/g16/dq", "i8/b16x16"):
        gm = quantized(Gated(), inputs(), "", w_format)
        assert counts(ran(gm, merge_siblings))["linear"] == counts(gm)["linear"]


def linears(scales: tuple[float, ...], smooth: tuple[float, ...] = (), bias: int = 0) -> Function:
    """Linears of one input with fixed scales, by one name each. bias: how many have one."""
    torch.manual_seed(0)
    held: dict[str, Tensor] = {}
    for i, scale in enumerate(scales):
        packed = pack_weight(torch.randn(8 + i, K), Format.parse("i8/ch"))
        held |= {f"w{i}": packed.data, f"s{i}": packed.scale, f"x{i}": torch.tensor(scale)}
        held |= {f"m{i}": torch.full((K,), smooth[i])} if smooth else {}
        held |= {f"b{i}": torch.randn(8 + i)} if i < bias else {}

    def one(own: Any, x: Tensor, i: int) -> Tensor:
        w, scale, static, smooth, own_bias = (getattr(own, f"{name}{i}", None) for name in "wsxmb")
        y: Tensor = torch.ops.qfx.linear(x, w, scale, None, own_bias, static, None, smooth, "i8", "i8/ch")
        return y

    def run(own: Any, x: Tensor) -> Any:
        return tuple(one(own, x, i) for i in range(len(scales)))

    model = Function(run)
    for name, tensor in held.items():
        model.register_buffer(name, tensor)
    return model.to(DEVICE)


@pytest.mark.parametrize(
    ("model", "groups", "left"),
    [
        (linears((0.02, 0.02, 0.02)), 1, 1),
        (linears((0.02, 0.03, 0.02)), 1, 2),  # another fixed scale
        (linears((0.02, 0.03)), 0, 2),
        (linears((0.02, 0.02), smooth=(1.5, 1.5)), 1, 1),
        (linears((0.02, 0.02), smooth=(1.5, 1.6)), 0, 2),
        (linears((0.02, 0.02, 0.02), bias=1), 1, 1),
    ],
)
def test_fixed_scales_and_factors_have_to_be_equal(model: nn.Module, groups: int, left: int) -> None:
    gm, count = after(merge_siblings, model, inputs())
    assert (count, counts(gm)["linear"]) == (groups, left)
    assert error(model(inputs()), outputs(gm, inputs())) == 0.0


def test_one_weight_read_twice_is_not_laid_below_itself() -> None:
    layer = nn.Linear(K, 8, device=DEVICE)
    model = Function(lambda own, x: (own.fc(x), own.fc(x) + 1), fc=layer)
    gm = quantized(model, inputs())
    assert counts(ran(gm, merge_siblings)) == counts(gm)


def test_the_report_names_every_linear() -> None:
    gm = quantized(Gated(), inputs())
    lowered = lower(gm)
    products = ("linear", "linear_1", "linear_2", "linear_3", "add")
    assert {lowered.kernels[name] for name in products} == {"gemm8 i8/tok x i8/ch (Triton)"}
    assert lowered.kernels["rms_norm"] == "norm_quantize (Triton)"
    assert lowered.kernels["silu"] == lowered.kernels["mul"] == "act_quantize (Triton)"
    assert error(outputs(gm, inputs()), list(lowered(inputs()))) < 5e-3
