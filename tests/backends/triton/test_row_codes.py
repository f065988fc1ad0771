"""row_codes: configurations fit the device, and division by a reciprocal gives the codes of division."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.device import A100, H200, Device


@pytest.mark.parametrize("device", [A100, H200])
@pytest.mark.parametrize("k", [16, 100, 384, 768, 4096, 5120, 11008, 16384, 20000])
@pytest.mark.parametrize("m", [1, 33, 8192])
def test_configurations_hold_whole_rows_and_fit(m: int, k: int, device: Device) -> None:
    for width in (2, 4, 8):
        found = row_codes.candidates(device, k, width)
        assert len(found) <= 20 and bool(found) == (k <= row_codes.WHOLE)
        for config in [*found, row_codes.heuristic(device, m, k, width)] if found else []:
            assert config["BLOCK"] * config["PARTS"] >= k and 1 <= config["num_warps"] <= 32
            assert config["PROGRAMS"] * config["num_warps"] <= max(16, config["num_warps"])
            held = (
                config["PROGRAMS"] * (config["STAGES"] - 1) * config["ROWS"] * config["BLOCK"] * config["PARTS"] * width
            )
            assert held <= device.shared
            assert (config["STAGES"] > 1) == (config["PROGRAMS"] > 0)


def test_many_rows_are_walked_over_and_few_are_not() -> None:
    assert row_codes.heuristic(H200, 8192, 4096, 2)["PROGRAMS"] == 4
    assert row_codes.heuristic(H200, 16, 4096, 2)["PROGRAMS"] == 0
    assert row_codes.heuristic(H200, 8192, 16384, 8)["PROGRAMS"] == 0, "two tiles of 128 KiB do not fit"


def fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of f32, rounded once: the product is exact in f64."""
    return (a.double() * b.double() + c.double()).float()


def inverse_of(divisor: Tensor) -> Tensor:
    """`kernels.row_codes.inverse_of` as a GPU computes it: an approximation within one unit in the last place."""
    y = (1.0 / divisor.double()).float()
    units = torch.randint(-1, 2, y.shape, generator=torch.Generator().manual_seed(5))
    y = (y.view(torch.int32) + units.to(torch.int32)).view(torch.float32)
    one = torch.ones_like(divisor)
    for _ in range(2):
        y = fused(fused(-y, divisor, one), y, y)
    return y


def quotient(x: Tensor, divisor: Tensor, times: int) -> Tensor:
    """`kernels.row_codes.quotient` as a GPU computes it."""
    inverse = inverse_of(divisor)
    q = x * inverse
    for _ in range(times):
        q = fused(fused(-q, divisor, x), inverse, q)
    return q


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_reciprocal_corrected_once_gives_the_codes_of_division(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.abs() <= 60000]
    bad = 0
    for greatest in (torch.rand(40) * 50 + 0.01).to(dtype).float():
        x = every[(every.abs() <= greatest) & (every.abs() > greatest * 1e-6)]
        for qmax in (127.0, 255.0):
            scale = greatest / qmax
            assert torch.equal(quotient(x, scale, 1).round(), (x / scale).round())
            bad += int((x * inverse_of(scale) != x / scale).sum())
    assert bad, "without a correction no quotient is wrong: the test sees nothing"


def test_corrected_twice_it_is_division() -> None:
    torch.manual_seed(1)
    x, divisor = (torch.randn(2_000_000).abs() + 1e-3 for _ in range(2))
    divisor = torch.where(torch.rand(x.shape) < 0.5, divisor, torch.nextafter(torch.full_like(x, 2.0), x * 0))
    assert torch.equal(quotient(x, divisor, 2), x / divisor)
