"""Rounding, scales and codes of every format: golden values, bounds, other people's codes, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qfx.format import TYPES, Format
from qfx.numerics import (
    F4_VALUES,
    NF4_VALUES,
    choose_qparams,
    dequantize,
    effective_scale,
    fake_quantize,
    join,
    quantize,
    range_qparams,
    require_finite,
    split,
    spread,
    value_range,
)

F = Format.parse
SCALED = [t for t in TYPES if t not in ("f16", "bf16", "f32")]
INTEGERS = [t for t in SCALED if t[0] in "iu"]
GRANULARITIES = ["", "/ch", "/g4", "/b2x3"]
ML_DTYPES = {
    "f4e2m1": ml_dtypes.float4_e2m1fn,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
}


def arrays(limit: float = 2.0**100) -> st.SearchStrategy[Tensor]:
    elements = st.floats(-limit, limit, width=32, allow_subnormal=False)
    shapes = hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9)
    return hnp.arrays(np.float32, shapes, elements=elements).map(torch.from_numpy)


def full_scale(x: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The factor of each element of x."""
    ones = split(torch.ones_like(x), fmt)
    return join(ones * spread(effective_scale(scale, zero, fmt), fmt), fmt, x.shape)


# ---- integers


@settings(max_examples=200, deadline=None)
@given(arrays(), st.sampled_from(INTEGERS), st.sampled_from(GRANULARITIES))
def test_integer_error_is_half_a_step(x: Tensor, kind: str, granularity: str) -> None:
    fmt = F(kind + granularity)
    scale, zero = choose_qparams(x, fmt)
    assert scale.shape == fmt.scale_shape(x.shape)
    back = dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero)
    step = full_scale(x, fmt, scale, zero)
    assert ((back - x).abs() <= step * 0.5001 + x.abs() * 1e-6).all()


@settings(deadline=None)
@given(arrays(), st.sampled_from(INTEGERS), st.sampled_from(["/f16", "/bf16", "/e8m0"]))
def test_stored_scales_are_used_for_rounding(x: Tensor, kind: str, scale_type: str) -> None:
    fmt = F(kind + "/ch" + scale_type)
    scale, zero = choose_qparams(x, fmt)
    assert scale.dtype == fmt.scale_dtype
    codes = quantize(x, fmt, scale, zero)
    step = scale.float()
    inner = (codes > fmt.qmin) & (codes < fmt.qmax)
    error = (dequantize(codes, fmt, scale, zero) - x).abs()
    assert (error <= step * 0.5001 + x.abs() * 1e-6)[inner].all()


@settings(deadline=None)
@given(arrays(), st.sampled_from(SCALED), st.sampled_from(GRANULARITIES))
def test_zero_is_exact(x: Tensor, kind: str, granularity: str) -> None:
    x[..., 0] = 0.0
    fmt = F(kind + granularity)
    scale, zero = choose_qparams(x, fmt)
    assert (dequantize(quantize(x, fmt, scale, zero), fmt, scale, zero)[..., 0] == 0).all()


def test_symmetric_golden() -> None:
    x = torch.tensor([[-7.0, 3.5, 2.5, 0.5, 1.5]])
    scale, zero = choose_qparams(x, F("i4/ch"))
    assert zero is None
    assert scale.tolist() == [[1.0]]
    assert quantize(x, F("i4/ch"), scale).tolist() == [[-7, 4, 2, 0, 2]]  # halves go to even


def test_affine_golden() -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0]])
    scale, zero = choose_qparams(x, F("u2/ch"))
    assert zero is not None
    assert (scale.item(), zero.item(), zero.dtype) == (1.0, 1, torch.uint8)
    assert quantize(x, F("u2/ch"), scale, zero).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(("values", "zero"), [([2.0, 4.0], 0), ([-2.0, -4.0], 255), ([0.0, 0.0], 0)])
def test_affine_range_includes_zero(values: list[float], zero: int) -> None:
    x = torch.tensor([values])
    params = choose_qparams(x, F("u8/ch"))
    assert params.zero is not None and params.zero.item() == zero
    assert torch.allclose(fake_quantize(x, F("u8/ch")), x, rtol=4e-3)


def test_i8_has_no_minus_128() -> None:
    x = torch.tensor([-1e9, 1e9])
    assert quantize(x, F("i8"), torch.ones(())).tolist() == [-127, 127]
    assert quantize(x, F("i7"), torch.ones(())).tolist() == [-64, 63]
    assert quantize(x, F("u8"), torch.ones(()), torch.tensor(3, dtype=torch.uint8)).tolist() == [0, 255]


