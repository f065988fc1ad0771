"""layout: where the code of a column lies, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.layout import pack_halves, pack_three, padded


def unpack_halves(data: Tensor, bits: int, k: int, unit: int = 128) -> Tensor:
    """The codes uint8 [.., k] of `pack_halves`."""
    assert data.shape[-1] == padded(k, unit) * bits // 8, (data.shape, bits, k, unit)
    part = unit * bits // 8
    parts = data.reshape(*data.shape[:-1], data.shape[-1] // part, 1, part)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).reshape(-1, 1)
    return ((parts >> shifts) & ((1 << bits) - 1)).flatten(-3)[..., :k].contiguous()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 3), k=st.integers(0, 400), bits=st.sampled_from((1, 2, 4, 8)), unit=st.sampled_from((32, 128)))
def test_codes_come_back(n: int, k: int, bits: int, unit: int) -> None:
    codes = torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8)
    data = pack_halves(codes, bits, unit)
    assert data.shape == (n, padded(k, unit) * bits // 8)
    assert torch.equal(unpack_halves(data, bits, k, unit), codes)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 3), k=st.integers(0, 600))
def test_three_bits_come_back(n: int, k: int) -> None:
    codes = torch.randint(0, 8, (n, k), dtype=torch.uint8)
    lower, upper = pack_three(codes)
    column = torch.arange(k)
    byte = column // 256 * 32 + column % 32
    above = upper[:, byte] >> (column % 128 // 32 * 2 + column // 128 % 2) & 1
    assert torch.equal(unpack_halves(lower, 2, padded(k, 256))[:, :k] | above << 2, codes)


@pytest.mark.parametrize(("bits", "unit"), [(4, 128), (4, 64), (2, 128)])
def test_a_byte_holds_codes_a_part_apart(bits: int, unit: int) -> None:
    part = unit * bits // 8
    for column in (0, 5, part, unit - 1, unit, unit + part + 3):
        codes = torch.zeros(1, 2 * unit, dtype=torch.uint8)
        codes[0, column] = 1
        data = pack_halves(codes, bits, unit)
        which, inside = divmod(column, unit)
        assert data.nonzero().tolist() == [[0, which * part + inside % part]]
        assert int(data.max()) == 1 << (inside // part * bits)


def test_the_upper_of_three_bits_lies_beside_the_lower_two() -> None:
    for column in (0, 37, 127, 128, 255, 300):
        codes = torch.zeros(1, 512, dtype=torch.uint8)
        codes[0, column] = 7
        lower, upper = (plane.nonzero()[0, 1].item() for plane in pack_three(codes))
        assert lower // 64 == upper // 32 and lower % 32 == upper % 32  # a 256-unit; 32 bytes for each 128
        assert int(pack_three(codes)[1].max()) == 1 << (column % 128 // 32 * 2 + column // 128 % 2)
