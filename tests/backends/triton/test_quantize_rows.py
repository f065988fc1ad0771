"""Quantizing activations: the codes, scales and zero points of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.quantize_rows import aligned, quantize_dynamic, quantize_static, shift_of
from qfx.format import Format
from qfx.numerics import quantize, run_time_qparams
from tests.backends.triton.cases import DEVICE

DYNAMIC = ["i8/tok", "u8/tok", "i4/tok", "u4/tok/c90", "i8/dyn", "u8/dyn/c80", "f8e4m3/tok", "f8e4m3/dyn"]
GROUPS = ["f8e4m3/g128/dyn", "f8e4m3/g32/dyn"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sample(m: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(m, k) * 3 + 0.5
    x[:, ::7] *= 20
    return x.to(dtype).to(DEVICE)


def check_codes(codes: Tensor, expected: Tensor, fmt: Format, k: int) -> None:
    """Codes of an operand are those of the reference, and zero behind K."""
    assert codes.shape[-1] == aligned(k)
    if fmt.is_integer:
        assert torch.equal(codes[..., :k].to(torch.int32) + shift_of(fmt), expected.to(torch.int32))
    else:
        assert torch.equal(codes[..., :k].view(torch.uint8), expected.view(torch.uint8))
    assert not codes[..., k:].to(torch.float32).any()


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 9), k=st.integers(1, 300), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_int8_codes_are_those_of_the_reference(m: int, k: int, seed: int, dtype: torch.dtype) -> None:
    x = sample(m, k, seed, dtype)
    codes, scale, _ = quantize_dynamic(x, None, "i8/tok")
    fmt = Format.parse("i8/tok")
    params = run_time_qparams(x, fmt)
    assert torch.equal(scale, params.scale)
    check_codes(codes, quantize(x, fmt, params.scale), fmt, k)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 300),
    seed=st.integers(0, 99),
    smoothed=st.booleans(),
    text=st.sampled_from(DYNAMIC + GROUPS),
)
def test_dynamic_operands_are_those_of_the_reference(m: int, k: int, seed: int, smoothed: bool, text: str) -> None:
    x, fmt = sample(m, k, seed), Format.parse(text)
    smooth = torch.rand(k, device=DEVICE) + 0.5 if smoothed else None
    codes, scale, zero = quantize_dynamic(x, smooth, text)
    divided = x if smooth is None else x / smooth
    params = run_time_qparams(divided, fmt)
    assert torch.equal(scale, params.scale)
    assert torch.equal(zero, params.zero) if params.zero is not None else zero.numel() == 0
    check_codes(codes, quantize(divided, fmt, params.scale, params.zero), fmt, k)


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 9),
    k=st.integers(1, 300),
    smoothed=st.booleans(),
    text=st.sampled_from(["i8", "u8", "i4", "u5", "f8e4m3"]),
)
def test_static_operands_saturate_as_the_reference(m: int, k: int, smoothed: bool, text: str) -> None:
    x, fmt = sample(m, k, m), Format.parse(text)
    smooth = torch.rand(k, device=DEVICE) + 0.5 if smoothed else None
    scale = torch.tensor(0.03, device=DEVICE)
    zero = torch.tensor(fmt.qmax // 3, dtype=torch.uint8, device=DEVICE) if fmt.has_zero else None
    codes = quantize_static(x, smooth, scale, zero, text)
    divisor = scale if smooth is None else scale * smooth
    check_codes(codes, quantize(x, fmt, divisor, zero), fmt, k)


def test_smooth_divides_and_zero_rows_have_the_scale_1() -> None:
    x = torch.tensor([[4.0, -8.0], [0.0, 0.0]], device=DEVICE)
    codes, scale, _ = quantize_dynamic(x, torch.tensor([1.0, 4.0], device=DEVICE), "i8/tok")
    assert codes[:, :2].tolist() == [[127, -64], [0, 0]]  # 63.5 to even
    assert scale.flatten().tolist() == pytest.approx([4 / 127, 1.0])


def test_rows_may_be_any_view_and_of_any_leading_shape() -> None:
    x = sample(40, 50, 1).reshape(2, 20, 50).transpose(0, 1)[:, :, 3:40:2]
    codes, scale, zero = quantize_dynamic(x, None, "u8/tok")
    whole = quantize_dynamic(x.contiguous(), None, "u8/tok")
    assert codes.shape == (20, 2, 32) and scale.shape == zero.shape == (20, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip((codes, scale, zero), whole, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf4", "neither integers nor f8e4m3"),
        ("i8/ch", "a scale for the tensor or for each token"),
        ("i8/g32", "are for f8e4m3"),
        ("i8/tok/f16", "scales found at run time are f32"),
        ("f8e4m3/g48/dyn", "powers of two"),
        ("i8", "a known scale"),
    ],
)
def test_refusals_say_why(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_dynamic(torch.zeros(2, 64, device=DEVICE), None, text)


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="float16, bfloat16 or float32"):
        quantize_dynamic(torch.zeros(2, 64, dtype=torch.int8, device=DEVICE), None, "i8/tok")
    with pytest.raises(ValueError, match="smooth does not fit"):
        quantize_dynamic(torch.zeros(2, 64, device=DEVICE), torch.ones(3, device=DEVICE), "i8/tok")
    with pytest.raises(ValueError, match="one zero point"):
        quantize_static(torch.zeros(2, 64, device=DEVICE), None, torch.ones(()), None, "u8")


@pytest.mark.parametrize("text", ["u8/tok", "i8/dyn", "f8e4m3/g32/dyn"])
def test_fakes_have_the_shapes_of_the_real_ones(text: str) -> None:
    x = sample(4, 70, 0).reshape(2, 2, 70)
    torch.library.opcheck(
        torch.ops.qfx_triton.quantize_dynamic.default, (x, None, text), test_utils=("test_schema", "test_faketensor")
    )
