"""Codes of a cache as floats, tile by tile; the memory is that of `qfx.kv.codes`.

A unit is U tokens, of which the bytes of keys and values both hold whole ones. A tile is the J-th tokens of R units, so
that nothing is interleaved: attention does not ask in which order it gets tokens.

MODE   0 plain floats   1 one scale a token   2 one scale for each channel of GROUP tokens   3 GROUP channels of a token
KIND   0 unsigned codes, of signed types with an offset   1 int8   2 bits of e4m3   3 bits of e5m2
"""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import f16_of_e4m3

BARE, SCALED, AFFINE = range(3)  # codes less the middle; times a factor; less a zero point, times a factor


def instructions(bits: int, shift: int, form: int, middle: bool) -> str:
    """PTX that makes four halves, in the registers $0 and $1, of codes in the four bytes of $2.

    Below 0x64 a byte makes the half 1024 + byte, below 0x66 1536 + byte. shift: of the code in its byte; what goes
    beyond lies in the bytes of $3. The factor is in $4 and $5, 1664 + the zero point in $6 and $7. Outputs are written
    before all inputs are read, which their constraint (=&r) says.
    """
    low, mask = min(bits, 8 - shift), (1 << bits) - 1
    lines = [".reg .b32 t, a, b, c"]
    if bits == 8:
        lines.append("xor.b32 t, $2, 0x80808080")
    else:
        lines += [f"shr.b32 t, $2, {shift}", f"and.b32 t, t, {_each((1 << low) - 1)}"]
    if low < bits:
        high = _each(mask & ~((1 << low) - 1))
        lines += [f"shl.b32 a, $3, {low}", f"and.b32 a, a, {high}", "or.b32 t, t, a"]
    top = "0x64646464"
    if form == AFFINE:
        lines.append("or.b32 t, t, 0x80808080")
        top = "0x66666666"
    lines += [f"prmt.b32 a, t, {top}, 0x4140", f"prmt.b32 b, t, {top}, 0x4342"]
    if form == AFFINE:
        lines += ["sub.f16x2 a, a, $6", "sub.f16x2 b, b, $7"]
    else:
        half = f"0x{(0x6400 + (1 << (bits - 1) if middle else 0)) * 0x10001:08x}"
        lines += [f"mov.b32 c, {half}", "sub.f16x2 a, a, c", "sub.f16x2 b, b, c"]
    lines += [f"{'mov.b32' if form == BARE else 'mul.f16x2'} ${i}, {r}" + ("" if form == BARE else f", ${4 + i}")
              for i, r in enumerate("ab")]  # fmt: skip
    return "{ " + "".join(f"{line}; " for line in lines) + "}"


def _each(byte: int) -> str:
    return f"0x{byte * 0x01010101:08x}"


PROGRAMS = tuple(
    instructions(bits, shift, form, middle)
    for bits in range(2, 9) for shift in range(8) for form in range(3) for middle in (False, True)
)  # fmt: skip
_PROGRAMS = tl.constexpr(PROGRAMS)
ZEROS = (
    "{ .reg .b32 t; xor.b32 t, $2, 0x80808080; "
    "prmt.b32 $0, t, 0x66666666, 0x4140; prmt.b32 $1, t, 0x66666666, 0x4342; }"
)
_ZEROS = tl.constexpr(ZEROS)
E4M3 = (
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424; shr.b32 c, a, 1; shr.b32 d, b, 1; "
    "and.b32 a, a, 0x80008000; and.b32 b, b, 0x80008000; and.b32 c, c, 0x3f803f80; and.b32 d, d, 0x3f803f80; "
    "or.b32 $0, a, c; or.b32 $1, b, d; }"
)
E5M2 = "{ prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424; }"
_E4M3, _E5M2 = tl.constexpr(E4M3), tl.constexpr(E5M2)


@triton.jit
def _halves(low, high, factor, zero, BITS: tl.constexpr, SHIFT: tl.constexpr, MIDDLE: tl.constexpr,
            FORM: tl.constexpr, PURE: tl.constexpr):  # fmt: skip
    """f16 of codes in bytes, see `instructions`."""
    AT: tl.constexpr = (((BITS - 2) * 8 + SHIFT) * 3 + FORM) * 2 + (1 if MIDDLE else 0)
    if FORM == 2:
        return tl.inline_asm_elementwise(
            _PROGRAMS[AT], "=&r,=&r,r,r,r,r,r,r", [low, high, factor, zero], dtype=tl.float16, is_pure=PURE, pack=4
        )
    elif FORM == 1:
        return tl.inline_asm_elementwise(
            _PROGRAMS[AT], "=&r,=&r,r,r,r,r", [low, high, factor], dtype=tl.float16, is_pure=PURE, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _PROGRAMS[AT], "=&r,=&r,r,r", [low, high], dtype=tl.float16, is_pure=PURE, pack=4
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
            found = tl.inline_asm_elementwise(_E4M3, "=&r,=&r,r", [low], dtype=tl.float16, is_pure=not BY_ROWS, pack=4)
        elif FAST and KIND == 3:
            found = tl.inline_asm_elementwise(_E5M2, "=&r,=&r,r", [low], dtype=tl.float16, is_pure=not BY_ROWS, pack=4)
        elif FAST:
            found = _halves(low, high, low, low, BITS, SHIFT, KIND == 1 or MIDDLE != 0, 0, not BY_ROWS)
        else:
            found = _floats(low, high, KIND, BITS, SHIFT, MIDDLE).to(DOT)
    else:
        low, high = _bytes(data_ptr, unit, column, inside, WIDTH, BITS, U, J)
        stored = tl.load(scale_ptr + at, mask=known, other=0)
        if FAST:
            if zero_ptr is not None:
                zero = tl.inline_asm_elementwise(_ZEROS, "=&r,=&r,r", [tl.load(zero_ptr + at, mask=known, other=0)],
                                                 dtype=tl.float16, is_pure=True, pack=4)  # fmt: skip
                found = _halves(low, high, stored, zero, BITS, SHIFT, False, 2, not BY_ROWS)
            else:
                found = _halves(low, high, stored, stored, BITS, SHIFT, True, 1, not BY_ROWS)
        else:
            found = _floats(low, high, KIND, BITS, SHIFT, MIDDLE)
            if zero_ptr is not None:
                found -= tl.load(zero_ptr + at, mask=known, other=0).to(tl.float32)
            factor = scale_of(stored)
            if KIND == 2:
                factor = factor * 256.0
            found = (found * factor).to(DOT)
    return tl.reshape(found, (R, BLOCK))
