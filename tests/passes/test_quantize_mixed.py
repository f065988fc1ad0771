"""qfx.passes.quantize: weights of several formats, by rows and by columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from qfx import annotation, graph, run
from qfx.annotation import Columns, Formats
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.packing import pack_weight
from qfx.passes.quantize import refuse
from qfx.reporting.sqnr import compare
from tests.graphs import Function, calls, capture, counts, error, text
from tests.passes.test_quantize import quantized

I4, I8, U4 = (Format.parse(t) for t in ("i4/g32", "i8/ch", "u4/g32"))
AFTER_ROWS = """\
%inputs_0: f32[2,64] = input
%linear: f32[2,6] = qfx.linear(%inputs_0, @fc.rows0_codes, @fc.rows0_scale, None, None, None, None, None, \
i8/tok, i4/g32)  # x=i8/tok w=i4/g32
%linear_1: f32[2,2] = qfx.linear(%inputs_0, @fc.rows1_codes, @fc.rows1_scale, None, None, None, None, None, \
i8/tok, i8/ch)  # x=i8/tok w=i8/ch
%slice_1: f32[2,2] = aten.slice.Tensor(%linear, 1, 0, 2)
%slice_2: f32[2,4] = aten.slice.Tensor(%linear, 1, 2, 6)
%cat: f32[2,8] = aten.cat([%slice_1, %linear_1, %slice_2], 1)
%add: f32[2,8] = aten.add.Tensor(%cat, @fc.bias)
return [%add]
"""
AFTER_COLUMNS = """\
%inputs_0: f32[2,64] = input
%slice_1: f32[2,32] = aten.slice.Tensor(%inputs_0, 1, 0, 32)
%linear: f32[2,8] = qfx.linear(%slice_1, @fc.columns0_codes, @fc.columns0_scale, None, @fc.bias, None, None, None, \
, i8/ch)  # w=i8/ch
%slice_2: f32[2,32] = aten.slice.Tensor(%inputs_0, 1, 32, 64)
%linear_1: f32[2,8] = qfx.linear(%slice_2, @fc.columns1_codes, @fc.columns1_scale, None, None, None, None, None, \
, i4/g32)  # w=i4/g32
%add: f32[2,8] = aten.add.Tensor(%linear, %linear_1)
return [%add]
"""


def linear(n: int = 8, k: int = 64, *, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return Function(lambda own, x: own.fc(x), fc=nn.Linear(k, n, bias=bias))


def annotated(model: nn.Module, x: Tensor, w: Formats, x_format: str = "") -> fx.GraphModule:
    gm = capture(model, x)
    for node in calls(gm, "linear"):
        annotation.set(node, "w", w)
        if x_format:
            annotation.set(node, "x", Format.parse(x_format))
    return gm


def rounded(weight: Tensor, formats: Formats) -> Tensor:
    """Each part of the weight rounded alone."""
    axis = 1 if isinstance(formats, Columns) else 0
    each: Any = formats.formats if isinstance(formats, Columns) else formats
    parts = weight.detach().chunk(len(each), axis)
    return torch.cat([fake_quantize(p, fmt) for p, fmt in zip(parts, each, strict=True)], axis)


def test_golden_rows() -> None:
    gm = quantized(annotated(linear(), torch.randn(2, 64), (I4, I8, I4, I4), "i8/tok"))
    assert text(gm) == AFTER_ROWS


def test_golden_columns() -> None:
    gm = quantized(annotated(linear(), torch.randn(2, 64), Columns((I8, I4))))
    assert text(gm) == AFTER_COLUMNS


def test_every_part_is_called_as_the_weight_was() -> None:
    for formats in ((I4, I8), Columns((I4, I8))):
        gm = quantized(annotated(linear(), torch.randn(2, 64), formats))
        assert {graph.fqn_of(n) for n in calls(gm, "linear")} == {"fc"}
        assert not hasattr(gm.fc, "weight")
    bare = nn.Linear(64, 8)
    gm = quantized(annotated(bare, torch.randn(2, 64), (I4, I8)))
    assert [graph.fqn_of(n) for n in calls(gm, "linear")] == ["weight"] * 2 and hasattr(gm, "rows0_codes")
    own = Function(lambda own, x: F.linear(x, own.w), w=torch.randn(8, 64))
    gm = quantized(annotated(own, torch.randn(2, 64), (I4, I8)))
    assert [graph.fqn_of(n) for n in calls(gm, "linear")] == ["w"] * 2 and hasattr(gm, "w_rows1_codes")


@settings(deadline=None, max_examples=30)
@given(
    formats=st.lists(st.sampled_from([I4, I8, U4, Format.parse("i8"), Format.parse("bf16")]), min_size=1, max_size=6),
    width=st.one_of(st.integers(1, 40), st.sampled_from([32, 64])),
    columns=st.booleans(),
    bias=st.booleans(),
)
@torch.no_grad()
def test_the_result_is_that_of_the_parts_rounded_alone(
    formats: list[Format], width: int, columns: bool, bias: bool
) -> None:
    """For any width: groups that do not divide the columns are padded. Neighbours of one format share scales."""
    formats = [fmt for i, fmt in enumerate(formats) if not i or fmt != formats[i - 1]]
    w: Formats = Columns(tuple(formats)) if columns else tuple(formats)
    size = width * len(formats)
    model = linear(*((5, size) if columns else (size, 37)), bias=bias)
    x = torch.randn(2, 3, size if columns else 37)
    gm = quantized(annotated(model, x, w))
    assert error(F.linear(x, rounded(model.fc.weight, w), model.fc.bias), gm(x)[0]) < 2e-6


def test_more_bits_on_some_rows_help_those_rows_only() -> None:
    model, x = linear(), torch.randn(50, 64)
    exact = model(x)
    plain, mixed = (quantized(annotated(model, x, w))(x)[0] for w in (I4, (I8, I4)))
    assert error(exact[:, :4], mixed[:, :4]) < error(exact[:, :4], plain[:, :4]) / 5
    assert torch.equal(mixed[:, 4:], plain[:, 4:])


@torch.no_grad()
def test_rows_round_the_input_alike() -> None:
    """With a scale per token the parts see the codes that one linear would see."""
    model, x = linear(), torch.randn(5, 64)
    i6 = Format.parse("i6/ch")
    gm = quantized(annotated(model, x, (I8, i6), "i8/tok"))
    for fmt, part in ((I8, slice(0, 4)), (i6, slice(4, 8))):
        whole = quantized(annotated(model, x, fmt, "i8/tok"))(x)[0]
        assert error(whole[:, part], gm(x)[0][:, part]) < 1e-6


@pytest.mark.parametrize("formats", [(I4, I8), Columns((I4, I8))])
@pytest.mark.parametrize("x_format", ["i8", "u8"])
@torch.no_grad()
def test_static_inputs(formats: Formats, x_format: str) -> None:
    model, x = linear(), torch.randn(6, 64)
    tensors = {"fc/x_scale": torch.tensor(8 / 255), "fc/x_zero": torch.tensor(128, dtype=torch.uint8)}
    gm = quantized(annotated(model, x, formats, x_format), tensors=tensors)
    assert graph.get_tensor(gm, "fc.x_scale") is tensors["fc/x_scale"]
    assert error(F.linear(x, rounded(model.fc.weight, formats), model.fc.bias), gm(x)[0]) < 0.02
    with pytest.raises(UnsupportedError, match="x_scale of 'fc'"):
        quantized(annotated(model, x, formats, x_format))


@torch.no_grad()
def test_a_static_scale_for_each_column_is_cut_with_the_columns() -> None:
    model, x = linear(), torch.randn(6, 64) * torch.linspace(0.01, 3, 64)
    scale = x.abs().amax(0) / 127
    w = Columns((I8, Format.parse("i8/g32")))
    gm = quantized(annotated(model, x, w, "i8/ch"), tensors={"fc/x_scale": scale})
    assert error(model(x), gm(x)[0]) < 0.02


@pytest.mark.parametrize("formats", [(I4, I8), Columns((I4, I8))])
@torch.no_grad()
def test_smoothed_inputs(formats: Formats) -> None:
    torch.manual_seed(0)
    model: Any = Function(
        lambda own, x: F.linear(x / own.fc_smooth, own.w), w=torch.randn(8, 64), fc_smooth=torch.rand(64) + 0.5
    )
    x = torch.randn(3, 64)
    gm = quantized(annotated(model, x, formats))
    assert error(F.linear(x / model.fc_smooth, rounded(model.w, formats)), gm(x)[0]) < 2e-6
    assert counts(gm).get("div", 0) == (1 if isinstance(formats, Columns) else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_types_of_activations_stay(dtype: torch.dtype) -> None:
    model, x = linear().to(dtype), torch.randn(3, 64, dtype=dtype)
    for formats in ((I8, Format.parse("u8/ch")), Columns((I8, Format.parse("u8/ch")))):
        found = quantized(annotated(model, x, formats))(x)[0]
        assert found.dtype == dtype and error(model(x), found) < 0.02


def test_a_layer_called_twice_is_packed_once() -> None:
    model = Function(lambda own, x: own.fc(own.fc(x)), fc=nn.Linear(64, 64))
    gm = quantized(annotated(model, torch.randn(2, 64), (I4, I8)))
    assert len(calls(gm, "linear")) == 4 and len(dict(gm.named_buffers())) == 4


def test_one_weight_in_two_cuts() -> None:
    """Formats decide, not names: the second cut of one weight does not take the first one's codes."""
    model: Any = Function(lambda own, x: own.fc(own.fc(x)), fc=nn.Linear(64, 64))
    gm = capture(model, torch.randn(2, 64))
    for node, formats in zip(calls(gm, "linear"), ((I4, I8), (I8, I4)), strict=True):
        annotation.set(node, "w", formats)
    quantized(gm)
    x = torch.randn(2, 64)
    with torch.no_grad():
        one, two = (rounded(model.fc.weight, f) for f in ((I4, I8), (I8, I4)))
        bias: Any = model.fc.bias
        assert error(F.linear(F.linear(x, one, bias), two, bias), gm(x)[0]) < 2e-6
    assert {graph.fqn_of(n) for n in calls(gm, "linear")} == {"fc"}


