"""PTX that turns two numbers of 16 bits, two bytes of packed codes each, into pairs of 16-bit floats.

The codes of a register's two halves are taken together as they lie there: no byte changes its place. An integer that
stands alone in the low bits of a float is that many times its least, a subnormal number; a fused multiply-add brings it
into the range of normal ones and takes an offset away, exactly. One instruction masks, one multiplies, and few shift:
as many bits count so as the mantissa has, and one more. Tables are looked up as in `decode_asm`.

Operands: for each place of a code in a byte the register of the even bytes' values and that of the odd ones', then the
numbers, of three bits those of their upper plane, and what is added in place of the offset, for as many places each.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch

from qfx.backends.triton.decode_asm import TABLE_REGISTERS, TABLES, block, looked_up, lop3, pattern, table_words, twice
from qfx.format import Format

_SELECT = "0xCA"  # lop3: a ? b : c


@dataclass(frozen=True)
class _Float:
    """linear: lowest bits that count the least numbers, those of the mantissa and one of the exponent.

    least, greatest: exponents of two.
    """

    name: str
    linear: int
    least: int
    greatest: int


_FLOATS = {torch.float16: _Float("f16", 11, -24, 15), torch.bfloat16: _Float("bf16", 8, -133, 127)}


@functools.cache
def pair_asm(fmt: Format, dtype: torch.dtype, odd: int = 0, zeros: int = 0) -> str:
    """The block for weights of `fmt` to values less their offset, over `gain`; "" where there is none.

    odd: of three bits, which bits of the upper plane. zeros: how many operands bring zero points, negative and over the
    gain. There is none for 8-bit floats and for float32.
    """
    if dtype == torch.float32 or fmt.type in ("f8e4m3", "f8e5m2"):
        return ""
    if fmt.type in TABLES:
        return _from_table(TABLES[fmt.type], dtype)
    bits = fmt.bits if fmt.bits <= 4 else 8
    offset = 1 << (bits - 1) if fmt.symmetric else 0
    return block(_from_integers(bits, offset, odd, zeros, _FLOATS[dtype]), "t, u, v, w, f, g")


def gain(fmt: Format, dtype: torch.dtype) -> int:
    """How many times too small the values of `pair_asm` are: a power of two, 1 for those of a table."""
    return 1 if fmt.type in TABLES else 1 << -(_FLOATS[dtype].least + _FLOATS[dtype].greatest)


def _from_integers(bits: int, offset: int, odd: int, zeros: int, kind: _Float) -> list[str]:
    """The lines for integers of so many bits."""
    places = 4 if bits == 3 else 8 // bits
    apart = 4 if bits == 3 else bits  # from a code in a word to the next
    half = kind.name == "f16"
    data = f"${2 * places}"
    words = {"v": range(0, places, 2), "w": range(1, places, 2)} if bits == 3 else {data: range(places)}
    lines = _threes(data, f"${2 * places + 1}", odd) if bits == 3 else []
    lines += [f"mov.b32 g, {twice(pattern(-offset * 2.0 ** (kind.least + kind.greatest), half))};"]
    added = [f"${2 * places + (2 if bits == 3 else 1) + i * zeros // places}" if zeros else "g" for i in range(places)]
    for word, held in words.items():
        source, down = word, 0
        for byte, (number, place) in itertools.product(range(2), enumerate(held)):
            at = 8 * byte + apart * number
            if at - down + bits > kind.linear:
                source, down = "t", at
                lines += [f"shr.b32 t, {word}, {down};"]
            out, at = f"${2 * place + byte}", at - down
            lines += [f"and.b32 {out}, {source}, {twice(((1 << bits) - 1) << at)};"]
            lines += [f"mov.b32 f, {twice(pattern(2.0 ** (kind.greatest - at), half))};"]
            lines += [f"fma.rn.{kind.name}x2 {out}, {out}, f, {added[place]};"]
    return lines


def _threes(data: str, upper: str, odd: int) -> list[str]:
    """The codes in the even places of bytes in the nibbles of v, the others in those of w; their top bits are any."""
    return [
        f"shl.b32 u, {upper}, {2 - odd};",
        lop3("v", "0x33333333", data, "u", _SELECT),
        f"shr.b32 t, {data}, 2;",
        f"shr.b32 u, {upper}, {odd};",
        lop3("w", "0x33333333", "t", "u", _SELECT),
    ]


def _from_table(values: tuple[float, ...], dtype: torch.dtype) -> str:
    lines = ["shr.b32 v, $4, 16;", *table_words(values, dtype)]
    for number, source in enumerate(("$4", "v")):
        lines += looked_up(source, f"lr{number}", f"hr{number}")
    for byte, bytes_ in enumerate(("0x5140", "0x7362")):  # those of the two values in a byte
        lines += [f"prmt.b32 p{number}, lr{number}, hr{number}, {bytes_};" for number in range(2)]
        lines += [f"prmt.b32 ${byte}, p0, p1, 0x5410;", f"prmt.b32 ${2 + byte}, p0, p1, 0x7632;"]
    return block(lines, f"{TABLE_REGISTERS}, lr0, hr0, lr1, hr1, p0, p1, v")
