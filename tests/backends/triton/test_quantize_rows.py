"""quantize_rows: the codes and scales of the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.backends.triton.quantize_rows import quantize_rows
from qfx.format import Format
from qfx.numerics import quantize, run_time_qparams
from tests.backends.triton.cases import DEVICE


@settings(max_examples=20, deadline=None)
@given(m=st.integers(0, 9), k=st.integers(1, 300), seed=st.integers(0, 99), half=st.booleans())
def test_int8_codes_are_those_of_the_reference(m: int, k: int, seed: int, half: bool) -> None:
    torch.manual_seed(seed)
    x = torch.randn(m, k, dtype=torch.float16 if half else torch.float32, device=DEVICE) * 3
    codes, scale = quantize_rows(x, None, "i8/tok")
    fmt = Format.parse("i8/tok")
    params = run_time_qparams(x, fmt)
    assert torch.equal(scale, params.scale)
    assert torch.equal(codes, quantize(x, fmt, params.scale))


def test_smooth_divides_and_zero_rows_have_the_scale_1() -> None:
    x = torch.tensor([[4.0, -8.0], [0.0, 0.0]], device=DEVICE)
    codes, scale = quantize_rows(x, torch.tensor([1.0, 4.0], device=DEVICE), "i8/tok")
    assert codes.tolist() == [[127, -64], [0, 0]]  # 63.5 to even
    assert scale.flatten().tolist() == pytest.approx([4 / 127, 1.0])