def test_transposed_weights() -> None:
    from qfx.passes.linear import linear as to_linear

    model: Any = Function(lambda own, x: torch.addmm(own.b, x, own.w), w=torch.randn(64, 8), b=torch.randn(8))
    x = torch.randn(5, 64)
    for formats in ((I4, I8), Columns((I4, I8))):
        gm = capture(model, x)
        run.run(gm, [to_linear])
        annotation.set(calls(gm, "linear")[0], "w", formats)
        with torch.no_grad():
            assert error(F.linear(x, rounded(model.w.t(), formats), model.b), quantized(gm)(x)[0]) < 2e-6


@torch.no_grad()
def test_the_error_is_measured_of_the_whole() -> None:
    model, x = linear(), torch.randn(9, 64)
    for formats in ((I4, I8, I4, I8), Columns((I4, I8))):
        plain = annotated(model, x, formats)
        other = quantized(graph.copy(plain))
        ((name, (signal, noise)),) = compare(plain, other, [x]).items()
        assert name == "fc" and 1e-6 < noise / signal < 0.02
        assert signal == pytest.approx(float(model(x).square().sum()), rel=1e-5)


def test_packing_is_asked_for_each_part() -> None:
    asked: list[tuple[tuple[int, ...], str, str]] = []

    def pack(weight: Tensor, fmt: Format, name: str) -> Any:
        asked.append((tuple(weight.shape), str(fmt), name))
        return pack_weight(weight, fmt, name=name)

    quantized(annotated(linear(), torch.randn(2, 64), (I4, I8, I4, I4)), pack=pack)
    assert asked == [((6, 64), "i4/g32", "fc.rows0"), ((2, 64), "i8/ch", "fc.rows1")]


