"""Rounding to e4m3 and back: every value of the type, every tie between two, and what lies around them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qfx.backends.triton.kernels.rounding import e4m3_of, f16_of_e4m3
from qfx.backends.triton.launch import launch
from tests.backends.triton.cases import DEVICE

ALL = torch.arange(256, dtype=torch.uint8)
FINITE = ALL[(ALL & 127) != 127]


@triton.jit  # type: ignore[untyped-decorator]
def _round(x_ptr, bits_ptr, n, by_hand: tl.constexpr, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(bits_ptr + i, e4m3_of(tl.load(x_ptr + i, mask=i < n, other=0.0), by_hand), mask=i < n)


@triton.jit  # type: ignore[untyped-decorator]
def _widen(bits_ptr, x_ptr, n, block: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    i = tl.arange(0, block)
    tl.store(x_ptr + i, f16_of_e4m3(tl.load(bits_ptr + i, mask=i < n, other=0)), mask=i < n)


def rounded(x: Tensor, *, by_hand: bool) -> Tensor:
    bits = torch.empty(x.shape, dtype=torch.uint8, device=DEVICE)
    launch(_round, (triton.cdiv(x.numel(), 1024),), x.to(DEVICE), bits, x.numel(), by_hand=by_hand, block=1024)
    return bits.cpu()


def samples() -> Tensor:
    values = FINITE.view(torch.float8_e4m3fn).to(torch.float32).sort().values
    ties = (values[1:] + values[:-1]) / 2
    around = torch.cat([values, ties, torch.randn(4000) * 100, torch.randn(1000) * 0.01])
    below, above = (torch.nextafter(around, torch.full_like(around, to)) for to in (-1e9, 1e9))
    edges = torch.tensor([448.0, 463.9, 464.0, 465.0, 1e30, torch.inf, 2.0**-10, 2.0**-11, 1e-40, 0.0])
    return torch.cat([around, below, above, edges, -edges])


def test_rounding_by_hand_is_that_of_torch() -> None:
    torch.manual_seed(0)
    x = samples()
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(rounded(x, by_hand=True), expected)
    if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        assert torch.equal(rounded(x, by_hand=False), expected)


def test_nan_stays_nan() -> None:
    assert rounded(torch.tensor([torch.nan, 1.0]), by_hand=True).tolist() == [0x7F, 0x38]


def test_every_value_of_e4m3_is_exact_in_f16() -> None:
    x = torch.empty(FINITE.shape, dtype=torch.float16, device=DEVICE)
    launch(_widen, (1,), FINITE.to(DEVICE), x, len(FINITE), block=256)
    expected = FINITE.view(torch.float8_e4m3fn).to(torch.float32)
    assert torch.equal(x.to(torch.float32).cpu() * 256, expected)
