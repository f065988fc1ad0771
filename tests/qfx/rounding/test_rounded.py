"""`qfx.rounding.rounded`: weights that a plan carries rounded are taken as they are, by both doors."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qfx
from qfx.format import Format
from qfx.measuring.measure import sqnr_db
from qfx.packing import Packed, pack_weight
from qfx.rounding import rounded

FORMATS = ("i8/ch", "i4/g8", "u4/g8", "i3/ch", "u2/g8", "nf4/g8", "f4e2m1/g16/e4m3", "f8e4m3/ch", "bf16")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found


@pytest.mark.parametrize("text", FORMATS)
def test_what_was_put_is_got(text: str) -> None:
    fmt, tensors = Format.parse(text), dict[str, Tensor]()
    packed = pack_weight(torch.randn(3, 20), fmt)
    rounded.put(tensors, "a.b", packed)
    found = rounded.get(tensors, "a.b", fmt, (3, 20))
    assert found is not None and torch.equal(found.dequantize(), packed.dequantize())
    assert {name for name in tensors if not name.startswith("a.b/")} == set()
    assert rounded.get(tensors, "a", fmt, (3, 20)) is None, "another name"


@pytest.mark.parametrize("text", ["i8/ch", "u4/g8", "nf4/g8", "u2/g8/f16", "bf16"])
def test_matrices_of_groups_are_the_rows_of_one(text: str) -> None:
    fmt, tensors = Format.parse(text), dict[str, Tensor]()
    weight = torch.randn(4, 6, 16)
    rounded.put(tensors, "a", pack_weight(weight, fmt))
    for shape in ((4, 6, 16), (24, 16), (8, 3, 16)):
        found = rounded.get(tensors, "a", fmt, shape)
        assert found is not None and found.shape == shape
        wanted = pack_weight(weight.reshape(shape), fmt)
        assert torch.equal(found.dequantize(), wanted.dequantize()) and found.scale.shape == wanted.scale.shape
    with pytest.raises(ValueError, match="does not fit the model"):
        rounded.get(tensors, "a", fmt, (23, 16))


def test_matrices_of_groups_with_one_scale_are_not_one() -> None:
    tensors = dict[str, Tensor]()
    rounded.put(tensors, "a", pack_weight(torch.randn(4, 6, 16), Format.parse("i8")))
    with pytest.raises(ValueError, match="does not fit the model"):
        rounded.get(tensors, "a", Format.parse("i8"), (24, 16))


class Grouped(nn.Linear):
    """Two matrices in one weight, each for a half of the channels, as DeepSeek V4 has them."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(2, -1, x.shape[-1] // 2).transpose(1, 2)
        y = torch.bmm(x.unflatten(-1, (2, -1)).flatten(0, 1).transpose(0, 1), weight)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("recipe", ["w4a16-gptq", "w4a16-mse", "w4a16-learned"])
def test_a_weight_that_the_graph_reads_in_groups_is_rounded_by_data(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), Grouped(64, 48, bias=False)).eval()
    data, x = [torch.randn(8, 16, 64) for _ in range(4)], torch.randn(3, 5, 64)
    with torch.no_grad():
        wanted = model(x)
        small = qfx.quantize(model, recipe, data)
        assert sqnr_db(wanted, small(x)) > 15
    (row,) = [row for row in qfx.report(small).rows if row.node == "1"]
    assert row.quantized


@pytest.mark.parametrize("text", ["u2/g8", "u4/g8", "u6/g8"])
def test_a_byte_for_each_zero_point_is_read(text: str) -> None:
    """As plans of version 1 have them; it is packed on the way."""
    fmt, tensors = Format.parse(text), dict[str, Tensor]()
    packed = pack_weight(torch.randn(3, 40), fmt)
    zero = packed.params().zero
    assert zero is not None and zero.shape == (3, 5)
    rounded.put(tensors, "fc", replace(packed, zero=zero))
    found = rounded.get(tensors, "fc", fmt, (3, 40))
    assert found is not None and torch.equal(found.dequantize(), packed.dequantize())
    assert found.nbytes == packed.nbytes == fmt.nbytes((3, 40))
    tensors["fc/zero"] = torch.zeros(3, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="zero points do not fit format"):
        rounded.get(tensors, "fc", fmt, (3, 40))


