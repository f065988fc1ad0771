"""Rounding, scales, shapes and round trips of every format, and refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from qfx.format import TYPES, Format
from qfx.numerics import (
    choose_qparams,
    dequantize,
    effective_scale,
    fake_quantize,
    join,
    quantize,
    range_qparams,
    require_finite,
    run_time_qparams,
    split,
    spread,
    value_range,
)

F = Format.parse
SCALED = [t for t in TYPES if t not in ("f16", "bf16", "f32")]
INTEGERS = [t for t in SCALED if t[0] in "iu"]
GRANULARITIES = ["", "/ch", "/g4", "/b2x3"]


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


@pytest.mark.parametrize("text", ["i4/tok", "u4/tok", "i8/dyn", "u3/g4/dyn"])
def test_a_clipped_scale_is_a_share_of_the_whole_one(text: str) -> None:
    """Values within the share are rounded with finer steps, those beyond saturate."""
    x = torch.tensor([[-1.0, -0.6, 0.2, 0.1], [0.3, 0.8, -0.1, 2.0]])
    whole, part = F(text), F(f"{text}/c50")
    scale, _ = run_time_qparams(x, whole)
    clipped, _ = run_time_qparams(x, part)
    torch.testing.assert_close(clipped, scale / 2)
    low, high = value_range(x, part, activation=True)
    step = clipped.reshape(-1, 1) if clipped.dim() else clipped
    inside = split(x, part).flatten(0, -2)
    held = split(fake_quantize(x, part, activation=True), part).flatten(0, -2)
    low, high = (t.reshape(-1, 1) * 0.5 for t in (low, high))
    cut = inside.clamp(torch.minimum(low, -high) if part.symmetric else low.clamp(max=0), None)
    cut = torch.minimum(cut, torch.maximum(high, -low) if part.symmetric else high.clamp(min=0))
    assert ((held - cut).abs() <= step * 1.001).all()
    assert not torch.equal(held, split(fake_quantize(x, whole, activation=True), whole).flatten(0, -2))


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
