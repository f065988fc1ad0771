"""Bytes of packed weights to floats. Layout and order of the codes: see `qfx.backends.triton.layout`.

KIND: "int" (codes below 2^BITS), "lut" (two 4-bit codes, values from a table of 16), "e4m3", "e5m2". Three bits are a
tile of the lower two, `data`, and one of the upper bit, `upper`, with that of code i at bit 2 i + odd. odd: 0 or 1, or
a tile of them in uint8, but for the blocks of `values`, which know it.

ASM is a block for four bytes (see `qfx.backends.triton.decode_asm`), or "" for the same steps in Triton's language.
What differs at compile time stands in if and else: after a return in the first the compiler would go on.
"""
# ruff: noqa: RUF005, SIM300 (Triton's language has no starred tuples)

import triton
import triton.language as tl


@triton.constexpr_function
def parts_of(bits):
    """Codes in a byte of the lower plane, which are 128 / parts columns apart."""
    return {8: 1, 4: 2}.get(bits, 4)


@triton.jit
def code(data, upper, odd, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of every byte, int32."""
    wide = data.to(tl.int32)
    if BITS == 8:
        found = wide
    elif BITS == 4:
        found = (wide >> (4 * i)) & 15
    else:
        found = (wide >> (2 * i)) & 3
        if BITS == 3:
            found |= ((upper.to(tl.int32) >> (2 * i + odd)) & 1) << 2
    return found


@triton.jit
def half_of_byte(data, KIND: tl.constexpr):
    """f8e4m3 (over 256) or f8e5m2 as f16, exactly: both fit its bits."""
    wide = data.to(tl.uint16)
    if KIND == "e5m2":
        bits = wide << 8
    else:
        bits = ((wide & 128) << 8) | ((wide & 127) << 7)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def exact(data, upper, odd, table_ptr, i: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """Value i of every byte before offset and scale, f32."""
    if KIND == "int":
        found = code(data, upper, odd, i, BITS).to(tl.float32)
    elif KIND == "lut":
        found = tl.load(table_ptr + code(data, upper, odd, i, BITS))
    else:
        found = half_of_byte(data, KIND).to(tl.float32)
        if KIND == "e4m3":
            found *= 256.0
    return found


@triton.jit
def _value(data, upper, odd, table_ptr, i: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
           NATIVE: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """Value i of every byte, less OFFSET, in the type TO. NATIVE: the device converts f8e4m3 itself."""
    if NATIVE and KIND == "e4m3":
        found = data.to(tl.float8e4nv, bitcast=True).to(TO)
    elif KIND == "e5m2" and TO == tl.float16:
        found = half_of_byte(data, KIND)
    else:
        found = (exact(data, upper, odd, table_ptr, i, BITS, KIND) - OFFSET).to(TO)
    return found


@triton.jit
def values(data, upper, odd, table_ptr, OFFSET: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
           NATIVE: tl.constexpr, ASM: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """The values of all codes of a byte, less OFFSET: a tuple of one tile in the type TO for each."""
    PARTS: tl.constexpr = parts_of(BITS)
    tiles = ()
    if ASM == "":
        for i in tl.static_range(PARTS):
            tiles = tiles + (_value(data, upper, odd, table_ptr, i, OFFSET, BITS, KIND, NATIVE, TO),)
    else:
        if BITS == 8:
            raw = (tl.inline_asm_elementwise(ASM, "=r,=r,r", [data], dtype=tl.int16, is_pure=True, pack=4),)
        elif BITS == 4:
            raw = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,r", [data], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
        elif BITS == 2:
            raw = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [data], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
                pack=4,
            )  # fmt: skip
        else:
            raw = tl.inline_asm_elementwise(
                ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [data, upper], dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
                is_pure=True, pack=4,
            )  # fmt: skip
        for i in tl.static_range(PARTS):
            tiles = tiles + (raw[i].to(TO, bitcast=True),)
    return tiles


@triton.jit
def bias(i: tl.constexpr, BITS: tl.constexpr):
    """What `biased` adds to code i."""
    return 1 << (9 - 2 * i if BITS == 3 else 8 - BITS * i)


@triton.jit
def biased(data, upper, odd, BITS: tl.constexpr, ASM: tl.constexpr):
    """The codes of a byte as f32 tiles, each plus its `bias`, exactly: ASM makes them mantissas of powers of two."""
    PARTS: tl.constexpr = parts_of(BITS)
    if ASM == "":
        tiles = ()
        for i in tl.static_range(PARTS):
            tiles = tiles + (code(data, upper, odd, i, BITS).to(tl.float32) + bias(i, BITS),)
    elif BITS == 8:
        tiles = (tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [data], dtype=tl.float32, is_pure=True, pack=4),)
    elif BITS == 4:
        tiles = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [data], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    elif BITS == 2:
        tiles = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r", [data],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        tiles = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [data, upper, tl.zeros_like(data) + odd],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=4,
        )  # fmt: skip
    return tiles


@triton.jit
def load_scale(pointer, mask, SCALE: tl.constexpr):
    """Stored scales as f32. SCALE: "" for floats, "e8m0" and "e4m3" for their bytes; 0 where masked."""
    if mask is None:
        stored = tl.load(pointer)
    else:
        stored = tl.load(pointer, mask=mask, other=0)
    if SCALE == "e8m0":  # code 0 is 2^-127, a subnormal
        wide = stored.to(tl.int32)
        found = tl.where(wide == 0, 1 << 22, wide << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        found = half_of_byte(stored, SCALE).to(tl.float32) * 256.0
    else:
        found = stored.to(tl.float32)
    return found