def test_halves_go_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, F("i8"), torch.ones(())).tolist() == [-2, -2, 0, 0, 2, 2]
    zero = torch.tensor(7, dtype=torch.uint8)
    assert quantize(x, F("u8"), torch.ones(()), zero).tolist() == [5, 5, 7, 7, 9, 9]


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("granularity", ["", "/ch", "/g4", "/b2x3"])
def test_all_zero_channels(kind: str, granularity: str) -> None:
    x = torch.zeros(4, 6)
    for scale_type in ["", "/f16", "/bf16", "/e8m0", *([] if kind[0] == "u" else ["/e4m3"])]:
        fmt = F(kind + granularity + scale_type)
        scale, zero = choose_qparams(x, fmt)
        assert (scale.float() == 1).all()
        codes = quantize(x, fmt, scale, zero)
        assert (codes.float() == (7 if kind == "nf4" else 0)).all()
        assert (dequantize(codes, fmt, scale, zero) == 0).all()


def test_a_zero_channel_among_others() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, -6.0]])
    scale, _ = choose_qparams(x, F("i3/ch"))
    assert scale.tolist() == [[1.0], [2.0]]


def test_subnormal_channels_become_zero() -> None:
    x = torch.full((1, 4), 1e-40)
    assert (fake_quantize(x, F("i8/ch")) == 0).all()


# ---- floats


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


# ---- shapes


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 7), (2, 2, 3, 7)])
@pytest.mark.parametrize("text", ["i8", "u4/ch", "i4/g4", "nf4/g4", "f8e4m3/ch"])
def test_any_leading_dimensions(shape: tuple[int, ...], text: str) -> None:
    x = torch.randn(shape)
    fmt = F(text)
    scale, zero = choose_qparams(x, fmt)
    codes = quantize(x, fmt, scale, zero)
    assert (codes.shape, codes.dtype) == (x.shape, fmt.code_dtype)
    flat = fake_quantize(x.reshape(-1, shape[-1]), fmt).reshape(shape)
    assert torch.equal(dequantize(codes, fmt, scale, zero), flat)


@given(st.integers(1, 40), st.integers(1, 12))
def test_groups_are_independent(k: int, group: int) -> None:
    x = torch.randn(3, k)
    fmt = Format("u4", f"g{group}")
    whole = fake_quantize(x, fmt)
    parts = [fake_quantize(part, F("u4/ch")) for part in x.split(group, -1)]
    assert torch.equal(whole, torch.cat(parts, -1))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_blocks_are_independent(rows: int, columns: int, m: int, n: int) -> None:
    x = torch.randn(2, rows, columns)
    fmt = Format("i5", f"b{m}x{n}")
    whole = fake_quantize(x, fmt)
    for batch in range(2):
        for i in range(0, rows, m):
            for j in range(0, columns, n):
                block = x[batch, i : i + m, j : j + n]
                assert torch.equal(whole[batch, i : i + m, j : j + n], fake_quantize(block, F("i5")))


@given(arrays(), st.integers(1, 5), st.integers(1, 5))
def test_join_undoes_split(x: Tensor, m: int, n: int) -> None:
    for fmt in (Format("i8", f"g{n}"), Format("i8", f"b{m}x{n}"), Format("i8", "ch")):
        assert torch.equal(join(split(x, fmt), fmt, x.shape), x)


def test_heads_and_activation_channels() -> None:
    x = torch.randn(2, 3, 5, 4)
    scale, _ = choose_qparams(x, F("i8/head"))
    assert torch.allclose(scale.flatten(), x.abs().amax((0, 2, 3)) / 127)
    scale, _ = choose_qparams(x, F("i8/ch"), activation=True)
    assert torch.allclose(scale, x.abs().amax((0, 1, 2)) / 127)
    assert quantize(x, F("i8/ch"), scale).abs().amax((0, 1, 2)).tolist() == [127] * 4


def test_token_rows_are_independent() -> None:
    x = torch.randn(4, 8) * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    error = (fake_quantize(x, F("i8/tok")) - x).abs().amax(-1)
    assert (error <= x.abs().amax(-1) / 127 * 0.501).all()


def test_empty_tensors() -> None:
    for text in ("i8", "i8/tok", "u8/tok", "u8", "i8/g4"):
        assert fake_quantize(torch.empty(0, 8), F(text)).shape == (0, 8)
        assert fake_quantize(torch.empty(3, 0), F(text)).shape == (3, 0)


def test_value_range_feeds_range_qparams() -> None:
    """Statistics gathered batch by batch give the scale of all batches together."""
    batches = [torch.randn(4, 6) for _ in range(3)]
    for text in ("i8", "u8", "i4/g4", "u4/b2x2", "nf4/ch"):
        fmt = F(text)
        ranges = [value_range(batch, fmt) for batch in batches]
        low = torch.stack([r[0] for r in ranges]).amin(0)
        high = torch.stack([r[1] for r in ranges]).amax(0)
        params = range_qparams(low, high, fmt)
        scales = torch.stack([choose_qparams(batch, fmt).scale for batch in batches])
        assert (params.scale >= scales.amax(0) * 0.999).all()


# ---- round trips


