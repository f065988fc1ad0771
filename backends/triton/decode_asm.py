"""PTX that turns four bytes of packed codes into pairs of 16-bit floats, for the kernels' inline assembly.

Integers become mantissas: in f16, 0x6400 | q is 1024 + q, in bf16, 0x4300 | q is 128 + q, for two codes at once (Kim et
al. 2022, "Who Says Elephants Can't Run", section 3.2); one fused multiply-add takes the constant and the offset away
and brings codes down that lie higher in the byte. Values of a table of 16 are picked bytewise by `prmt` from registers
that hold the table. All results are exact, values of the table rounded to the type.

Operands: the outputs, two registers for each code of a byte in turn, then the bytes and, of three bits, their upper
plane.
"""

from __future__ import annotations

import functools
import struct

import torch

from qfx.format import Format
from qfx.numerics import F4_VALUES, NF4_VALUES

TABLES = {"nf4": NF4_VALUES, "f4e2m1": F4_VALUES}
_EXPAND = ("0x4140", "0x4342")  # the first and last two bytes into the low halves of 16-bit lanes, the rest from zero
TABLE_REGISTERS = "l0, l1, l2, l3, h0, h1, h2, h3, a, b, s, m"  # what `table_words` and `looked_up` want
_AND_OR, _SELECT = "0xEA", "0xCA"  # lop3: (a & b) | c; a ? b : c


@functools.cache
def decode_asm(fmt: Format, dtype: torch.dtype, odd: int = 0) -> str:
    """The block for weights of `fmt` to values less their constant offset in `dtype`; "" where there is none.

    odd: of three bits, which bits of the upper plane, see `layout`. There is none for 8-bit floats, which a device
    converts itself, for integers above 4 bits to bf16, whose mantissa has 7 bits, and for float32.
    """
    half = dtype == torch.float16
    if dtype == torch.float32 or fmt.type in ("f8e4m3", "f8e5m2"):
        return ""
    if fmt.type in TABLES:
        return _from_table(TABLES[fmt.type], dtype)
    bits = fmt.bits if fmt.bits <= 4 else 8
    if bits == 8 and not half:
        return ""
    return block(_from_integers(bits, 1 << (bits - 1) if fmt.symmetric else 0, odd, half=half))


@functools.cache
def biased_asm(bits: int) -> str:
    """The block for integers of 2, 3, 4 or 8 bits to f32: code i of a byte, its offset kept, plus `bias(bits, i)`.

    Codes become mantissas of powers of two, one shift for a byte; who sums them takes the bias away. Four registers for
    each code of a byte. Of three bits, a third operand says which bits of the upper plane: bytes 0 or 1, all the same.
    """
    step, base = (2, 14) if bits == 3 else (bits, 15)
    parts = 8 // step
    data, upper, odd = (f"${4 * parts + i}" for i in range(3))
    lines = [f"and.b32 u, {odd}, 1;", f"shr.b32 u, {upper}, u;"] if bits == 3 else []
    lines += [_shifted(f"t{byte}", data, base - 8 * byte) for byte in range(4)]
    if bits == 3:
        lines += [_shifted(f"u{byte}", "u", 16 - 8 * byte) for byte in range(4)]
    for part in range(parts):
        at = base + step * part
        for byte in range(4):
            out = f"${4 * part + byte}"
            exponent = 127 + bias(bits, part).bit_length() - 1
            lines += [lop3(out, f"t{byte}", hex(((1 << step) - 1) << at), hex(exponent << 23), _AND_OR)]
            if bits == 3:
                lines += [lop3(out, f"u{byte}", hex(4 << at), out, _AND_OR)]
    return block(lines, "t0, t1, t2, t3, u, u0, u1, u2, u3")


def bias(bits: int, part: int) -> int:
    """What stands before code `part` of a byte in `biased_asm`: the power of two whose mantissa has it so high."""
    return 1 << (9 - 2 * part) if bits == 3 else 1 << (8 - bits * part)


def _shifted(out: str, source: str, left: int) -> str:
    return f"shl.b32 {out}, {source}, {left};" if left >= 0 else f"shr.b32 {out}, {source}, {-left};"


