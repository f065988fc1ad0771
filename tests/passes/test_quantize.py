"""qfx.passes.quantize: annotated nodes become qfx:: ops with packed weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import qfx.ops.floats  # noqa: F401  (registers torch.ops.qfx.grouped_linear)
from qfx import annotation, graph, run
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.packing import Packed, pack_weight
from qfx.passes.quantize import quantize, refuse, weight_value
from tests.graphs import Function, calls, capture, counts, error, text

BEFORE = """\
%ids: i64[2,3] = input
%embedding: f32[2,3,4] = aten.embedding(@embed.weight, %ids)  # w=i8/ch
%linear: f32[2,3,4] = aten.linear(%embedding, @fc.weight, @fc.bias)  # x=u8 w=u4/g2
%linear_1: f32[2,3,9] = aten.linear(%linear, @embed.weight)  # w=i8/ch
return [%linear_1]
"""
AFTER = """\
%ids: i64[2,3] = input
%embedding: f32[2,3,4] = qfx.embedding(%ids, @embed.w_codes, @embed.w_scale, None, i8/ch, 4, f32)  # w=i8/ch
%linear: f32[2,3,4] = qfx.linear(%embedding, @fc.w_codes, @fc.w_scale, @fc.w_zero, @fc.bias, @fc.x_scale, @fc.x_zero, \
None, u8, u4/g2)  # x=u8 w=u4/g2
%linear_1: f32[2,3,9] = qfx.linear(%linear, @embed.w_codes, @embed.w_scale, None, None, None, None, None, , i8/ch)  \
# w=i8/ch
return [%linear_1]
"""
STATIC = {"fc/x_scale": torch.tensor(0.02), "fc/x_zero": torch.tensor(128, dtype=torch.uint8)}


class Tied(nn.Module):
    """An embedding, a linear, and an lm_head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc, self.lm_head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.fc(self.embed(ids)))
        return out


IDS = torch.tensor([[0, 8, 3], [1, 1, 7]])


def annotated(model: nn.Module, *inputs: Any, **formats: str) -> fx.GraphModule:
    """The captured graph; formats by FQN (dots as __) or operator: "x=i8/tok w=i8/ch"."""
    gm = capture(model, *inputs)
    for node in calls(gm):
        asked = formats.get(graph.fqn_of(node).replace(".", "__"), formats.get(graph.op_name(node), ""))
        for word in asked.split():
            role, _, fmt = word.partition("=")
            annotation.set(node, role, Format.parse(fmt))
    return gm


def quantized(gm: fx.GraphModule, **options: Any) -> fx.GraphModule:
    """After the pass, as the runner leaves it."""
    run.run(gm, [lambda g: quantize(g, **{"tensors": {}, **options})])
    return gm