def exact_codes(fmt: Format) -> Tensor:
    if fmt.is_integer:
        return torch.arange(fmt.qmin, fmt.qmax + 1, dtype=torch.int32).to(fmt.code_dtype)
    if fmt.bits == 4:
        return torch.arange(16, dtype=torch.uint8)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(fmt.code_dtype)
    return codes[torch.isfinite(codes.float())]


@settings(deadline=None)
@given(st.sampled_from(SCALED), st.floats(2.0**-60, 2.0**60, width=32), st.data())
def test_codes_survive_a_round_trip(kind: str, factor: float, data: st.DataObject) -> None:
    fmt = F(kind)
    codes = exact_codes(fmt)
    scale = torch.tensor(factor)
    zero = torch.tensor(data.draw(st.integers(0, fmt.qmax)), dtype=torch.uint8) if fmt.has_zero else None
    again = quantize(dequantize(codes, fmt, scale, zero), fmt, scale, zero)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@settings(deadline=None)
@given(arrays(2.0**20), st.sampled_from(SCALED), st.sampled_from(GRANULARITIES))
def test_fake_quantize_is_idempotent_with_its_scale(x: Tensor, kind: str, granularity: str) -> None:
    fmt = F(kind + granularity)
    scale, zero = choose_qparams(x, fmt)
    once = fake_quantize(x, fmt, scale, zero)
    assert torch.equal(fake_quantize(once, fmt, scale, zero), once)


@settings(deadline=None)
@given(arrays(2.0**13), st.sampled_from(INTEGERS))
def test_quantize_is_monotonic(x: Tensor, kind: str) -> None:
    fmt = F(kind)
    scale, zero = choose_qparams(x, fmt)
    codes = quantize(x.flatten().sort().values, fmt, scale, zero).to(torch.int16)
    assert (codes.diff() >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_come_back(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype)
    for text in ("i8/tok", "nf4/g4", "f8e4m3", "bf16", "f32"):
        assert fake_quantize(x, F(text)).dtype == dtype
    scale, _ = choose_qparams(x, F("i8/ch"))
    assert scale.dtype == torch.float32
    assert torch.equal(quantize(x, F("i8/ch"), scale), quantize(x.float(), F("i8/ch"), scale))


def test_plain_formats_cast() -> None:
    x = torch.tensor([1.0, 1 + 2.0**-9])
    assert quantize(x, F("bf16")).dtype == torch.bfloat16
    assert fake_quantize(x, F("bf16")).tolist() == [1.0, 1.0]
    assert dequantize(x.half(), F("f16"), dtype=torch.float64).dtype == torch.float64


def test_gradients_are_not_needed_for_scales() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert not choose_qparams(x, F("i8/ch")).scale.requires_grad


def test_inputs_are_left_alone() -> None:
    x = torch.randn(4, 6)
    before = x.clone()
    for text in SCALED:
        fake_quantize(x, F(text + "/g4"))
    assert torch.equal(x, before)


# ---- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("text", ["i8", "i4/g4", "u4/ch", "nf4/g4", "f4e2m1/g4/e8m0", "f4e2m1/g4/e4m3", "i8/ch/f16"])
def test_not_finite_is_refused(bad: float, text: str) -> None:
    x = torch.ones(4, 6)
    x[1, 2] = bad
    found = "1 NaN and 0 Inf of 24 values" if math.isnan(bad) else "0 NaN and 1 Inf of 24 values"
    with pytest.raises(ValueError, match=r"cannot quantize 'layer.weight', shape \[4, 6\]") as caught:
        choose_qparams(x, F(text), name="layer.weight")
    assert found in str(caught.value)


def test_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float32"):
        choose_qparams(torch.full((2, 2), 1e300, dtype=torch.float64), F("i8"))


def test_require_finite() -> None:
    require_finite(torch.ones(3), "w")
    with pytest.raises(ValueError, match="cannot quantize 'w'"):
        require_finite(torch.tensor([math.nan]), "w")


@pytest.mark.parametrize(("text", "args", "match"), [("i8", (), "needs a scale"), ("u8", (1.0,), "needs a zero point")])
def test_missing_parameters_are_our_bugs(text: str, args: Sequence[float], match: str) -> None:
    scale = torch.tensor(args[0]) if args else None
    with pytest.raises(AssertionError, match=match):
        quantize(torch.ones(3), F(text), scale)
    with pytest.raises(AssertionError, match=match):
        dequantize(torch.ones(3, dtype=F(text).code_dtype), F(text), scale)


# ---- tracing


@pytest.mark.parametrize("text", ["i8/tok", "u8/dyn", "i4/g4", "nf4/g4", "f4e2m1/g4/e8m0", "f8e4m3/tok"])
def test_fake_quantize_can_be_exported(text: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fake_quantize(x, F(text))

    x = torch.randn(4, 8)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=64)},))
    y = torch.randn(6, 8)
    assert torch.equal(program.module()(y), fake_quantize(y, F(text)))
