"""Float types and reduced scales: other people's codes, golden values, bounds."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.numerics import (
    F4_VALUES,
    NF4_VALUES,
    _below,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from tests.qfx.test_numerics import GRANULARITIES, F, arrays, full_scale

ML_DTYPES = {
    "f4e2m1": ml_dtypes.float4_e2m1fn,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("kind", list(ML_DTYPES))
def test_float_codes_are_those_of_ml_dtypes(kind: str) -> None:
    fmt = F(kind)
    random = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * fmt.qmax / 3
    ties = torch.arange(-60, 61) / 16.0  # every value, midpoint and quarter between
    x = torch.cat([random.clamp(fmt.qmin, fmt.qmax), ties, ties * fmt.qmax / 8, torch.tensor([0.0, -0.0])])
    x = x.clamp(fmt.qmin, fmt.qmax)
    ours = quantize(x, fmt, torch.ones(())).view(torch.uint8).numpy()
    theirs = x.numpy().astype(ML_DTYPES[kind]).view(np.uint8)
    assert (ours == theirs).all()


@pytest.mark.parametrize("kind", list(ML_DTYPES))
def test_float_values_are_those_of_ml_dtypes(kind: str) -> None:
    fmt = F(kind)
    raw = np.arange(16 if fmt.bits == 4 else 256, dtype=np.uint8)
    theirs = raw.view(ML_DTYPES[kind]).astype(np.float32)
    ours = dequantize(torch.from_numpy(raw).view(fmt.code_dtype), fmt, torch.ones(())).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("kind", list(ML_DTYPES))
def test_floats_saturate(kind: str) -> None:
    fmt = F(kind)
    x = torch.tensor([fmt.qmax * 1.5, -fmt.qmax * 4.0, 1e30, math.inf, -math.inf])
    back = dequantize(quantize(x, fmt, torch.ones(())), fmt, torch.ones(()))
    assert back.tolist() == [fmt.qmax, -fmt.qmax, fmt.qmax, fmt.qmax, -fmt.qmax]


@pytest.mark.parametrize("text", ["nf4/g64", "f4e2m1/g32/e8m0", "f8e4m3/ch"])
def test_the_default_device_of_torch_does_not_matter(text: str) -> None:
    fmt, w = Format.parse(text), torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):  # of a user who has a GPU it may be that
        params = choose_qparams(w, fmt)
        found = fake_quantize(w, fmt, params.scale, params.zero)
    assert torch.equal(found, fake_quantize(w, fmt, params.scale, params.zero))


def test_f4_table() -> None:
    assert F4_VALUES[:8] == (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    assert F4_VALUES[9:] == tuple(-v for v in F4_VALUES[1:8])


def test_nf4_is_the_nearest_value() -> None:
    table = torch.tensor(NF4_VALUES)
    assert (len(NF4_VALUES), NF4_VALUES[0], NF4_VALUES[7], NF4_VALUES[15]) == (16, -1.0, 0.0, 1.0)
    x = torch.linspace(-1.2, 1.2, 5001)
    codes = quantize(x, F("nf4"), torch.ones(()))
    best = (x[:, None] - table).abs().amin(-1)
    assert torch.allclose((x - table[codes.long()]).abs(), best, atol=1e-7)
    assert quantize(table, F("nf4"), torch.ones(())).tolist() == list(range(16))


def test_float_scale_is_absmax_over_greatest_value() -> None:
    x = torch.tensor([[-896.0, 1.0], [3.0, 6.0]])
    assert choose_qparams(x, F("f8e4m3/ch")).scale.flatten().tolist() == pytest.approx([2.0, 6 / 448])
    assert choose_qparams(x, F("nf4/ch")).scale.flatten().tolist() == [896.0, 6.0]
    assert choose_qparams(x, F("f4e2m1")).scale.item() == pytest.approx(896 / 6)


@settings(deadline=None)
@given(arrays(), st.sampled_from(["nf4", "f4e2m1", "f8e4m3", "f8e5m2"]), st.sampled_from(GRANULARITIES))
def test_float_error_bound(x: Tensor, kind: str, granularity: str) -> None:
    """Half the widest gap of the type: absolute for the 4-bit tables, relative for fp8."""
    fmt = F(kind + granularity)
    scale, zero = choose_qparams(x, fmt)
    error = (dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero) - x).abs()
    step = full_scale(x, fmt, scale, zero)
    gap = {"nf4": 0.1521, "f4e2m1": 1.0, "f8e4m3": 2.0**-9, "f8e5m2": 2.0**-16}[kind]
    relative = {"f8e4m3": 2.0**-4, "f8e5m2": 2.0**-3}.get(kind, 1e-6)
    assert (error <= step * gap * 1.001 + x.abs() * relative * 1.001).all()


# ---- power-of-two and two-level scales


@pytest.mark.parametrize(
    ("text", "absmax", "expected"),
    [
        ("f4e2m1/g4/e8m0", 6.0, 1.0),
        ("f4e2m1/g4/e8m0", 4.0, 1.0),
        ("f4e2m1/g4/e8m0", 7.9, 1.0),
        ("f4e2m1/g4/e8m0", 8.0, 2.0),
        ("f4e2m1/g4/e8m0", 3.99, 0.5),
        ("f8e4m3/g4/e8m0", 448.0, 1.0),
        ("f8e4m3/g4/e8m0", 512.0, 2.0),
        ("f8e5m2/g4/e8m0", 32768.0, 1.0),
        ("i8/g4/e8m0", 1.0, 2.0**-6),
        ("i8/g4/e8m0", 1.99, 2.0**-6),
        ("nf4/g4/e8m0", 1.0, 1.0),
        ("nf4/g4/e8m0", 1.01, 2.0),
        ("u8/g4/e8m0", 255.0, 1.0),
        ("u8/g4/e8m0", 256.0, 2.0),
    ],
)
def test_e8m0_scale(text: str, absmax: float, expected: float) -> None:
    x = torch.tensor([[absmax, absmax / 3, 0.0, absmax / 7]])
    assert choose_qparams(x, F(text)).scale.float().item() == expected


def test_e8m0_scales_over_the_whole_range_of_exponents() -> None:
    exponents = torch.arange(-120, 124)
    x = torch.tensor([2.0**e for e in exponents.tolist()], dtype=torch.float64).float()[:, None]
    scale = choose_qparams(x, F("f4e2m1/ch/e8m0")).scale
    ours = scale.view(torch.uint8).flatten()
    assert (ours == exponents - 2 + 127).all()
    theirs = (x.numpy() / 4).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert (ours.numpy() == theirs.ravel()).all()


def test_mxfp4_golden() -> None:
    """A block as in the OCP specification: the greatest exponent decides, what lies above 6 saturates."""
    x = torch.tensor([[7.5, -1.3, 0.2, 5.0]])
    fmt = F("f4e2m1/g4/e8m0")
    scale, zero = choose_qparams(x, fmt)
    assert dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero).tolist() == [[6.0, -1.5, 0.0, 4.0]]


def test_nvfp4_has_two_levels() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    fmt = F("f4e2m1/g16/e4m3")
    scale, whole = choose_qparams(x, fmt)
    assert whole is not None
    assert (scale.shape, scale.dtype, whole.shape, whole.dtype) == ((8, 4), torch.float8_e4m3fn, (), torch.float32)
    assert whole.item() == pytest.approx(x.abs().max().item() / (6 * 448))
    assert scale.float().max() == 448
    error = (fake_quantize(x, fmt) - x).norm() / x.norm()
    fine = (fake_quantize(x, F("f4e2m1/g16")) - x).norm() / x.norm()
    assert error < fine * 1.05  # e4m3 scales cost next to nothing because of the global one


def test_half_precision_scales_saturate() -> None:
    x = torch.tensor([[1e30, 1.0], [1e-30, 0.0]])
    scale = choose_qparams(x, F("i8/ch/f16")).scale
    assert scale.flatten().tolist() == [65504.0, 2.0**-24]
    assert torch.isfinite(fake_quantize(x, F("i8/ch/f16"))).all()


@pytest.mark.parametrize("fmt", ["nf4/g64", "f4e2m1/g32"])
def test_many_values_have_the_codes_of_few(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are encoded by cells: at each middle, beside it, and beyond the ends, it is torch.bucketize."""
    seen = []

    def below(x: Tensor, middles: Tensor) -> Tensor:
        found = _below(x, middles)
        edges = torch.cat([middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(torch.tensor(-9.0))])
        own = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e30, -1e30, middles[0] - 1e-6])
        special = torch.cat([edges, own]).repeat(200).reshape(2, -1)
        assert special.numel() > 4096
        for values in (x, special):
            fast = _below(values, middles)
            assert fast.dtype == torch.int32
            assert torch.equal(fast, torch.bucketize(values, middles, out_int32=True))
        seen.append(found.numel())
        return found

    monkeypatch.setattr("qfx.numerics._below", below)
    parsed = Format.parse(fmt)
    weight = torch.randn(128, 640, generator=torch.Generator().manual_seed(0))
    params = choose_qparams(weight, parsed)
    whole = quantize(weight, parsed, *params)
    few = torch.cat([quantize(row[None], parsed, params.scale[i : i + 1], None) for i, row in enumerate(weight)])
    assert torch.equal(whole, few)
    assert seen == [128 * 640, *[640] * 128]
