"""qfx.rounding.nearest: nearest, and clipped where that leaves less error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.packing import pack_weight
from qfx.rounding.nearest import round_weight

FORMATS = ["i4", "i4/ch", "i4/g16", "u4/g16", "i3/ch", "i2/g16", "i4/b8x16", "nf4/g16", "i4/g16/f16"]


def weight(*shape: int, seed: int = 0, outliers: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    return w * (1 + 4 * (torch.rand(shape, generator=generator) > 0.97)) if outliers else w


def squared_error(w: Tensor, fmt: str, method: str) -> float:
    packed = round_weight(w, Format.parse(fmt), method, name="w")
    return float((packed.dequantize() - w.float()).square().sum())


def test_nearest_is_pack_weight() -> None:
    w, fmt = weight(5, 40), Format.parse("i4/g16")
    packed, expected = round_weight(w, fmt, "rtn", name="w"), pack_weight(w, fmt)
    assert torch.equal(packed.data, expected.data) and torch.equal(packed.scale, expected.scale)
    assert packed.format == fmt and packed.shape == (5, 40)


@pytest.mark.parametrize("fmt", FORMATS)
def test_clipping_helps_a_weight_with_outliers(fmt: str) -> None:
    w = weight(16, 64, seed=1)
    assert squared_error(w, fmt, "mse") < 0.99 * squared_error(w, fmt, "rtn")


@settings(deadline=None, max_examples=30)
@given(
    fmt=st.sampled_from([*FORMATS, "f4e2m1/g16/e4m3", "f4e2m1/g32/e8m0", "f8e4m3/ch"]),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    outliers=st.booleans(),
)
def test_clipping_never_hurts(fmt: str, seed: int, rows: int, columns: int, outliers: bool) -> None:
    w = weight(rows, columns, seed=seed, outliers=outliers)
    assert squared_error(w, fmt, "mse") <= squared_error(w, fmt, "rtn")


def test_each_scale_is_clipped_by_itself() -> None:
    """A group of which every value counts stays as it is, beside one with an outlier."""
    w = torch.cat([torch.tensor([[1.0, -1.0] * 8]), weight(1, 16, seed=3)], -1)
    found = round_weight(w, Format.parse("i2/g16"), "mse", name="w")
    nearest = round_weight(w, Format.parse("i2/g16"), "rtn", name="w")
    assert found.scale[0, 0] == nearest.scale[0, 0] == 1.0
    assert found.scale[0, 1] < nearest.scale[0, 1]


def test_one_row_does_not_decide_for_a_scale_of_all_rows() -> None:
    """Rows that clipping alone would serve must not be clipped where the tensor's one scale stays."""
    w = torch.cat([torch.full((1, 64), 8.0), weight(7, 64)])
    assert squared_error(w, "i4", "mse") <= squared_error(w, "i4", "rtn")


def test_experts_are_rounded_one_by_one() -> None:
    w = weight(3, 4, 32)
    whole = round_weight(w, Format.parse("i4/g16"), "mse", name="w").dequantize()
    for e in range(3):
        assert torch.equal(whole[e], round_weight(w[e], Format.parse("i4/g16"), "mse", name="w").dequantize())


def test_the_weight_and_its_type_stay() -> None:
    w = weight(4, 32).to(torch.bfloat16).requires_grad_()
    before = w.detach().clone()
    packed = round_weight(w, Format.parse("i4/ch"), "mse", name="w")
    assert torch.equal(w, before) and not packed.data.requires_grad and not packed.scale.requires_grad


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_plain_formats_and_zeros(method: str) -> None:
    w = weight(4, 32)
    assert torch.equal(round_weight(w, Format.parse("f32"), method, name="w").data, w)
    zeros = round_weight(torch.zeros(4, 32), Format.parse("i4/g16"), method, name="w")
    assert torch.equal(zeros.dequantize(), torch.zeros(4, 32))


@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(method: str, bad: float) -> None:
    w = weight(4, 32)
    w[1, 2] = bad
    with pytest.raises(ValueError, match=r"(?s)layers\.3\.fc.*it is not finite"):
        round_weight(w, Format.parse("i4/g16"), method, name="layers.3.fc")


def test_an_unknown_method_is_a_fault() -> None:
    with pytest.raises(AssertionError, match="nearest"):
        round_weight(weight(4, 4), Format.parse("i4/ch"), "nearest", name="w")
