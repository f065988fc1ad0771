"""Rows of a packed table to floats."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import half_of_byte, load_scale
from qfx.backends.triton.kernels.early import wait_for_earlier


@triton.jit
def _bits(row_ptr, index, inside, width, BITS: tl.constexpr):
    """Element `index` of a little-endian stream of BITS each, `width` bytes long, int32; it lies in one byte or two."""
    if BITS == 8:
        found = tl.load(row_ptr + index, mask=inside, other=0).to(tl.int32)
    else:
        first = index * BITS // 8
        found = tl.load(row_ptr + first, mask=inside, other=0).to(tl.int32)
        if 8 % BITS != 0:
            beyond = tl.load(row_ptr + first + 1, mask=inside & (first + 1 < width), other=0).to(tl.int32)
            found |= beyond << 8
        found = (found >> (index * BITS % 8)) & ((1 << BITS) - 1)
    return found


@triton.jit
def _product(a, b, ASM: tl.constexpr):
    """a * b, rounded before anything is added to it."""
    if ASM:
        found = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True,
                                          pack=1)  # fmt: skip
    else:
        found = a * b
    return found


@triton.jit
def _scale(scale_ptr, above_ptr, map_ptr, at, inside, SCALE: tl.constexpr, ASM: tl.constexpr):
    """Effective scales at places `at`, f32: as `qfx.numerics.effective_scale` has them."""
    if SCALE == "dq":
        coded = tl.load(map_ptr + tl.load(scale_ptr + at, mask=inside, other=0).to(tl.int32))
        block = tl.load(above_ptr + 1 + at // 256, mask=inside, other=0.0)
        found = _product(coded, block, ASM) + tl.load(above_ptr)
        found = tl.where(tl.abs(found) < 1.1754943508222875e-38, 1.1754943508222875e-38, found)
    else:
        found = load_scale(scale_ptr + at, inside, SCALE)
        if SCALE == "e4m3":
            found *= tl.load(above_ptr)
    return found


@triton.jit
def embedding(ids_ptr, w_ptr, scale_ptr, zero_ptr, above_ptr, table_ptr, map_ptr, out_ptr, count, dim, width, groups,
              zero_width, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
              COLUMNS: tl.constexpr, OFFSET: tl.constexpr, ZERO_BITS: tl.constexpr, ASM: tl.constexpr,
              BLOCK: tl.constexpr, EARLY: tl.constexpr = False):  # fmt: skip
    """ids [tokens] to out [tokens, dim] from a table of `count` rows, `width` bytes each (elements of KIND "plain").

    A scale serves ROWS rows and COLUMNS columns (0: all of them); there are `groups` in a row of them. Zero points have
    ZERO_BITS each. NaN stands where an id is no row.
    """
    wait_for_earlier(EARLY)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token).to(tl.int64)
    known = (row >= 0) & (row < count)
    row = tl.where(known, row, 0)
    inside = column < dim
    if KIND == "plain":
        found = tl.load(w_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    else:
        code = _bits(w_ptr + row * width, column, inside, width, BITS)
        if KIND == "int":
            found = (code - OFFSET).to(tl.float32)
        elif KIND == "signed":
            found = ((code << 24) >> 24).to(tl.float32)
        elif KIND == "lut":
            found = tl.load(table_ptr + code)
        else:
            found = half_of_byte(code, KIND).to(tl.float32)
            if KIND == "e4m3":
                found *= 256.0
        line = row // ROWS if ROWS > 0 else row * 0
        group = column // COLUMNS if COLUMNS > 0 else column * 0
        if zero_ptr is not None:
            found -= _bits(zero_ptr + line * zero_width, group, inside, zero_width, ZERO_BITS).to(tl.float32)
        found *= _scale(scale_ptr, above_ptr, map_ptr, line * groups + group, inside, SCALE, ASM)
    found = tl.where(known, found, float("nan"))
    tl.store(out_ptr + token * dim + column, found.to(out_ptr.dtype.element_ty), mask=inside)
