"""decode_asm: its PTX, carried out here instruction by instruction, gives the values of all codes."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from functools import partial

import pytest
import torch

from qfx.backends.triton.decode_asm import TABLES, bias, biased_asm, decode_asm
from qfx.format import Format

_STEP = re.compile(r"(?P<op>[a-z0-9.]+) (?P<operands>[^;]+);")


def _floats(word: int, dtype: torch.dtype) -> torch.Tensor:
    halves = [word & 0xFFFF, word >> 16]
    return torch.tensor([h - 65536 if h >= 32768 else h for h in halves], dtype=torch.int16).view(dtype)


def _prmt(a: int, b: int, selector: int) -> int:
    both, found = a | (b << 32), 0
    for i in range(4):
        pick = selector >> 4 * i & 15
        byte = both >> 8 * (pick & 7) & 255
        found |= (0 if pick < 8 else 255 if byte & 128 else 0) << 8 * i if pick & 8 else byte << 8 * i
    return found


def _lop3(a: int, b: int, c: int, table: int) -> int:
    found = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        found |= (table >> index & 1) << i
    return found


def _lanes(op: Callable[..., torch.Tensor], a: int, b: int) -> int:
    """An operation of two pairs of halves."""
    low, high = (int(v) & 0xFFFF for v in op(*(_floats(x, torch.float16) for x in (a, b))).view(torch.int16).tolist())
    return low | high << 16


_STEPS: dict[str, Callable[..., int]] = {
    "prmt": _prmt,
    "lop3": _lop3,
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "sub": partial(_lanes, torch.sub),
    "mul": partial(_lanes, torch.mul),
    "shr": lambda a, b: a >> b,
    "shl": lambda a, b: a << b & 0xFFFFFFFF,
}


def run(asm: str, inputs: list[int], outputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output registers as pairs of floats."""
    return [_floats(word, dtype) for word in words(asm, inputs, outputs, dtype)]


def words(asm: str, inputs: list[int], outputs: int, dtype: torch.dtype) -> list[int]:
    """The output registers."""
    registers = {f"${outputs + i}": word for i, word in enumerate(inputs)}
    for found in _STEP.finditer(asm.replace(".reg .b32", "declare")):
        if found["op"] == "declare":
            continue
        to, *names = [name.strip() for name in found["operands"].split(",")]
        args = [registers[n] if n in registers else int(n, 0) for n in names]
        op = found["op"].split(".")[0]
        if op == "fma":
            assert all(n in registers for n in names)  # it takes no immediate
            assert found["op"] == ("fma.rn.f16x2" if dtype == torch.float16 else "fma.rn.bf16x2")
            a, b, c = (_floats(word, dtype).double() for word in args)
            low, high = (int(v) & 0xFFFF for v in (a * b + c).to(dtype).view(torch.int16).tolist())
            registers[to] = low | high << 16
        else:
            registers[to] = _STEPS[op](*args)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("text", ["i8", "u8", "i4", "u4", "i3", "u3", "i2", "u2", "nf4", "f4e2m1"])
def test_every_byte(text: str, dtype: torch.dtype) -> None:
    fmt = Format.parse(text)
    asms = [decode_asm(fmt, dtype, odd) for odd in (0, 1)]
    if fmt.bits == 8 and dtype == torch.bfloat16:
        assert asms == ["", ""]
        return
    step = 2 if fmt.bits == 3 else fmt.bits
    parts = 8 // step
    for first in range(0, 256, 4):
        word = sum((first + i) << 8 * i for i in range(4))
        above, odd = (first * 0x9E3779B1) & 0xFFFFFFFF, first // 4 % 2
        got = run(asms[odd], [word, above] if fmt.bits == 3 else [word], 2 * parts, dtype)
        for byte in range(4):
            for part in range(parts):
                code = (first + byte) >> step * part & ((1 << step) - 1)
                if fmt.bits == 3:
                    code |= (above >> (8 * byte + 2 * part + odd) & 1) << 2
                offset = 1 << (fmt.bits - 1) if fmt.is_integer and fmt.symmetric else 0
                due = TABLES[fmt.type][code] if fmt.type in TABLES else float(code - offset)
                assert got[2 * part + byte // 2][byte % 2] == torch.tensor(due).to(dtype), (first, byte, part)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_byte_to_f32(bits: int) -> None:
    step = 2 if bits == 3 else bits
    parts = 8 // step
    for first in range(0, 256, 4):
        word = sum((first + i) << 8 * i for i in range(4))
        above, odd = (first * 0x9E3779B1) & 0xFFFFFFFF, first // 4 % 2
        inputs = [word, above, odd * 0x01010101] if bits == 3 else [word]
        got = words(biased_asm(bits), inputs, 4 * parts, torch.float32)
        for byte in range(4):
            for part in range(parts):
                code = (first + byte) >> step * part & ((1 << step) - 1)
                if bits == 3:
                    code |= (above >> (8 * byte + 2 * part + odd) & 1) << 2
                value = struct.unpack("<f", struct.pack("<I", got[4 * part + byte]))[0]
                assert value == code + bias(bits, part), (first, byte, part)


def test_what_has_no_block() -> None:
    assert decode_asm(Format.parse("i4"), torch.float32) == ""
    assert decode_asm(Format.parse("f8e4m3"), torch.float16) == ""
