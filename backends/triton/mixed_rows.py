"""Linears whose weight has rows of several formats (see `qfx.live.segments`), in one launch instead of one a segment.

    qfx_triton::gemm_mixed(codes, x_scale, x_zero?, weight[], bias?, residual?, x_format, w_formats, k, activation,
                           dtype)
    qfx_triton::linear_mixed(x, weight[], bias?, residual?, smooth?, w_formats, activation)      x stays in float

w_formats: the formats of the segments, joined by commas, integers of 2 to 8 bits per channel or in groups of one size
(a channel's scale then serves all of its groups). Rows are held as 2, 4 or 8 bits.
Integer inputs: sums as in `gemm4`, so those of channels equal `qfx.ops.packed.linear`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.backends.triton import gemm4, layout
from qfx.backends.triton.decode_asm import decode_asm
from qfx.backends.triton.gemm4_config import FEW
from qfx.backends.triton.kernels import mixed_rows as kernels
from qfx.backends.triton.kernels.weight_only import sum_splits
from qfx.backends.triton.launch import device_of, dot_dtype, launch
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.mixed_rows_config import DEQUANTIZE, WIDTHS, Mixed, columns_at_once, configuration, of_floats
from qfx.backends.triton.products import (
    Ends,
    aligned_rows,
    check_devices,
    check_ends,
    constants_of,
    group_of,
)
from qfx.backends.triton.row_codes import dense
from qfx.backends.triton.weight_only import LANGUAGE
from qfx.format import Format
from qfx.numerics import dequantize, effective_scale
from qfx.packing import unpack_codes, unpack_zeros

ROWS = 128  # rows of one width are padded to whole multiples, which tiles divide

Stored = tuple[Tensor, Tensor, Tensor | None, str]  # codes, scale, zero point and format of a segment
Piece = tuple[int, int, int]  # segment, and its rows start to stop


def reason_against(x_format: str, w_formats: Sequence[str], k: int = 1) -> str | None:
    """Why segments of these formats are not taken in one launch, or None."""
    for text in w_formats:
        if reason := gemm4.reason_against(x_format or "i8/tok", text, k):
            return reason
    found = {group_of(Format.parse(text)) for text in w_formats} - {0}
    return f"the segments have groups of {' and '.join(map(str, sorted(found)))}" if len(found) > 1 else None


def pack_mixed(segments: Sequence[Stored], pieces: Sequence[Piece], k: int, *, floats: bool) -> list[Tensor]:
    """The packed tensors of segments [rows, K] and the pieces of them that make the result, in its order.

    pieces: as `qfx.live.segments.pieces` gives them. floats: for float inputs. Returns order int32 [P], bytes of rows
    of 8, 4 and 2 bits (see `layout.pack_halves`; empty where there are none), scale f32 [n], sums of codes less zero
    points int32 [n] and, with zero points, these [n]; in groups scale [G, n], sums of values f32 [n], zero points int8
    [G, n].
    """
    formats = [Format.parse(stored[3]) for stored in segments]
    group = max(map(group_of, formats))
    parts = [_segment(stored, k, group) for stored in segments]
    begun, offset = [], 0
    for codes, *_ in parts:
        begun.append(offset)
        offset += len(codes)
    taken = torch.cat([torch.arange(begun[i] + start, begun[i] + stop) for i, start, stop in pieces])
    n, device = len(taken), parts[0][0].device
    where = torch.full((offset,), n, dtype=torch.int32)  # of each row in the result
    where[taken] = torch.arange(n, dtype=torch.int32)
    orders, data, sub = [], [], columns_at_once(group, floats=floats)
    for bits in WIDTHS:
        mine = [i for i, fmt in enumerate(formats) if gemm4.container(fmt.bits) == bits]
        order = torch.cat([where[:0], *(where[begun[i] : begun[i] + len(parts[i][0])] for i in mine)])
        codes = torch.cat([parts[0][0][:0], *(parts[i][0] for i in mine)])
        padding = -len(order) % ROWS
        orders.append(torch.nn.functional.pad(order, (0, padding), value=n))
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        stored = codes.to(torch.int16) + (1 << (bits - 1) if floats else 0)
        data.append(layout.pack_halves((stored & ((1 << bits) - 1)).to(torch.uint8), bits, sub * 8 // bits))
    scale, zero, sums = (torch.cat(values)[taken.to(device)] for values in list(zip(*parts, strict=True))[1:])
    ends = [scale.t().contiguous(), sums, zero.t().contiguous()] if group else [scale[:, 0], sums, zero[:, 0]]
    if not any(fmt.has_zero for fmt in formats):
        ends.pop()
    elif group or floats:
        ends[2] = ends[2].to(torch.int8)
    return [torch.cat(orders).to(device), *data, *(end.contiguous() for end in ends)]


def _segment(stored: Stored, k: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Signed codes int8 [rows, K], scale f32 and zero point int32 [rows, groups] (less half the range), and sums."""
    w, w_scale, w_zero, text = stored
    fmt = Format.parse(text)
    codes, zero = unpack_codes(w, fmt, k), unpack_zeros(w_zero, fmt, w_scale)
    shift = 1 << (fmt.bits - 1) if fmt.has_zero else 0
    signed, n = (codes.to(torch.int16) - shift).to(torch.int8), len(codes)
    scale = effective_scale(w_scale, zero, fmt)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    if fmt.has_zero and zero is not None:
        zeros = zero.to(torch.int32) - shift
    if group:
        sums = dequantize(codes, fmt, w_scale, zero).sum(-1, dtype=torch.float64).to(torch.float32)
    else:
        sums = signed.sum(-1, dtype=torch.int32) - k * zeros.reshape(-1)
    return signed, _spread(scale, fmt, n, k, group), _spread(zeros, fmt, n, k, group), sums