def linear(n: int = 48, k: int = 64, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return Function(lambda own, x: own.fc(x), fc=nn.Linear(k, n, **kwargs))


def sqnr(expected: Tensor, found: Tensor) -> float:
    return 10 * math.log10(float((expected.square().sum() / (found - expected).square().sum()).detach()))


def tensors_of(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(gm.named_parameters()), **dict(gm.named_buffers())}


# Text


def test_golden_text() -> None:
    gm = annotated(Tied(), IDS, embed="w=i8/ch", lm_head="w=i8/ch", fc="x=u8 w=u4/g2")
    assert text(gm) == BEFORE
    quantized(gm, tensors=STATIC)
    assert text(gm) == AFTER
    assert [graph.fqn_of(n) for n in calls(gm)] == ["embed", "fc", "lm_head"]
    assert all(n.meta["stack_trace"] and n.meta["nn_module_stack"] for n in calls(gm))


def test_nothing_to_do() -> None:
    gm = annotated(Tied(), IDS)
    before = text(gm)
    assert quantize(gm, tensors={}) is False and text(gm) == before and hasattr(gm.embed, "weight")
    gm = annotated(Tied(), IDS, fc="w=i8/ch")
    assert quantize(gm, tensors={}) is True
    assert quantize(gm, tensors={}) is False


# What the graph holds


def test_a_tied_weight_is_packed_once() -> None:
    model = Tied()
    gm = quantized(annotated(model, IDS, embed="w=i8/ch", lm_head="w=i8/ch"))
    assert sorted(tensors_of(gm)) == ["embed.w_codes", "embed.w_scale", "fc.bias", "fc.weight"]
    embedding, _, head = calls(gm)
    assert embedding.args[1:4] == head.args[1:4]


def test_weights_that_no_node_reads_are_let_go_of() -> None:
    model = Tied()
    gm = quantized(annotated(model, IDS, fc="w=i4/g128", lm_head="w=i8/ch"))
    assert sorted(tensors_of(gm)) == [
        *("embed.weight", "fc.bias", "fc.w_codes", "fc.w_scale", "lm_head.w_codes", "lm_head.w_scale")
    ]
    assert isinstance(model.fc.weight, nn.Parameter) and model.fc.weight.shape == (4, 4)
    assert graph.get_tensor(gm, "embed.weight") is model.embed.weight


def test_one_weight_in_two_formats() -> None:
    model = Function(lambda own, ids: F.linear(own.embed(ids), own.embed.weight), embed=nn.Embedding(9, 4))
    gm = quantized(annotated(model, IDS, embedding="w=i8/ch", linear="w=i4/g4"))
    assert sorted(tensors_of(gm)) == ["embed.w_codes", "embed.w_codes_1", "embed.w_scale", "embed.w_scale_1"]
    assert [graph.fqn_of(n) for n in calls(gm)] == ["embed", "embed"]
    assert error(model(IDS), gm(IDS)[0]) < 0.2


def test_one_weight_from_both_sides() -> None:
    """An autoencoder with tied weights reads its matrix as it is and transposed."""
    model = Function(lambda own, x: F.linear(F.linear(x, own.w), own.w.t()), w=torch.randn(3, 4))
    gm = quantized(annotated(model, torch.randn(2, 4), linear="w=i8/ch"))
    assert sorted(tensors_of(gm)) == ["w_w_codes", "w_w_codes_1", "w_w_scale", "w_w_scale_1"]
    x = torch.randn(2, 4)
    assert error(model(x), gm(x)[0]) < 0.02


def test_names_of_the_model_are_not_taken() -> None:
    fc = nn.Linear(4, 4)
    fc.register_parameter("w_scale", nn.Parameter(torch.ones(())))
    model = Function(lambda own, x: own.fc(x) * own.fc.w_scale, fc=fc)
    gm = quantized(annotated(model, torch.randn(2, 4), fc="w=i8/ch"))
    assert sorted(tensors_of(gm)) == ["fc.bias", "fc.w_codes", "fc.w_scale", "fc.w_scale_1"]
    x = torch.randn(2, 4)
    assert error(model(x), gm(x)[0]) < 0.02


def test_a_bare_linear() -> None:
    gm = quantized(annotated(nn.Linear(4, 3), torch.randn(2, 4), weight="x=i8/tok w=i8/ch"))
    assert sorted(tensors_of(gm)) == ["bias", "w_codes", "w_scale"]
    assert [graph.fqn_of(n) for n in calls(gm)] == ["weight"]


def test_packed_weights_can_be_shared_between_graphs() -> None:
    model, kept, asked = Tied(), {}, []

    def pack(weight: Tensor, fmt: Format, name: str) -> Packed:
        asked.append(name)
        if name not in kept:
            kept[name] = pack_weight(weight, fmt, name=name)
        return kept[name]

    one, two = (quantized(annotated(model, ids, fc="w=i8/ch"), pack=pack) for ids in (IDS, IDS[:1]))
    assert asked == ["fc", "fc"]
    assert graph.get_tensor(one, "fc.w_codes") is graph.get_tensor(two, "fc.w_codes")


def test_rounding_is_handed_on() -> None:
    model, x = linear(), torch.randn(8, 64)
    exact = model(x)
    found = [sqnr(exact, quantized(annotated(model, x, fc="w=i3/g64"), rounding=r)(x)[0]) for r in ("rtn", "mse")]
    assert found[1] > found[0] + 0.3


# Numbers


WEIGHT_ONLY = {"f32": math.inf, "f16": 60, "i8/ch": 40, "u8/g32": 40, "i6/g32": 28, "f8e4m3/ch": 27, "i4/g32": 17}
WEIGHT_ONLY |= {"i4/b16x32": 15, "nf4/g32": 18, "f4e2m1/g32/e8m0": 16, "f4e2m1/g16/e4m3": 17, "i3/g16": 12, "u2/g16": 6}


@pytest.mark.parametrize("fmt", WEIGHT_ONLY)
@torch.no_grad()
def test_weight_only(fmt: str) -> None:
    """What comes out is the float linear of the rounded weight."""
    model, x = linear(), torch.randn(2, 5, 64)
    exact = model(x)
    found = quantized(annotated(model, x, fc=f"w={fmt}"))(x)[0]
    weight, bias = model.fc.weight, model.fc.bias  # type: ignore[union-attr]
    rounded = F.linear(x, fake_quantize(weight, Format.parse(fmt)), bias)  # type: ignore[arg-type]
    assert error(rounded, found) < 1e-6
    assert fmt == "f32" or sqnr(exact, found) > WEIGHT_ONLY[fmt]


BOTH = {"x=i8/tok w=i8/ch": 38, "x=i8/dyn w=i8/ch": 36, "x=u8/dyn w=u8/ch": 36, "x=i4/tok w=i8/ch": 14}
BOTH |= {"x=f8e4m3/tok w=f8e4m3/ch": 24, "x=i8/tok w=i4/g32": 17, "x=i8/g32/dyn w=i8/g32": 38, "x=bf16 w=i8/ch": 38}


@pytest.mark.parametrize("formats", BOTH)
@torch.no_grad()
def test_dynamic_inputs(formats: str) -> None:
    model, x = linear(bias=False), torch.randn(2, 5, 64)
    assert sqnr(model(x), quantized(annotated(model, x, fc=formats))(x)[0]) > BOTH[formats]


@settings(deadline=None, max_examples=15)
@given(
    x_fmt=st.sampled_from(["", "i8/tok", "i8/dyn", "u8"]),
    w_fmt=st.sampled_from(["i8/ch", "u8/ch", "i8"]),
    n=st.integers(1, 6),
    k=st.integers(1, 9),
)
def test_codes_are_computed_exactly(x_fmt: str, w_fmt: str, n: int, k: int) -> None:
    """Values on the grid of both formats come out exactly: nothing but rounding to the grid loses anything."""
    generator = torch.Generator().manual_seed(n * 10 + k)
    weight = torch.randint(-127, 128, (n, k), generator=generator).float()
    x = torch.randint(-127, 128, (3, k), generator=generator).float()
    weight[:, 0], x[:, 0] = 127, -127
    if "u8" in w_fmt:
        weight[:, -1] = -128 if k > 1 else 0
        weight[:, 0] = 127 if k > 1 else 255
    model = Function(lambda own, value: F.linear(value, own.w), w=weight)
    tensors = {"w/x_scale": torch.tensor(1.0), "w/x_zero": torch.tensor(128, dtype=torch.uint8)}
    gm = quantized(annotated(model, x, w=f"w={w_fmt}" + (f" x={x_fmt}" if x_fmt else "")), tensors=tensors)
    assert torch.equal(gm(x)[0], x @ weight.t())


@torch.no_grad()
def test_static_inputs() -> None:
    model, x = linear(), torch.randn(6, 64)
    scale, zero = torch.tensor(8 / 255), torch.tensor(128, dtype=torch.uint8)
    gm = quantized(annotated(model, x, fc="x=u8 w=i8/ch"), tensors={"fc/x_scale": scale, "fc/x_zero": zero})
    assert graph.get_tensor(gm, "fc.x_scale") is scale and graph.get_tensor(gm, "fc.x_zero") is zero
    assert 30 < sqnr(model(x), gm(x)[0]) < 60
    far = sqnr(model(10 * x), gm(10 * x)[0])
    assert far < 5, "a static range saturates"
    gm = quantized(annotated(model, x, fc="x=i8 w=i8/ch"), tensors={"fc/x_scale": scale})
    assert calls(gm)[0].args[6] is None and sqnr(model(x), gm(x)[0]) > 30


def test_calls_of_one_layer_share_their_scale() -> None:
    model = Function(lambda own, x: own.fc(own.fc(x)), fc=nn.Linear(4, 4))
    gm = quantized(annotated(model, torch.randn(2, 4), fc="x=u8 w=i8/ch"), tensors=STATIC)
    first, second = calls(gm)
    assert first.args[1:] == second.args[1:] and len(tensors_of(gm)) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_types_of_activations_stay(dtype: torch.dtype) -> None:
    model, x = linear().to(dtype), torch.randn(3, 64, dtype=dtype)
    gm = quantized(annotated(model, x, fc="x=i8/tok w=i8/ch"))
    found = gm(x)[0]
    assert found.dtype == dtype and calls(gm)[0].meta["val"].dtype == dtype and sqnr(model(x).double(), found) > 35


def test_transposed_and_three_dimensional_weights() -> None:
    offs = torch.tensor([2, 5], dtype=torch.int32)

    def forward(own: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.addmm(own.b, x, own.w), torch.ops.qfx.grouped_linear(x, own.experts.transpose(1, 2), offs)

    from qfx.passes.linear import linear as to_linear

    torch.manual_seed(0)
    model = Function(forward, w=torch.randn(16, 6), b=torch.randn(6), experts=torch.randn(2, 16, 7))
    gm, x = capture(model, torch.randn(5, 16)), torch.randn(5, 16)
    run.run(gm, [to_linear])
    for node in calls(gm):
        if graph.op_name(node) in ("linear", "grouped_linear"):
            annotation.set(node, "w", Format.parse("i8/g8"))
            annotation.set(node, "x", Format.parse("i8/tok"))
    quantized(gm)
    assert counts(gm) == {"linear": 1, "grouped_linear_quant": 1}
    assert graph.get_tensor(gm, "w_w_codes").shape == (6, 16)
    assert graph.get_tensor(gm, "experts_w_codes").shape == (2, 7, 16)
    assert [graph.fqn_of(n) for n in calls(gm)] == ["w", "experts"]
    for expected, found in zip(model(x), gm(x), strict=True):
        assert sqnr(expected, found) > 35


def test_the_value_of_a_weight_operand() -> None:
    model = Function(lambda own, x: F.linear(x, own.w.t().reshape(8, 2).to(torch.float64)), w=torch.randn(4, 4))
    gm = capture(model, torch.randn(3, 2, dtype=torch.float64))
    operand = calls(gm)[-1].args[1]
    assert isinstance(operand, fx.Node)
    found = weight_value(gm, operand)
    assert torch.equal(found, model.w.t().reshape(8, 2).double()) and not found.requires_grad  # type: ignore[operator]


# Smoothing


def smoothed(function: Callable[..., Tensor] | None = None, **tensors: Tensor) -> nn.Module:
    torch.manual_seed(0)
    forward = function or (lambda own, x: F.linear(x / own.fc_smooth, own.w))
    return Function(forward, w=torch.randn(5, 8), **{"fc_smooth": torch.rand(8) + 0.5, **tensors})


@pytest.mark.parametrize("formats", ["w=i8/ch", "x=i8/tok w=i8/ch", "x=u8 w=i8/ch"])
@torch.no_grad()
def test_a_division_by_smooth_goes_into_the_op(formats: str) -> None:
    model, x = smoothed(), torch.randn(2, 3, 8)
    tensors = {"w/x_scale": torch.tensor(0.05), "w/x_zero": torch.tensor(128, dtype=torch.uint8)}
    gm = quantized(annotated(model, x, w=formats), tensors=tensors)
    assert counts(gm) == {"linear": 1} and str(calls(gm)[0].args[7]) == "p_fc_smooth"
    assert sqnr(model(x), gm(x)[0]) > 28


@pytest.mark.parametrize(
    "model",
    [
        smoothed(lambda own, x: F.linear(x / own.other, own.w), other=torch.rand(8) + 0.5),
        smoothed(fc_smooth=torch.rand(1, 1, 8) + 0.5),
        smoothed(fc_smooth=torch.rand(1) + 0.5),
        smoothed(fc_smooth=torch.tensor(0.5)),
        smoothed(lambda own, x: F.linear(x.to(torch.bfloat16) / own.fc_smooth, own.w)),
        smoothed(lambda own, x: F.linear(x * own.fc_smooth, own.w)),
    ],
)
@torch.no_grad()
def test_other_divisions_stay(model: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    gm = quantized(annotated(model, x, w="x=i8/tok w=i8/ch"))
    assert calls(gm)[-1].args[7] is None and len(calls(gm)) >= 2
    assert sqnr(model(x), gm(x)[0]) > 35


# Refusals


def test_a_static_format_without_a_scale_is_refused() -> None:
    gm = annotated(linear(), torch.randn(2, 64), fc="x=u8 w=i8/ch")
    with pytest.raises(UnsupportedError, match=r"(?s)x_scale of 'fc' for format 'u8'.*node: %linear.*data=") as caught:
        quantized(gm)
    assert "next step" in str(caught.value) and "return self.function" in str(caught.value)
    gm = annotated(linear(), torch.randn(2, 64), fc="x=u8 w=i8/ch")
    with pytest.raises(UnsupportedError, match="x_zero of 'fc'"):
        quantized(gm, tensors={"fc/x_scale": torch.tensor(1.0)})


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    model = Tied()
    model.fc.weight.data[1, 2] = bad
    with pytest.raises(ValueError, match=r"cannot quantize 'fc'.*not finite") as caught:
        quantized(annotated(model, IDS, embed="w=i8/ch", fc="w=i8/ch"))
    assert caught.value.__notes__ == ["in pass '<lambda>' (1 of 1; ran: none)"]


def test_formats_that_no_weight_can_have_are_refused() -> None:
    for fmt in ("i8/tok", "i8/dyn", "i8/head"):
        with pytest.raises(ValueError, match=r"(?s)cannot store the weight 'fc'.*next step: write 'i8/ch'"):
            quantized(annotated(linear(), torch.randn(2, 64), fc=f"w={fmt}"))


def test_what_no_op_serves_is_told_and_taken_off() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        y = F.linear(own.fc(own.conv(x).flatten(2)), own.w)
        out: Tensor = F.scaled_dot_product_attention(y, y, y)
        return out

    model = Function(forward, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(36, 8), w=torch.randn(5, 8))
    asked = {"conv": "x=i8/dyn w=i8/ch", "scaled_dot_product_attention": "q=i8/head p=u8"}
    gm = annotated(model, torch.randn(1, 3, 8, 8), fc="x=i8/tok w=i8/ch y=i8", w="x=i8/tok", **asked)
    notes = refuse(gm)
    assert [(n.node, n.reason.split(", but ")[0]) for n in notes] == [
        ("conv", "x=i8/dyn w=i8/ch was asked"),
        ("fc", "y=i8 was asked"),
        ("w", "x=i8/tok was asked"),
        ("scaled_dot_product_attention", "q=i8/head p=u8 was asked"),
    ]
    for note, reason in zip(
        notes, ("overlap", "role 'y'", "only where the weight is", "have not 4 dimensions"), strict=True
    ):
        assert reason in note.reason and "Recipe.ignore" in note.next_step and note.where
    assert [annotation.text(n) for n in calls(gm) if annotation.get(n)] == ["x=i8/tok w=i8/ch"]
    assert refuse(gm) == []
    quantized(gm)
    assert not any(annotation.get(n) and n.target.namespace != "qfx" for n in calls(gm))  # type: ignore[union-attr]


def test_experts_and_tables_take_what_their_ops_have() -> None:
    offs = torch.tensor([2, 3], dtype=torch.int32)
    model = Function(
        lambda own, ids: torch.ops.qfx.grouped_linear(own.embed(ids), own.w, offs),
        embed=nn.Embedding(9, 4), w=torch.randn(2, 5, 4),
    )  # fmt: skip
    gm = annotated(model, torch.tensor([1, 2, 3]), embed="x=i8/tok w=i8/ch", w="x=u8 w=i8/ch")
    assert [(n.node, n.reason) for n in refuse(gm)] == [
        ("embed", "x=i8/tok was asked, but no op takes a format for role 'x'"),
        ("w", "x=u8 was asked, but experts take only input formats whose scale is found at run time"),
    ]
    assert [annotation.text(n) for n in calls(gm)] == ["w=i8/ch", "w=i8/ch"]
    gm = annotated(model, torch.tensor([1, 2, 3]), embed="w=i8/ch", w="x=i8/tok w=i8/ch")
    assert refuse(gm) == []
