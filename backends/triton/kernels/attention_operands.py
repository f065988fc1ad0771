"""Queries, keys and values of attention, rounded to their formats and laid out as the attention kernels read them."""

import triton
import triton.language as tl

from qfx.backends.triton.kernels.rounding import extremes, greater, guarded, round_even


@triton.jit
def round_mantissa(x, BITS: tl.constexpr, LEAST: tl.constexpr):
    """f32 rounded, half to even, to floats of BITS mantissa bits whose least normal value is LEAST (a power of two).

    1.5 * 2^(23 - BITS) times the power of two at or below |x| pushes the other bits out of an f32.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    push = tl.maximum(power, LEAST) * (1.5 * (1 << (23 - BITS)))
    return (x + push) - push


@triton.jit
def codes_of_steps(steps, zero, INTEGER: tl.constexpr, BITS: tl.constexpr, LEAST: tl.constexpr, QMIN: tl.constexpr,
                   QMAX: tl.constexpr):  # fmt: skip
    """Codes without their zero point, f32, of values divided by their scale: integers, or floats of BITS bits."""
    if INTEGER:
        # in one clamp what clamp(round(steps) + zero) - zero is; the first bounds keep round_even in its range
        whole = round_even(tl.minimum(tl.maximum(steps, QMIN - QMAX), QMAX - QMIN))
        return tl.minimum(tl.maximum(whole, QMIN - zero), QMAX - zero)
    return round_mantissa(tl.minimum(tl.maximum(steps, QMIN), QMAX), BITS, LEAST)


@triton.jit
def _row_scale(x, CLIP: tl.constexpr, AFFINE: tl.constexpr, QMAX: tl.constexpr):
    """(scale, zero point) f32 [rows] of each row of x f32 [rows, D], in which padding is 0."""
    low, high = extremes(x, 1)
    low, high = low * CLIP, high * CLIP
    most = tl.full(low.shape, QMAX, tl.float32)
    if AFFINE:
        scale = guarded(tl.div_rn(high, most) - tl.div_rn(low, most))
        return scale, tl.minimum(round_even(tl.div_rn(-low, scale)), QMAX)
    scale = guarded(tl.div_rn(greater(-low, high), most))
    return scale, tl.zeros_like(scale)


@triton.jit
def round_operand(x_ptr, mean_ptr, scale_ptr, zero_ptr, times_ptr, codes_ptr, step_ptr, bias_ptr, rows, x_b, x_h, x_s,
                  scale_h, times_h, factor, SHARE: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr,
                  BY_ROW: tl.constexpr, INTEGER: tl.constexpr, AFFINE: tl.constexpr, BITS: tl.constexpr,
                  LEAST: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, CLIP: tl.constexpr,
                  MULTIPLIED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """x [B, H, rows, D], strides x_b, x_h, x_s, 1 -> codes [B, H, rows, WIDTH], zeros beyond D, of codes_ptr's type.

    Grid (B, H, blocks of rows): only the first axis has room for any number of sequences.
    mean f32 [B, H / SHARE, D]: CENTRED, it is taken off x. SCALED: there is a scale, of each row (BY_ROW), or scale and
    zero f32 [H] with the stride scale_h; the others stay floats, rounded to BITS bits where BITS > 0. MULTIPLIED: codes
    times their scale. step f32 [B, H, rows]: scale * factor * times[h / SHARE]. bias f32 [B, H, rows]: x mean * factor.
    """
    head, batch = tl.program_id(1), tl.program_id(0)
    row = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    own = head // SHARE
    before = batch.to(tl.int64) * tl.num_programs(1) + head
    x_at = x_ptr + batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + row.to(tl.int64)[:, None] * x_s
    x = tl.load(x_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if mean_ptr is not None:
        mean_at = mean_ptr + (batch * (tl.num_programs(1) // SHARE) + own).to(tl.int64) * D
        mean = tl.load(mean_at + column, mask=column < D, other=0.0)
        if bias_ptr is not None:
            tl.store(bias_ptr + before * rows + row, tl.sum(x * mean[None, :], 1) * factor, mask=row < rows)
        if CENTRED:
            x = tl.where(inside, x - mean[None, :], 0.0)
    scale = tl.full((BLOCK,), 1.0, tl.float32)
    if SCALED:
        zero = tl.zeros_like(scale)
        if BY_ROW:
            scale, zero = _row_scale(x, CLIP, AFFINE, QMAX)
        else:
            scale *= tl.load(scale_ptr + head * scale_h)
            if zero_ptr is not None:
                zero += tl.load(zero_ptr + head * scale_h)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        x = codes_of_steps(x, zero[:, None], INTEGER, BITS, LEAST, QMIN, QMAX)
        if MULTIPLIED:
            x = x * scale[:, None]
    elif BITS > 0:
        x = round_mantissa(x, BITS, LEAST)
    codes_at = codes_ptr + before * rows * WIDTH + row.to(tl.int64)[:, None] * WIDTH
    tl.store(codes_at + column[None, :], x.to(codes_ptr.dtype.element_ty), mask=(row < rows)[:, None])
    if step_ptr is not None:
        step = scale * factor
        if times_ptr is not None:
            step = step * tl.load(times_ptr + own * times_h)
        tl.store(step_ptr + before * rows + row, step, mask=row < rows)