# Refusals


def test_parts_that_do_not_fit_are_refused() -> None:
    for formats, what in (((I4, I8, I4), "8 output rows of 'fc'"), (Columns((I4,) * 5), "64 input columns of 'fc'")):
        with pytest.raises(ValueError, match=what):
            quantized(annotated(linear(), torch.randn(2, 64), formats))


def test_a_part_that_is_not_finite_is_named() -> None:
    model = linear()
    model.fc.weight.data[5, 3] = float("nan")
    with pytest.raises(ValueError, match=r"cannot quantize 'fc\.rows1'.*not finite"):
        quantized(annotated(model, torch.randn(2, 64), (I4, I8)))


def test_only_a_linear_takes_several_formats() -> None:
    model = Function(lambda own, ids: own.embed(ids), embed=nn.Embedding(8, 64))
    ids = torch.tensor([1, 2])
    gm = capture(model, ids)
    annotation.set(calls(gm, "embedding")[0], "w", (I4, I8))
    with pytest.raises(UnsupportedError, match=r"(?s)only the weight of a linear.*\[i4/g32,i8/ch\].*%embedding"):
        quantized(graph.copy(gm))
    (note,) = refuse(gm)
    assert note.node == "embed" and "w=[i4/g32,i8/ch] was asked, but only the weight of a linear" in note.reason
    assert quantized(gm)(ids)[0].equal(model(ids))


def test_an_input_takes_one_format() -> None:
    gm = annotated(linear(), torch.randn(2, 64), (I4, I8))
    annotation.set(calls(gm, "linear")[0], "x", [Format.parse("i8"), Format.parse("i4")])
    with pytest.raises(UnsupportedError, match=r"(?s)takes several formats.*x=\[i8,i4\].*%linear"):
        quantized(gm)
