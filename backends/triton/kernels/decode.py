"""Bytes of packed weights to floats. Layout and order of the codes: see `qfx.backends.triton.layout`.

KIND: "int" (codes below 2^BITS), "lut" (two 4-bit codes, values from a table of 16), "e4m3", "e5m2". Three bits are a
tile of the lower two, `data`, and one of the upper bit, `upper`, with that of code i at bit 2 i + odd; `odd` is 0 or 1 and
broadcasts. Other KINDs do not read these two.

ASM is a block for four bytes (see `qfx.backends.triton.decode_asm`), or "" for the same steps in Triton's language.
"""

import triton
import triton.language as tl


@triton.jit
def code(data, upper, odd, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of every byte, int32."""
    wide = data.to(tl.int32)
    if BITS == 8:
        return wide
    if BITS == 4:
        return (wide >> (4 * i)) & 15
    found = (wide >> (2 * i)) & 3
    if BITS == 3:
        found |= ((upper.to(tl.int32) >> (2 * i + odd)) & 1) << 2
    return found


@triton.jit
def biased(data, upper, odd, i: tl.constexpr, BITS: tl.constexpr):
    """Code i of every byte plus `bias(i, BITS)` as f32, exactly, by putting it into the mantissa of a power of two."""
    if BITS == 3:  # bits 14 + 2 i to 16 + 2 i of the mantissa
        LOW: tl.constexpr = 14 + 2 * i
        bits = ((data.to(tl.int32) << 14) & (3 << LOW)) | ((127 + 9 - 2 * i) << 23)
        bits |= (upper.to(tl.int32) << (16 - odd)) & (4 << LOW)
    else:
        FIRST: tl.constexpr = 15 + BITS * i
        bits = ((data.to(tl.int32) << 15) & (((1 << BITS) - 1) << FIRST)) | ((127 + 8 - BITS * i) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bias(i: tl.constexpr, BITS: tl.constexpr):
    """What `biased` adds."""
    if BITS == 3:
        return 1 << (9 - 2 * i)
    return 1 << (8 - BITS * i)


@triton.jit
def half_of_byte(data, KIND: tl.constexpr):
    """f8e4m3 (over 256) or f8e5m2 as f16, exactly: both fit its bits."""
    wide = data.to(tl.uint16)
    if KIND == "e5m2":
        return (wide << 8).to(tl.float16, bitcast=True)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def exact(data, upper, odd, table_ptr, i: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """Value i of every byte before offset and scale, f32."""
    if KIND == "int":
        return code(data, upper, odd, i, BITS).to(tl.float32)
    if KIND == "lut":
        return tl.load(table_ptr + code(data, upper, odd, i, BITS))
    half = half_of_byte(data, KIND).to(tl.float32)
    return half * 256.0 if KIND == "e4m3" else half


@triton.jit
def value(data, upper, odd, table_ptr, i: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
          NATIVE: tl.constexpr, TO: tl.constexpr):  # fmt: skip
    """Value i of every byte, less OFFSET, in the type TO. NATIVE: the device converts f8e4m3 itself."""
    if NATIVE and KIND == "e4m3":
        return data.to(tl.float8e4nv, bitcast=True).to(TO)
    if KIND == "e5m2" and tl.float16 == TO:
        return half_of_byte(data, KIND)
    return (exact(data, upper, odd, table_ptr, i, BITS, KIND) - OFFSET).to(TO)


@triton.jit
def four_values(data, upper, odd, BITS: tl.constexpr, ASM: tl.constexpr, TO: tl.constexpr):
    """The values of all codes of a byte of 2 (or 3) bits, less the offset, by ASM."""
    if BITS == 3:
        shift = tl.zeros_like(data) + odd.to(tl.uint8)
        return tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r", [data, upper, shift], dtype=(TO, TO, TO, TO), is_pure=True, pack=4
        )
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r", [data], dtype=(TO, TO, TO, TO), is_pure=True, pack=4
    )


@triton.jit
def two_values(data, ASM: tl.constexpr, TO: tl.constexpr):
    """The values of both codes of a byte of 4 bits, less the offset, by ASM."""
    return tl.inline_asm_elementwise(ASM, "=r,=r,=r,=r,r", [data], dtype=(TO, TO), is_pure=True, pack=4)


@triton.jit
def one_value(data, ASM: tl.constexpr, TO: tl.constexpr):
    """The value of a byte of 8 bits, less the offset, by ASM."""
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [data], dtype=TO, is_pure=True, pack=4)


@triton.jit
def load_scale(pointer, mask, SCALE: tl.constexpr):
    """Stored scales as f32. SCALE: "" for floats, "e8m0" and "e4m3" for their bytes; 0 where masked."""
    if SCALE == "":
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
    stored = tl.load(pointer, mask=mask, other=0).to(tl.int32)
    if SCALE == "e8m0":  # code 0 is 2^-127, a subnormal
        return tl.where(stored == 0, 1 << 22, stored << 23).to(tl.float32, bitcast=True)
    half = ((stored & 128) << 8) | ((stored & 127) << 7)
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
