"""Floats times packed weights for some rows of x, where tensor cores read them from shared memory (sm_90).

As `weight_only_fragments`, whose unpacking this is, but the warps of a program have rows of weights side by side,
not parts of K: so x, which from some rows on would pass the L2 cache more often than the weights, is read once for all
of them, and brought into the weights' order of columns on its way to shared memory. Programs share K instead.
"""
# ruff: noqa: RUF005, SIM300 (Triton's language has no starred tuples)

import triton
import triton.language as tl

from qfx.backends.triton.kernels.decode import load_scale, parts_of
from qfx.backends.triton.kernels.early import wait_for_earlier
from qfx.backends.triton.kernels.weight_only_fragments import (
    below_of,
    blocks_of,
    column_of,
    group_of,
    lane_of,
    rows_of,
    sixteen,
    together_of,
    unpacked,
)


@triton.jit
def _left(tiles, FROM: tl.constexpr, COUNT: tl.constexpr, LANE: tl.constexpr):
    """COUNT tiles [W, 16, 4 LANE] as one, [16 W, COUNT 4 LANE], columns as tensor cores find them in four threads."""
    W: tl.constexpr = tiles[FROM].shape[0]
    if COUNT == 2:
        found = tl.join(tiles[FROM], tiles[FROM + 1])
    elif COUNT == 4:
        even, odd = tl.join(tiles[FROM], tiles[FROM + 2]), tl.join(tiles[FROM + 1], tiles[FROM + 3])
        found = tl.join(even, odd)
    else:
        first, second = tl.join(tiles[FROM], tiles[FROM + 4]), tl.join(tiles[FROM + 2], tiles[FROM + 6])
        even = tl.join(first, second)
        first, second = tl.join(tiles[FROM + 1], tiles[FROM + 5]), tl.join(tiles[FROM + 3], tiles[FROM + 7])
        found = tl.join(even, tl.join(first, second))
    found = found.reshape(16 * W, 4, LANE // 2, 2, COUNT).permute(0, 4, 2, 1, 3)
    return found.reshape(16 * W, COUNT * 4 * LANE)


@triton.jit
def _right(x, COUNT: tl.constexpr, LANE: tl.constexpr, TO: tl.constexpr):
    """x [T, COUNT / 2 places of 8 LANE columns] in the order of `_left`, [COUNT 4 LANE, T]."""
    T: tl.constexpr = x.shape[0]
    found = x.to(TO).reshape(T, COUNT // 2, 4, LANE // 2, 2, 2).permute(1, 5, 3, 2, 4, 0)
    return found.reshape(COUNT * 4 * LANE, T)


@triton.jit
def _read(x_rows, lower, above, block, last, k, BITS: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
          W: tl.constexpr):  # fmt: skip
    """What is wanted of a block, at most `last`: numbers of the lower planes, of the upper one, and x of each group."""
    LANE: tl.constexpr = lane_of(BITS, GROUP)
    PARTS: tl.constexpr = parts_of(BITS)
    TOGETHER: tl.constexpr = together_of(BITS, GROUP)
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    APART: tl.constexpr = 128 // PARTS
    WIDE: tl.constexpr = 8 * LANE
    fourth = tl.arange(0, 2 * W * 32) % 4 * LANE
    held = tl.minimum(block, last)
    data, upper, xs = (), (), ()
    if BITS == 3:
        upper = (sixteen(above, held * (4 * LANE) + fourth, W, LANE),)
    at = tl.arange(0, TOGETHER * WIDE)
    for h in tl.static_range(HALVES):
        data = data + (sixteen(lower, (held * HALVES + h) * (4 * LANE) + fourth, W, LANE),)
        for g in tl.static_range(PARTS // TOGETHER):
            begin = column_of(held * HALVES + h, APART // WIDE, WIDE)
            columns = begin + (g * TOGETHER + at // WIDE) * APART + at % WIDE
            if EVEN:
                x = tl.load(x_rows + columns[None, :])
            else:
                x = tl.load(x_rows + columns[None, :], mask=(columns < k)[None, :], other=0.0)
            xs = xs + (x,)
    return data, upper, xs


@triton.jit(do_not_specialize_on_alignment=["m", "each"])
def abreast(x_ptr, w_ptr, upper_ptr, scale_ptr, zero_ptr, whole_ptr, table_ptr, bias_ptr, out_ptr, m, n, k, x_stride,
            w_stride, upper_stride, scale_stride, each, BITS: tl.constexpr, KIND: tl.constexpr, SCALE: tl.constexpr,
            GROUP: tl.constexpr, OFFSET: tl.constexpr, ASM: tl.constexpr, ASM_ODD: tl.constexpr, GAIN: tl.constexpr,
            TO: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
            EARLY: tl.constexpr = False):  # fmt: skip
    """x [m, k] to out [m, n] = x @ w^T + bias, or, with SPLITS, to f32 [SPLITS, m, n], `each` blocks of K in each.

    Grid (cdiv(n, 16 W), SPLITS). T: rows of x, m or more. EVEN: k columns are whole units. Numbers: see `fragments`.
    """
    wait_for_earlier(EARLY)
    LANE: tl.constexpr = lane_of(BITS, GROUP)
    PARTS: tl.constexpr = parts_of(BITS)
    APART: tl.constexpr = 128 // PARTS  # columns from one place to the next
    HALVES: tl.constexpr = 2 if BITS == 3 else 1
    WIDE: tl.constexpr = 8 * LANE
    EACH: tl.constexpr = APART // WIDE
    TOGETHER: tl.constexpr = together_of(BITS, GROUP)
    GROUPS: tl.constexpr = PARTS // TOGETHER
    first, split = tl.program_id(0) * (16 * W), tl.program_id(1)
    blocks = blocks_of(k, BITS, GROUP)
    start = split * each
    end = tl.minimum(start + each, blocks)
    rows, tokens = rows_of(first, n, W, True), tl.arange(0, T)
    lower = w_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + rows * (w_stride // 2)
    above = upper_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + rows * (upper_stride // 2)
    outs = first + tl.arange(0, 16 * W)
    scales = scale_ptr + tl.minimum(outs, n - 1).to(tl.int64) * scale_stride
    x_rows = (x_ptr + tl.minimum(tokens, m - 1).to(tl.int64) * x_stride)[:, None]
    acc = tl.zeros([16 * W, T], tl.float32)
    data, upper, xs = _read(x_rows, lower, above, start, blocks - 1, k, BITS, GROUP, EVEN, W)
    for block in range(start, end):
        after = _read(x_rows, lower, above, block + 1, end - 1, k, BITS, GROUP, EVEN, W)
        for h in tl.static_range(HALVES):
            below = ()
            if zero_ptr is not None:
                for g in tl.static_range(GROUPS):
                    group = group_of(block * HALVES + h, g * TOGETHER * APART, EACH, WIDE, GROUP)
                    zero = tl.load(zero_ptr + rows * scale_stride + group)
                    below = below + (below_of(zero, W, LANE, GAIN, ASM != "", TO),)
            tiles = unpacked(data[h], upper[0] if BITS == 3 else data[h], below, h, table_ptr, OFFSET, BITS, KIND,
                             ASM_ODD if h else ASM, TO)  # fmt: skip
            for g in tl.static_range(GROUPS):
                left = _left(tiles, 2 * TOGETHER * g, 2 * TOGETHER, LANE)
                right = _right(xs[h * GROUPS + g], 2 * TOGETHER, LANE, TO)
                if GROUP > 0:
                    scale = load_scale(scales + group_of(block * HALVES + h, g * TOGETHER * APART, EACH, WIDE, GROUP),
                                       None, SCALE)  # fmt: skip
                    acc += tl.dot(left, right) * scale[:, None]
                else:
                    acc = tl.dot(left, right, acc)
        data, upper, xs = after
    here = outs < n
    times = tl.load(whole_ptr) * GAIN + tl.zeros([16 * W], tl.float32)
    if GROUP == 0:
        times *= load_scale(scales, None, SCALE)
    acc *= times[:, None]
    if bias_ptr is not None and SPLITS == 1:
        acc += tl.load(bias_ptr + outs, mask=here, other=0.0).to(tl.float32)[:, None]
    at = tokens.to(tl.int64)[None, :] * n + outs.to(tl.int64)[:, None] + tl.cast(split, tl.int64) * m * n
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=here[:, None] & (tokens < m)[None, :])