def _spread(values: Tensor, fmt: Format, n: int, k: int, group: int) -> Tensor:
    """[rows, 1], or as many as there are groups in whole units of any width; zero behind k."""
    if not group:
        return values.reshape(-1, 1).expand(n, 1)
    if fmt.block:
        values = values.repeat_interleave(fmt.block[0], 0)[:n]
    count = -(-k // group)
    found = values.new_zeros(n, -(-layout.padded(k, 4 * columns_at_once(group)) // group))
    found[:, :count] = values if group_of(fmt) else values.reshape(-1, 1)
    return found


def gemm_mixed(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    x_format: str,
    w_formats: str,
    k: int,
    activation: str,
    dtype: str,
) -> Tensor:
    """As `gemm4`, for a weight of `pack_mixed`: codes int8 [.., k or more] to [.., n] in `dtype`."""
    xf = Format.parse(x_format)
    w = _checked(codes, weight, bias, residual, x_format, w_formats, k, activation, dtype)
    gemm4.check_input(codes, x_scale, x_zero, xf, k)
    rows = aligned_rows(codes.reshape(codes.shape[:-1].numel(), codes.shape[-1]))
    m, n, sub = rows.shape[0], w.n, columns_at_once(w.group)
    y = torch.empty(m, n, dtype=Format.parse(dtype).code_dtype, device=rows.device)
    inside = w.zero is None or m <= FEW
    x_sums = None if inside else gemm4.sums_of(rows, k, 4 * sub, sub if w.group else 0)
    ends = Ends.of(y, xf, x_scale, x_zero, x_sums, w.scale, w.zero, w.sums, bias, residual)
    constants = constants_of(xf, activation)
    config = configuration(device_of(rows), w, m, k)
    split, out = config["SPLIT"], y
    if split > 1:
        out = torch.empty(split, m, n, dtype=torch.float32 if w.group else torch.int32, device=y.device)
    launch(kernels.mixed_integer, w.grid(m, config), rows, *w.held, w.order, out, *ends, m, n, len(w.order), k,
           *w.counts, rows.stride(0), *w.strides, SUB=sub, GROUP=w.group, ASM=not device_of(rows).interpreted,
           EVEN_K=w.is_even(k, sub), **constants, config=config)  # fmt: skip
    if split > 1:
        gemm4.reduce_parts(out, y, gemm4.ends_of_parts(ends, w.group), w.group, constants)
    return y.reshape(*codes.shape[:-1], n)


def linear_mixed(
    x: Tensor,
    weight: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    smooth: Tensor | None,
    w_formats: str,
    activation: str,
) -> Tensor:
    """x [.., K] float, divided by smooth [K], times a weight of `pack_mixed`; activation and residual. In x.dtype.

    Codes less zero points are exact in x.dtype, sums are f32.
    """
    k = x.shape[-1]
    w = _checked(x, weight, bias, residual, "", w_formats, k, activation, "f32")
    if smooth is not None:
        x = (x.to(torch.float32) / smooth).to(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = torch.empty(len(rows), w.n, dtype=x.dtype, device=x.device)
    _of_floats(rows, w, dense(bias), None if residual is None else residual.reshape(y.shape), y, activation)
    return y.reshape(*x.shape[:-1], w.n)


def _of_floats(
    rows: Tensor, w: Mixed, bias: Tensor | None, residual: Tensor | None, y: Tensor, activation: str
) -> None:
    (m, k), n, device, sub = rows.shape, y.shape[1], device_of(rows), columns_at_once(w.group, floats=True)
    to = dot_dtype(rows.dtype)
    blocks = ["" if device.interpreted else decode_asm(Format(f"i{bits}"), to) for bits in WIDTHS]
    config = of_floats(device, w, m, k, rows.dtype, plain=not activation and residual is None)
    if DEQUANTIZE in config:
        full = _dequantized(w, rows)
        torch.mm(rows, full.t(), out=y) if bias is None else torch.addmm(bias.to(y.dtype), rows, full.t(), out=y)
        return
    split = config["SPLIT"]
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    launch(kernels.mixed_float, w.grid(m, config), rows, *w.held, w.order, out, w.scale, w.zero, bias,
           None if residual is None else residual.contiguous(), m, n, len(w.order), k, *w.counts, rows.stride(0),
           *w.strides, SUB=sub, GROUP=w.group, ASM8=blocks[0], ASM4=blocks[1], ASM2=blocks[2], TO=LANGUAGE[to],
           ACTIVATION=activation, EVEN_K=w.is_even(k, sub), config=config)  # fmt: skip
    if split > 1:
        launch(sum_splits, (-(-m * n // 1024),), out, bias, y, m * n, n, SPLITS=split, BLOCK=1024, ACT="",
               config={"num_warps": 4, "num_stages": 1})  # fmt: skip


def _dequantized(w: Mixed, rows: Tensor) -> Tensor:
    """The weight [n, K] in the dtype of rows [m, K]."""
    k, sub = rows.shape[1], columns_at_once(w.group, floats=True)
    full = torch.empty(w.n, k, dtype=rows.dtype, device=rows.device)
    launch(kernels.mixed_dequantize, (-(-k // sub), len(w.order) // 16), *w.held, w.order, w.scale, w.zero, full, w.n,
           k, *w.counts, *w.strides, SUB=sub, GROUP=w.group, BLOCK_N=16,
           config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return full


def _checked(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, x_format: str, w_formats: str,
    k: int, activation: str, dtype: str,
) -> Mixed:  # fmt: skip
    """The weight by its parts. Raises ValueError for what does not fit."""
    formats = w_formats.split(",")
    if reason := reason_against(x_format, formats, k):
        raise bad(f"there is no kernel: {reason}", "see the module's formats", f"'{x_format}' times {w_formats}")
    parsed = [Format.parse(text) for text in formats]
    group = max(map(group_of, parsed))
    sub = columns_at_once(group, floats=not x_format)
    count = 7 if any(fmt.has_zero for fmt in parsed) else 6
    widths = [layout.padded(k, sub * 8 // bits) * bits // 8 for bits in WIDTHS]
    if len(weight) != count or [part.shape[1] for part in weight[1:4]] != widths:
        found = f"{len(weight)} tensors, rows of {[part.shape[-1] for part in weight[1:4]]} bytes"
        raise bad(f"the weight is not packed as '{w_formats}' for k={k}", f"{count}, rows of {widths}", found)
    check_ends(weight[4].shape[-1], x.shape[:-1], bias, residual, activation, dtype)
    if not x_format and x.dtype not in LANGUAGE:
        raise bad("activations are floats", "float16, bfloat16 or float32", x.dtype)
    check_devices(x.device, (*weight, bias, residual))
    return Mixed.of(weight, group)


def _fake_gemm(codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], *given: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight[4].shape[-1]), dtype=Format.parse(given[-1]).code_dtype)


def _fake_linear(x: Tensor, weight: list[Tensor], *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[4].shape[-1]))


define(
    "gemm_mixed(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor[] weight, Tensor? bias, Tensor? residual, "
    "str x_format, str w_formats, int k, str activation, str dtype) -> Tensor",
    gemm_mixed,
    _fake_gemm,
)
define(
    "linear_mixed(Tensor x, Tensor[] weight, Tensor? bias, Tensor? residual, Tensor? smooth, str w_formats, "
    "str activation) -> Tensor",
    linear_mixed,
    _fake_linear,
)
