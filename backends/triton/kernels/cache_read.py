"""The tokens of a packed cache as floats, each in its place."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.cache_attention import head_of
from qfx.backends.triton.kernels.cache_codes import scale_of, tile
from qfx.backends.triton.kernels.early import wait_for_earlier


@triton.jit
def read_tokens(out_ptr, length_ptr, stored_ptr, first_ptr, newest_ptr, data_ptr, scale_ptr, zero_ptr, heads,
                own_heads, groups, rows, scale_rows, places, WIDTH: tl.constexpr, SINKS: tl.constexpr,
                ROOM: tl.constexpr, ALL: tl.constexpr, X_SCALES: tl.constexpr, X_MODE: tl.constexpr,
                X_KIND: tl.constexpr, X_BITS: tl.constexpr, X_MIDDLE: tl.constexpr, X_GROUP: tl.constexpr,
                U: tl.constexpr, SINKS_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK: tl.constexpr,
                EARLY: tl.constexpr = False):  # fmt: skip
    """Program (head of a sequence, block of units): out [B, G, places, WIDTH], 0 where there is no token."""
    wait_for_earlier(EARLY)
    tokens = tl.load(length_ptr).to(tl.int32)
    stored = tl.load(stored_ptr).to(tl.int32)
    batch = (tl.program_id(0) // own_heads).to(tl.int64)
    own = batch * own_heads + tl.program_id(0) % own_heads
    g = tl.program_id(0) % own_heads
    if not ALL:
        g = head_of(g, heads)
    both = batch * groups + g
    column = tl.arange(0, BLOCK)[None, :]
    out_ptr += both * places * WIDTH
    if SINKS > 0:
        if tl.program_id(1) == 0:
            place = tl.arange(0, SINKS_BLOCK)[:, None]
            inside = (place < SINKS) & (column < WIDTH)
            x = tl.load(first_ptr + both * SINKS * WIDTH + place * WIDTH + column, mask=inside & (place < tokens),
                        other=0.0)  # fmt: skip
            tl.store(out_ptr + place * WIDTH + column, x, mask=inside & (place < places))
    data_ptr += own * rows * WIDTH
    if X_MODE != 0:
        scale_ptr += own * scale_rows * X_SCALES
    if zero_ptr is not None:
        zero_ptr += own * scale_rows * X_SCALES
    unit = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    for J in tl.static_range(U):
        token = unit * U + J
        x = tile(data_ptr, scale_ptr, zero_ptr, tl.program_id(1) * BLOCK_R, stored // U, WIDTH, X_SCALES, X_MODE,
                 X_KIND, X_BITS, X_MIDDLE, X_GROUP, U, J, BLOCK_R, BLOCK, tl.float32, False, False)  # fmt: skip
        if X_MODE == 1:
            if zero_ptr is not None:
                x -= tl.load(zero_ptr + token, mask=token < stored, other=0).to(tl.float32)
            step = scale_of(tl.load(scale_ptr + token, mask=token < stored, other=1))
            if X_KIND == 2:
                step *= 256.0
            x *= step
        late = token - stored
        held = (late >= 0) & (late < ROOM) & (late < tokens - SINKS - stored)
        newest = tl.load(newest_ptr + both * ROOM * WIDTH + late * WIDTH + column, mask=held & (column < WIDTH),
                         other=0.0)  # fmt: skip
        x = tl.where(token < stored, x.to(newest.dtype), newest)
        place = token + SINKS
        tl.store(out_ptr + place * WIDTH + column, x, mask=(place < places) & (column < WIDTH))
