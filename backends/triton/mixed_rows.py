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

import torch
import triton.language as tl
from torch import Tensor

from qfx.backends.triton import gemm4, layout
from qfx.backends.triton.decode_asm import decode_asm
from qfx.backends.triton.device import Device
from qfx.backends.triton.gemm4_config import FEW, Problem, candidates, heuristic
from qfx.backends.triton.kernels import mixed_rows as kernels
from qfx.backends.triton.kernels.weight_only import sum_splits
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.products import (
    aligned_rows,
    bad,
    check_devices,
    check_ends,
    constants_of,
    group_of,
)
from qfx.backends.triton.row_codes import dense
from qfx.backends.triton.tuning import tuned
from qfx.format import Format
from qfx.numerics import dequantize, effective_scale
from qfx.packing import unpack_codes, unpack_zeros

ROWS = 128  # rows of one width are padded to whole multiples, which tiles divide
WIDTHS = (8, 4, 2)
_SUB_OF_FLOATS = 64  # columns of x that a tile of bytes serves: 128 bytes of 16 bits
DEQUANTIZE = "DEQUANTIZE"  # in a configuration of float inputs: the weight is written out, torch multiplies
_MANY = 1024  # rows from which that is the rule
_LANGUAGE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

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


def columns_at_once(group: int, *, floats: bool = False) -> int:
    """Columns of x that a tile of bytes serves at once."""
    most = _SUB_OF_FLOATS if floats else gemm4.SUB
    return min(group & -group, most) if group else most


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
    group = _checked(codes, weight, bias, residual, x_format, w_formats, k, activation, dtype)
    gemm4.check_input(codes, x_scale, x_zero, xf, k)
    rows = aligned_rows(codes.reshape(codes.shape[:-1].numel(), codes.shape[-1]))
    order, *data, scale, sums = weight[:6]
    zero = weight[6] if len(weight) > 6 else None
    m, n, sub = rows.shape[0], scale.shape[-1], columns_at_once(group)
    y = torch.empty(m, n, dtype=Format.parse(dtype).code_dtype, device=rows.device)
    inside = zero is None or m <= FEW
    x_sums = None if inside else gemm4.sums_of(rows, k, 4 * sub, sub if group else 0)
    ends = (x_scale.to(torch.float32).contiguous(), dense(x_zero) if xf.has_zero else None, x_sums, scale, zero,
            sums if xf.has_zero else None, dense(bias),
            None if residual is None else residual.reshape(m, n).contiguous())  # fmt: skip
    constants = constants_of(xf, activation)
    config = _configuration(device_of(rows), weight, m, k, group)
    split, out = config["SPLIT"], y
    if split > 1:
        out = torch.empty(split, m, n, dtype=torch.float32 if group else torch.int32, device=y.device)
    launch(kernels.mixed_integer, _grid(order, m, config), rows, *_held(data), order, out, *ends, m, n, len(order), k,
           *_sizes(data), rows.stride(0), *(part.stride(0) for part in data), SUB=sub, GROUP=group,
           ASM=not device_of(rows).interpreted, EVEN_K=_even(k, data, sub), **constants, config=config)  # fmt: skip
    if split > 1:
        gemm4.reduce_parts(out, y, gemm4.ends_of_parts(ends, group), group, constants)
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
    group = _checked(x, weight, bias, residual, "", w_formats, k, activation, "f32")
    if smooth is not None:
        x = (x.to(torch.float32) / smooth).to(x.dtype)
    rows = x.reshape(x.shape[:-1].numel(), k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    n = weight[4].shape[-1]
    y = torch.empty(len(rows), n, dtype=x.dtype, device=x.device)
    _of_floats(rows, weight, dense(bias), None if residual is None else residual.reshape(y.shape), y, group, activation)
    return y.reshape(*x.shape[:-1], n)


def _of_floats(
    rows: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, y: Tensor, group: int,
    activation: str,
) -> None:  # fmt: skip
    order, *data, scale, _ = weight[:6]
    (m, k), n, device, sub = rows.shape, y.shape[1], device_of(rows), columns_at_once(group, floats=True)
    to = dot_dtype(rows.dtype)
    blocks = ["" if device.interpreted else decode_asm(Format(f"i{bits}"), to) for bits in WIDTHS]
    config = _of_float_rows(device, weight, m, k, group, rows.dtype, plain=not activation and residual is None)
    if DEQUANTIZE in config:
        full = _dequantized(weight, rows, n, group)
        torch.mm(rows, full.t(), out=y) if bias is None else torch.addmm(bias.to(y.dtype), rows, full.t(), out=y)
        return
    split = config["SPLIT"]
    out = y if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=y.device)
    launch(kernels.mixed_float, _grid(order, m, config), rows, *_held(data), order, out, scale,
           weight[6] if len(weight) > 6 else None, bias, None if residual is None else residual.contiguous(), m, n,
           len(order), k, *_sizes(data), rows.stride(0), *(part.stride(0) for part in data), SUB=sub, GROUP=group,
           ASM8=blocks[0], ASM4=blocks[1], ASM2=blocks[2], TO=_LANGUAGE[to], ACTIVATION=activation,
           EVEN_K=_even(k, data, sub), config=config)  # fmt: skip
    if split > 1:
        launch(sum_splits, (-(-m * n // 1024),), out, bias, y, m * n, n, SPLITS=split, BLOCK=1024,
               config={"num_warps": 4, "num_stages": 1})  # fmt: skip


def _dequantized(weight: list[Tensor], rows: Tensor, n: int, group: int) -> Tensor:
    """The weight [n, K] in the dtype of rows [m, K]."""
    order, *data, scale, _ = weight[:6]
    zero = weight[6] if len(weight) > 6 else None
    k, sub = rows.shape[1], columns_at_once(group, floats=True)
    full = torch.empty(n, k, dtype=rows.dtype, device=rows.device)
    launch(kernels.mixed_dequantize, (-(-k // sub), len(order) // 16), *_held(data), order, scale, zero,
           full, n, k, *_sizes(data), *(part.stride(0) for part in data), SUB=sub, GROUP=group, BLOCK_N=16,
           config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return full


def _configuration(device: Device, weight: list[Tensor], m: int, k: int, group: int) -> Config:
    problem = _problem(weight, k, group, columns_at_once(group))
    found = tuned(device, "gemm_mixed", _text(weight, problem), m, lambda: candidates(device, problem, m))
    return found or heuristic(device, problem, m)


def _of_float_rows(
    device: Device, weight: list[Tensor], m: int, k: int, group: int, dtype: torch.dtype, *, plain: bool
) -> Config:
    """Of float inputs. plain: k may be split, and the product may be torch's."""
    problem = _problem(weight, k, group, columns_at_once(group, floats=True))
    text = f"{_text(weight, problem)} {str(dtype).removeprefix('torch.')}"
    found = tuned(device, "linear_mixed", text, m, lambda: float_candidates(device, problem, m, dtype))
    config = dict(found or float_candidates(device, problem, m, dtype)[0])
    if plain:
        return config
    if DEQUANTIZE in config:
        config = dict(next(c for c in float_candidates(device, problem, m, dtype) if DEQUANTIZE not in c))
    return {**config, "SPLIT": 1}


def float_candidates(device: Device, problem: Problem, m: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth measuring for float inputs; the first is that of a rule."""
    height = max(16, min(1 << max(m - 1, 0).bit_length(), 64))
    tiles = [(height, 64), (height, 128), (height, 32)] if m <= 64 else [(64, 128), (128, 128), (64, 64)]
    if device.interpreted:
        tiles = [(min(height, 32), 32)]
    elif dtype == torch.float32:
        tiles = [(min(height, 64), 64), (min(height, 64), 32)]
    elif m > 64 and not problem.group:
        tiles = [tiles[1], tiles[0], tiles[2]]
    found: list[Config] = []
    for block_m, block_n in tiles:
        programs = -(-m // block_m) * -(-problem.n // block_n)
        fitting = max(1, min(2 * device.processors // max(programs, 1), problem.k // problem.unit // 4, 8))
        row = dtype.itemsize * 8 // problem.bits * block_m + block_n
        stages = max(2, min(5, (device.shared - 8192) // (row * problem.sub)))
        warps = 8 if block_m * block_n >= 64 * 128 else 4
        one = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TILES": 8, "num_warps": warps, "num_stages": stages}
        found += [{**one, "SPLIT": split} for split in (sorted({fitting, 1}, reverse=True) if m <= 64 else (1,))]
    if m > 64:
        found.insert(0 if m >= _MANY else len(found), {DEQUANTIZE: 1})
    return found


def _problem(weight: list[Tensor], k: int, group: int, sub: int) -> Problem:
    bits = min(bits for bits, part in zip(WIDTHS, weight[1:4], strict=True) if len(part))
    return Problem(len(weight[0]), k, bits, sub, group, len(weight) > 6)


def _text(weight: list[Tensor], problem: Problem) -> str:
    rows = " ".join(f"{len(part)}x{bits}" for bits, part in zip(WIDTHS, weight[1:4], strict=True) if len(part))
    return f"{problem} rows {rows}"


def _grid(order: Tensor, m: int, config: Config) -> tuple[int, int]:
    return -(-m // config["BLOCK_M"]) * (len(order) // config["BLOCK_N"]), config["SPLIT"]


def _held(data: list[Tensor]) -> list[Tensor | None]:
    return [part if len(part) else None for part in data]


def _sizes(data: list[Tensor]) -> tuple[int, int]:
    return len(data[0]), len(data[1])


def _even(k: int, data: list[Tensor], sub: int) -> bool:
    """Whether k is made of whole units of every width that occurs."""
    return all(k % (sub * 8 // bits) == 0 for bits, part in zip(WIDTHS, data, strict=True) if len(part))


def _checked(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, x_format: str, w_formats: str,
    k: int, activation: str, dtype: str,
) -> int:  # fmt: skip
    """The size of groups. Raises ValueError for what does not fit."""
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
    if not x_format and x.dtype not in _LANGUAGE:
        raise bad("activations are floats", "float16, bfloat16 or float32", x.dtype)
    check_devices(x.device, (*weight, bias, residual))
    return group


def _fake_gemm(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], bias: Tensor | None,
    residual: Tensor | None, x_format: str, w_formats: str, k: int, activation: str, dtype: str,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], weight[4].shape[-1]), dtype=Format.parse(dtype).code_dtype)


def _fake_linear(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, smooth: Tensor | None,
    w_formats: str, activation: str,
) -> Tensor:  # fmt: skip
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
