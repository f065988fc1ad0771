"""pair_asm: its PTX, carried out instruction by instruction, gives the values of all codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from qfx.backends.triton.decode_asm import TABLES
from qfx.backends.triton.pair_asm import gain, pair_asm
from qfx.format import Format
from tests.backends.triton.test_decode_asm import run

FORMATS = ["i8", "u8", "i4", "u4", "i3", "u3", "i2", "u2", "nf4", "f4e2m1"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("text", FORMATS)
def test_every_byte_in_every_place(text: str, dtype: torch.dtype) -> None:
    fmt = Format.parse(text)
    step = 2 if fmt.bits == 3 else fmt.bits
    places = 8 // step
    for first, odd in itertools.product(range(0, 256, 4), (0, 1)):
        given = [(first + i) & 255 for i in range(4)]
        word, above = sum(byte << 8 * i for i, byte in enumerate(given)), (first * 0x9E3779B1 + odd) & 0xFFFFFFFF
        got = run(pair_asm(fmt, dtype, odd), [word, above] if fmt.bits == 3 else [word], 2 * places, dtype)
        for i, place in itertools.product(range(4), range(places)):
            number, byte = divmod(i, 2)
            code = given[i] >> step * place & ((1 << step) - 1)
            if fmt.bits == 3:
                code |= (above >> (8 * i + 2 * place + odd) & 1) << 2
            offset = 1 << (fmt.bits - 1) if fmt.is_integer and fmt.symmetric else 0
            due = TABLES[fmt.type][code] if fmt.type in TABLES else float(code - offset)
            found = got[2 * place + byte][number] * gain(fmt, dtype)
            assert found == torch.tensor(due).to(dtype), (first, odd, i, place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("text", ["u8", "u4", "u3", "u2"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_zero_points_are_taken_away_exactly(text: str, dtype: torch.dtype, count: int) -> None:
    """Each for as many places, up to 255, which a zero point of a few bits may be, too."""
    fmt = Format.parse(text)
    step = 2 if fmt.bits == 3 else fmt.bits
    places = 8 // step
    count = min(count, places)
    more = gain(fmt, dtype)
    for first, odd in itertools.product(range(0, 256, 4), (0, 1)):
        given = [(first + i) & 255 for i in range(4)]
        word, above = sum(byte << 8 * i for i, byte in enumerate(given)), (first * 0x9E3779B1 + odd) & 0xFFFFFFFF
        zeros = [[255 - first, first], [first // 2, 255], [1, 0], [0, 128]][:count]  # of the numbers in a register
        words = [int.from_bytes((-torch.tensor(z) / more).to(dtype).view(torch.uint8).numpy().tobytes(), "little")
                 for z in zeros]  # fmt: skip
        got = run(pair_asm(fmt, dtype, odd, count), [word, *([above] if fmt.bits == 3 else []), *words],
                  2 * places, dtype)  # fmt: skip
        for i, place in itertools.product(range(4), range(places)):
            number, byte = divmod(i, 2)
            code = given[i] >> step * place & ((1 << step) - 1)
            if fmt.bits == 3:
                code |= (above >> (8 * i + 2 * place + odd) & 1) << 2
            due = code - zeros[place * count // places][number]
            assert got[2 * place + byte][number] * more == due, (first, odd, i, place)


def test_the_least_number_of_a_type_becomes_a_normal_one() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        least = torch.tensor(1, dtype=torch.int16).view(dtype).double()
        assert least * torch.finfo(dtype).max > 1 / gain(Format.parse("i4"), dtype) >= torch.finfo(dtype).tiny
        assert gain(Format.parse("nf4"), dtype) == 1


def test_what_has_no_block() -> None:
    assert pair_asm(Format.parse("i4"), torch.float32) == ""
    assert pair_asm(Format.parse("f8e4m3"), torch.float16) == ""