def _from_integers(bits: int, offset: int, odd: int, *, half: bool) -> list[str]:
    step = 2 if bits == 3 else bits
    parts = 8 // step
    magic, one, kept = (0x6400, 1024, 10) if half else (0x4300, 128, 7)
    data, upper = (f"${2 * parts + i}" for i in range(2))
    # bits of a neighbouring byte that the shift brings along are not read
    lines = [f"shr.b32 u1, {upper}, {odd};"] if bits == 3 else []
    for lane, order in enumerate(_EXPAND):
        lines += [f"prmt.b32 t{lane}, {data}, 0, {order};"]
        if bits == 3:
            lines += [f"prmt.b32 u{lane}, u1, 0, {order};", f"shl.b32 u{lane}, u{lane}, 2;"]
    down = 0
    for part in range(parts):
        if part * step - down + bits > kept:  # the mantissa does not reach so high
            further = part * step - down
            for name in ("t0", "t1", "u0", "u1") if bits == 3 else ("t0", "t1"):
                lines += [f"shr.b32 {name}, {name}, {further};"]
            down += further
        at = part * step - down
        for lane in range(2):
            out = f"${2 * part + lane}"
            lines += [lop3(out, f"t{lane}", twice(((1 << step) - 1) << at), twice(magic), _AND_OR)]
            if bits == 3:
                lines += [lop3(out, f"u{lane}", twice(4 << at), out, _AND_OR)]
            factor, less = 2.0**-at, -(one * 2.0**-at + offset)
            kind = "f16x2" if half else "bf16x2"
            if lane == 0:
                lines += [f"mov.b32 f, {twice(pattern(factor, half))};"]
                lines += [f"mov.b32 g, {twice(pattern(less, half))};"]
            lines += [f"fma.rn.{kind} {out}, {out}, f, g;"]
    return lines


def _from_table(values: tuple[float, ...], dtype: torch.dtype) -> str:
    lines = ["shr.b32 v, $4, 16;", *table_words(values, dtype)]  # inputs are read before an output is written
    for lane in range(2):  # the selector reads four codes, those of two bytes
        lines += looked_up("$4" if lane == 0 else "v", "lr", "hr")
        lines += [f"prmt.b32 ${lane}, lr, hr, 0x6240;", f"prmt.b32 ${2 + lane}, lr, hr, 0x7351;"]
    return block(lines, f"{TABLE_REGISTERS}, lr, hr, v")


def table_words(values: tuple[float, ...], dtype: torch.dtype) -> list[str]:
    """Lines that put the 16 values into registers: l0 to l3 hold their lower bytes, h0 to h3 the upper ones."""
    patterns = [int(p) & 0xFFFF for p in torch.tensor(values).to(dtype).view(torch.int16).tolist()]
    lines = []
    for name, shift in (("l", 0), ("h", 8)):
        for i in range(4):
            four = patterns[4 * i : 4 * i + 4]
            word = sum(((value >> shift) & 255) << 8 * j for j, value in enumerate(four))
            lines.append(f"mov.b32 {name}{i}, {word:#010x};")
    return lines


def looked_up(source: str, low: str, high: str) -> list[str]:
    """Lines that put the bytes of four values into two registers, for the four codes in the lower half of `source`."""
    lines = [f"and.b32 s, {source}, 0x7777;", f"shr.b32 m, {source}, 3;", "and.b32 m, m, 0x1111;"]
    lines += ["prmt.b32 m, 0xFF00, 0, m;"]  # a byte of ones where the code's upper bit is set
    for name, to in (("l", low), ("h", high)):
        lines += [f"prmt.b32 a, {name}0, {name}1, s;", f"prmt.b32 b, {name}2, {name}3, s;"]
        lines += [lop3(to, "m", "b", "a", _SELECT)]
    return lines


def block(lines: list[str], registers: str = "t0, t1, u0, u1, f, g") -> str:
    """The lines in braces, with registers of 32 bits of their own."""
    return "\n".join(["{", f".reg .b32 {registers};", *lines, "}"])


def lop3(out: str, a: str, b: str, c: str, table: str) -> str:
    """One instruction for any function of three words, bit by bit."""
    return f"lop3.b32 {out}, {a}, {b}, {c}, {table};"


def twice(half: int) -> str:
    """A word of two equal halves."""
    return f"{half << 16 | half:#010x}"


def pattern(value: float, half: bool) -> int:
    """The bits of a value that the type holds exactly."""
    if half:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    assert bits & 0xFFFF == 0, value
    return bits >> 16
