"""PTX that turns two numbers of 16 bits, two bytes of packed codes each, into pairs of 16-bit floats.

As `decode_asm`, whose ways these are, but the codes of a register's two halves are taken together as they lie there: no
byte changes its place. Operands: for each place of a code in a byte the register of the even bytes' values and that of
the odd ones', then the numbers and, of three bits, those of their upper plane.
"""

from __future__ import annotations

import functools
import struct

import torch

from qfx.backends.triton.decode_asm import TABLE_REGISTERS, TABLES, block, looked_up, lop3, pattern, table_words, twice
from qfx.format import Format

_AND_OR = "0xEA"  # lop3: (a & b) | c


@functools.cache
def pair_asm(fmt: Format, dtype: torch.dtype, odd: int = 0) -> str:
    """The block for weights of `fmt` to values less their constant offset in `dtype`; "" where there is none.

    odd: of three bits, which bits of the upper plane. There is none for 8-bit floats and for float32.
    """
    half = dtype == torch.float16
    if dtype == torch.float32 or fmt.type in ("f8e4m3", "f8e5m2"):
        return ""
    if fmt.type in TABLES:
        return _from_table(TABLES[fmt.type], dtype)
    bits = fmt.bits if fmt.bits <= 4 else 8
    offset = 1 << (bits - 1) if fmt.symmetric else 0
    if bits == 8 and not half:
        return block(_bytes_to_bf16(offset), "f0, f1")
    return block(_from_integers(bits, offset, odd, half=half), "t, u, f, g")


def _from_integers(bits: int, offset: int, odd: int, *, half: bool) -> list[str]:
    step = 2 if bits == 3 else bits
    places = 8 // step
    magic, one, kept = (0x6400, 1024, 10) if half else (0x4300, 128, 7)
    data, upper, kind = f"${2 * places}", f"${2 * places + 1}", "f16x2" if half else "bf16x2"
    lines: list[str] = []
    down = -1
    for byte in range(2):
        for place in range(places):
            at = 8 * byte + step * place - max(down, 0)
            if down < 0 or (byte and down < 8) or at + bits > kept:  # the mantissa does not reach so high
                down = 8 * byte + step * place
                at = 0
                lines += [f"shr.b32 t, {data}, {down};"]
                if bits == 3:  # its bit is to lie two above the code's lowest
                    left = 2 - odd - down
                    lines += [f"shl.b32 u, {upper}, {left};" if left >= 0 else f"shr.b32 u, {upper}, {-left};"]
            out = f"${2 * place + byte}"
            lines += [lop3(out, "t", twice(((1 << step) - 1) << at), twice(magic), _AND_OR)]
            if bits == 3:
                lines += [lop3(out, "u", twice(4 << at), out, _AND_OR)]
            lines += [f"mov.b32 f, {twice(pattern(2.0**-at, half))};"]
            lines += [f"mov.b32 g, {twice(pattern(-(one * 2.0**-at + offset), half))};"]
            lines += [f"fma.rn.{kind} {out}, {out}, f, g;"]
    return lines


def _bytes_to_bf16(offset: int) -> list[str]:
    """A byte as the mantissa of 2^23 is a float32, which a sum makes its value."""
    lines = []
    for byte in range(2):
        for half in range(2):
            lines += [f"prmt.b32 f{half}, $2, 0x4B000000, {0x7440 | byte + 2 * half:#06x};"]
            lines += [f"add.rn.f32 f{half}, f{half}, {_f32(-(2.0**23 + offset))};"]
        lines += [f"cvt.rn.bf16x2.f32 ${byte}, f1, f0;"]
    return lines


def _from_table(values: tuple[float, ...], dtype: torch.dtype) -> str:
    lines = ["shr.b32 v, $4, 16;", *table_words(values, dtype)]
    for number, source in enumerate(("$4", "v")):
        lines += looked_up(source, f"lr{number}", f"hr{number}")
    for byte, bytes_ in enumerate(("0x5140", "0x7362")):  # those of the two values in a byte
        lines += [f"prmt.b32 p{number}, lr{number}, hr{number}, {bytes_};" for number in range(2)]
        lines += [f"prmt.b32 ${byte}, p0, p1, 0x5410;", f"prmt.b32 ${2 + byte}, p0, p1, 0x7632;"]
    return block(lines, f"{TABLE_REGISTERS}, lr0, hr0, lr1, hr1, p0, p1, v")


def _f32(value: float) -> str:
    return "0f" + struct.pack(">f", value).hex().upper()
