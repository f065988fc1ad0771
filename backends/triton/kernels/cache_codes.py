"""Codes of a cache as floats, tile by tile; the memory is that of `qfx.kv.codes`.

A unit is U tokens, of which the bytes of keys and values both hold whole ones. A tile is the J-th tokens of R units, so
that nothing is interleaved: attention does not ask in which order it gets tokens.

MODE   0 plain floats   1 one scale a token   2 one scale for each channel of GROUP tokens   3 GROUP channels of a token
KIND   0 unsigned codes, of signed types with an offset   1 int8   2 bits of e4m3   3 bits of e5m2
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import f16_of_e4m3

# Four bytes in a register to four halves in two: below 0x64 a byte makes the half 1024 + byte, below 0x66 1536 + byte.
_DIGIT = tl.constexpr(("0", "1", "2", "3", "4", "5", "6", "7", "8"))
_MASK = tl.constexpr(("", "0x01010101", "0x03030303", "0x07070707", "0x0f0f0f0f", "0x1f1f1f1f", "0x3f3f3f3f",
                      "0x7f7f7f7f"))  # fmt: skip
_MIDDLE = tl.constexpr(("0x64006400", "", "0x64026402", "0x64046404", "0x64086408", "0x64106410", "0x64206420",
                        "0x64406440", "0x64806480"))  # fmt: skip
_HALVES = tl.constexpr("prmt.b32 a, t, 0x64646464, 0x4140; prmt.b32 b, t, 0x64646464, 0x4342; ")
_AFFINE = tl.constexpr(
    "or.b32 t, t, 0x80808080; prmt.b32 a, t, 0x66666666, 0x4140; prmt.b32 b, t, 0x66666666, 0x4342; "
)
_ZEROS = tl.constexpr(
    "{ .reg .b32 t; xor.b32 t, $2, 0x80808080; "
    "prmt.b32 $0, t, 0x66666666, 0x4140; prmt.b32 $1, t, 0x66666666, 0x4342; }"
)
_E4M3 = tl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; shr.b32 c, a, 1; shr.b32 d, b, 1; "
    "and.b32 a, a, 0x80008000; and.b32 b, b, 0x80008000; and.b32 c, c, 0x3f803f80; and.b32 d, d, 0x3f803f80; "
    "or.b32 $0, a, c; or.b32 $1, b, d; }"
)
_E5M2 = tl.constexpr("{ prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424; }")


@triton.jit
def _halves(low, high, factor, zero, BITS: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr,
            SCALED: tl.constexpr, AFFINE: tl.constexpr, PURE: tl.constexpr):  # fmt: skip
    """f16 of codes in bytes: (code - middle) or (code - zero), times factor; zero is given as 1664 + zero."""
    SPANS: tl.constexpr = SHIFT + BITS > 8
    if BITS == 8:
        head: tl.constexpr = "{ .reg .b32 t, a, b, c; xor.b32 t, $2, 0x80808080; "
    elif SPANS:
        head: tl.constexpr = (
            "{ .reg .b32 t, a, b, c; shr.b32 t, $2, " + _DIGIT[SHIFT] + "; and.b32 t, t, " + _MASK[8 - SHIFT]
            + "; shl.b32 a, $3, " + _DIGIT[8 - SHIFT] + "; and.b32 a, a, " + _MASK[BITS] + "; not.b32 b, "
            + _MASK[8 - SHIFT] + "; and.b32 a, a, b; or.b32 t, t, a; "
        )  # fmt: skip
    else:
        head: tl.constexpr = (
            "{ .reg .b32 t, a, b, c; shr.b32 t, $2, " + _DIGIT[SHIFT] + "; and.b32 t, t, " + _MASK[BITS] + "; "
        )
    fixed: tl.constexpr = head + _HALVES + "mov.b32 c, " + _MIDDLE[MIDDLE] + "; sub.f16x2 a, a, c; sub.f16x2 b, b, c; "
    if AFFINE:
        return tl.inline_asm_elementwise(
            head + _AFFINE + "sub.f16x2 a, a, $6; sub.f16x2 b, b, $7; mul.f16x2 $0, a, $4; mul.f16x2 $1, b, $5; }",
            "=r,=r,r,r,r,r,r,r", [low, high, factor, zero], dtype=tl.float16, is_pure=PURE, pack=4,
        )  # fmt: skip
    elif SCALED:
        return tl.inline_asm_elementwise(
            fixed + "mul.f16x2 $0, a, $4; mul.f16x2 $1, b, $5; }", "=r,=r,r,r,r,r", [low, high, factor],
            dtype=tl.float16, is_pure=PURE, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            fixed + "mov.b32 $0, a; mov.b32 $1, b; }", "=r,=r,r,r", [low, high], dtype=tl.float16, is_pure=PURE, pack=4
        )


@triton.jit
def scale_of(stored):
    """f32 of stored scales; bytes are powers of two."""
    if stored.dtype == tl.uint8:
        return tl.where(stored == 0, 5.877471754111438e-39, (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True))
    else:
        return stored.to(tl.float32)


@triton.jit
def _floats(low, high, KIND: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr):
    """f32 of codes in bytes, less the middle; those of e4m3 are / 256."""
    if KIND == 1:
        return low.to(tl.float32)
    elif KIND == 2:
        return f16_of_e4m3(low).to(tl.float32)
    elif KIND == 3:
        return (low.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        code = low.to(tl.int32) >> SHIFT
        if SHIFT + BITS > 8:
            code = code | (high.to(tl.int32) << (8 - SHIFT))
        return ((code & ((1 << BITS) - 1)) - MIDDLE).to(tl.float32)


@triton.jit
def _bytes(data_ptr, unit, column, inside, WIDTH: tl.constexpr, BITS: tl.constexpr, U: tl.constexpr, J: tl.constexpr):
    """The bytes that hold the codes of token U * unit + J, the second ones where a code lies in two."""
    PLANES: tl.constexpr = 1 if BITS >= 8 else 8 // BITS if 8 % BITS == 0 else 8
    ROWS: tl.constexpr = 1 if BITS >= 8 else PLANES * BITS // 8
    BYTE: tl.constexpr = 0 if BITS >= 8 else (J % PLANES) * BITS // 8
    SPANS: tl.constexpr = BITS < 8 and (J % PLANES) * BITS % 8 + BITS > 8
    place = (unit * (U // PLANES * ROWS) + (J // PLANES * ROWS + BYTE)) * WIDTH + column
    low = tl.load(data_ptr + place, mask=inside, other=0)
    if SPANS:
        return low, tl.load(data_ptr + place + WIDTH, mask=inside, other=0)
    else:
        return low, low


@triton.jit
def tile(data_ptr, scale_ptr, zero_ptr, first, units, WIDTH: tl.constexpr, SCALES: tl.constexpr, MODE: tl.constexpr,
         KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, U: tl.constexpr,
         J: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, FAST: tl.constexpr,
         BY_ROWS: tl.constexpr):  # fmt: skip
    """The J-th tokens of units first to first + R - 1, [R, BLOCK] as DOT; zeros from `units` on and beyond WIDTH.

    With MODE 1 codes (less the middle), else values. Pointers: of one head. FAST: halves by instructions of PTX.
    """
    SHIFT: tl.constexpr = 0 if BITS >= 8 else (J % (8 // BITS if 8 % BITS == 0 else 8)) * BITS % 8
    if MODE == 2:  # [groups of units, units of a group, channels]
        EACH: tl.constexpr = GROUP // U if GROUP % U == 0 and ((GROUP // U) & (GROUP // U - 1)) == 0 else 1
        SPAN: tl.constexpr = EACH if EACH < R else R
        start = first + tl.arange(0, R // SPAN)[:, None, None] * SPAN
        unit = start + tl.arange(0, SPAN)[None, :, None]
        column = tl.arange(0, BLOCK)[None, None, :]
        at = (start * U + (J if SPAN == 1 else 0)) // GROUP * WIDTH + column
        known = (start < units) & (column < WIDTH)
    elif MODE == 3:  # [units, groups of channels, channels of a group]
        SPAN: tl.constexpr = GROUP if GROUP <= BLOCK and (GROUP & (GROUP - 1)) == 0 else 1
        unit = first + tl.arange(0, R)[:, None, None]
        group = tl.arange(0, BLOCK // SPAN)[None, :, None] * SPAN
        column = group + tl.arange(0, SPAN)[None, None, :]
        at = (unit * U + J) * SCALES + group // GROUP
        known = (unit < units) & (group < WIDTH)
    elif BY_ROWS:
        unit = first + tl.arange(0, R)[:, None, None]
        column = tl.arange(0, BLOCK)[None, None, :]
    else:
        unit = first + tl.arange(0, R)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
    inside = unit < units
    if WIDTH != BLOCK:
        inside = inside & (column < WIDTH)
    if MODE == 0:
        found = tl.load(data_ptr + (unit * U + J) * WIDTH + column, mask=inside, other=0.0).to(tl.float32).to(DOT)
    elif MODE == 1:
        low, high = _bytes(data_ptr, unit, column, inside, WIDTH, BITS, U, J)
        if FAST and KIND == 2:
            found = tl.inline_asm_elementwise(_E4M3, "=r,=r,r", [low], dtype=tl.float16, is_pure=not BY_ROWS, pack=4)
        elif FAST and KIND == 3:
            found = tl.inline_asm_elementwise(_E5M2, "=r,=r,r", [low], dtype=tl.float16, is_pure=not BY_ROWS, pack=4)
        elif FAST:
            found = _halves(
                low, high, low, low, BITS, SHIFT, 8 if KIND == 1 else BITS if MIDDLE else 0, False, False, not BY_ROWS
            )
        else:
            found = _floats(low, high, KIND, BITS, SHIFT, MIDDLE).to(DOT)
    else:
        low, high = _bytes(data_ptr, unit, column, inside, WIDTH, BITS, U, J)
        stored = tl.load(scale_ptr + at, mask=known, other=0)
        if FAST:
            if zero_ptr is not None:
                zero = tl.inline_asm_elementwise(_ZEROS, "=r,=r,r", [tl.load(zero_ptr + at, mask=known, other=0)],
                                                 dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip
                found = _halves(low, high, stored, zero, BITS, SHIFT, 0, True, True, not BY_ROWS)
            else:
                found = _halves(low, high, stored, stored, BITS, SHIFT, BITS, True, False, not BY_ROWS)
        else:
            found = _floats(low, high, KIND, BITS, SHIFT, MIDDLE)
            if zero_ptr is not None:
                found -= tl.load(zero_ptr + at, mask=known, other=0).to(tl.float32)
            factor = scale_of(stored)
            if KIND == 2:
                factor = factor * 256.0
            found = (found * factor).to(DOT)
    return tl.reshape(found, (R, BLOCK))