def test_putting_again_leaves_nothing_of_the_earlier() -> None:
    tensors: dict[str, Tensor] = {}
    rounded.put(tensors, "fc", pack_weight(torch.randn(3, 16), Format.parse("u4/g8")))
    assert set(tensors) == {"fc/codes", "fc/scale", "fc/zero"}
    rounded.put(tensors, "fc", pack_weight(torch.randn(3, 16), Format.parse("i4/g8")))
    assert set(tensors) == {"fc/codes", "fc/scale"}


@given(st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 40))
def test_another_format_or_shape_is_refused_or_stored_alike(one: str, other: str, k: int, wanted: int) -> None:
    tensors: dict[str, Tensor] = {}
    rounded.put(tensors, "fc", pack_weight(torch.ones(2, k), Format.parse(one)))
    fmt = Format.parse(other)
    found = None
    with suppress(ValueError):
        found = rounded.get(tensors, "fc", fmt, (2, wanted))
    assert (found is None) <= ((one, k) != (other, wanted)), "what was put is got"
    if found is None:
        return
    assert found.nbytes == fmt.nbytes((2, wanted))
    assert found.dequantize().shape == (2, wanted)


@pytest.mark.parametrize(
    ("fmt", "shape"),
    [("i4/g4", (2, 16)), ("u4/g8", (2, 16)), ("i4/g8/f16", (2, 16)), ("i4/g8", (4, 16)), ("i8/ch", (2, 16))],
)
def test_a_misfit_is_told_with_both(fmt: str, shape: tuple[int, int]) -> None:
    tensors: dict[str, Tensor] = {}
    rounded.put(tensors, "layers.0.fc", pack_weight(torch.randn(2, 16), Format.parse("i4/g8")))
    with pytest.raises(
        ValueError, match=r"'layers\.0\.fc' does not fit(.|\n)*expected: format(.|\n)*found: codes uint8\[2, 8\]"
    ):
        rounded.get(tensors, "layers.0.fc", Format.parse(fmt), shape)


def planned(model: Pair) -> qfx.Plan:
    return qfx.plan(model, "w4a16", [torch.randn(8, 16)], rules=({"target": "linear", "w": "i4/g8"},), progress=False)


def turned(model: Pair, plan: qfx.Plan) -> Tensor:
    """Put codes into the plan that no rounding method would choose, and give the weight they stand for."""
    fmt = Format.parse(plan.annotations["first"]["w"])
    nearest = pack_weight(model.first.weight, fmt)
    codes = (nearest.codes().to(torch.int16) - 1).clamp(-8, 7).to(torch.int8)
    packed = Packed.from_codes(codes, fmt, nearest.scale)
    rounded.put(plan.tensors, "first", packed)
    return packed.dequantize()


@torch.no_grad()
def test_both_doors_and_a_saved_plan_use_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Pair().eval(), torch.randn(64, 16)
    nearest = pack_weight(model.first.weight, Format.parse("i4/g8")).dequantize()
    plan = planned(model)
    expected = turned(model, plan)
    assert not torch.equal(expected, nearest)
    plan.save(tmp_path)
    options: dict[str, Any] = {"plan": qfx.Plan.load(tmp_path), "backend": "reference"}
    compiled = torch.compile(model, backend="qfx", options=options)
    by_compile = compiled(x)
    qfx.quantize(model, qfx.Plan.load(tmp_path))
    assert torch.equal(model.first.weight, expected)
    assert torch.allclose(by_compile, model(x), atol=1e-5)


def test_a_plan_for_other_shapes_is_refused() -> None:
    model = Pair()
    plan = planned(model)
    turned(model, plan)
    plan.tensors["first/scale"] = plan.tensors["first/scale"][:, :1]
    with pytest.raises(ValueError, match="rounded weight of 'first'"):
        qfx.quantize(model, plan)
    assert isinstance(model.first, nn.Linear), "nothing was changed"
