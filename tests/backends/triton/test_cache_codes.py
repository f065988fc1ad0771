"""The instructions that make halves of codes, carried out one by one: the kernels' own need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.backends.triton.kernels.cache_codes import AFFINE, BARE, E4M3, E5M2, PROGRAMS, SCALED, ZEROS, instructions
from tests.backends.triton.test_decode_asm import words


def run(program: str, *inputs: Tensor) -> Tensor:
    """f16 [n, 4] that a program makes of registers, each a tensor of 4 bytes' [n, 4] or of 2 halves' [n, 2]."""
    registers = [(x.contiguous().view(torch.int32)[:, 0].long() & 0xFFFFFFFF).tolist() for x in inputs]
    found = [words(program, list(given), 2, torch.float16) for given in zip(*registers, strict=True)]
    return torch.tensor(found).to(torch.int32).view(torch.float16)


def some(bytes_of: torch.dtype, seed: int) -> Tensor:
    return torch.randint(0, 256, (48, 4), generator=torch.Generator().manual_seed(seed)).to(torch.uint8).view(bytes_of)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", [BARE, SCALED, AFFINE])
def test_codes(bits: int, form: int) -> None:
    low, high, zero = some(torch.uint8, 0), some(torch.uint8, 1), some(torch.int8, 2)
    factor = torch.linspace(0.01, 2, 192).reshape(48, 4).half()
    zeros = run(ZEROS, zero)
    for plane in range({2: 4, 4: 2, 8: 1}.get(bits, 8)):
        shift = plane * bits % 8
        code = ((low.int() | high.int() << 8) >> shift) & ((1 << bits) - 1)
        for middle in (False, True):
            if bits == 8 and (form == AFFINE or not middle):
                continue  # those are read as f32
            off = zero.int() if form == AFFINE else (1 << (bits - 1)) * middle
            values = (low.view(torch.int8).int() if bits == 8 else code - off).half()
            program = PROGRAMS[(((bits - 2) * 8 + shift) * 3 + form) * 2 + middle]
            assert program == instructions(bits, shift, form, middle)
            found = run(program, low, high, factor[:, :2], factor[:, 2:], zeros[:, :2], zeros[:, 2:])
            assert torch.equal(found, values if form == BARE else values * factor), (shift, middle)


def test_floats_of_8_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8).reshape(64, 4)
    expected = torch.where(codes.int() & 0x7F == 0x7F, 480.0, codes.view(torch.float8_e4m3fn).float().abs()) / 256
    found = run(E4M3, codes)
    assert torch.equal(found.float().abs(), expected)
    assert torch.equal(torch.signbit(found), codes >= 128)
    assert torch.equal(run(E5M2, codes).view(torch.int16), codes.short() << 8)


def test_zero_points() -> None:
    zero = torch.arange(-128, 128).to(torch.int8).reshape(64, 4)
    assert torch.equal(run(ZEROS, zero), 1664 + zero.half())


def test_a_wrong_shift_is_seen() -> None:
    low = some(torch.uint8, 0)
    assert not torch.equal(run(instructions(4, 0, BARE, False), low), run(instructions(4, 4, BARE, False), low))
