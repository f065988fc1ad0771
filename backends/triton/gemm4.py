"""Linears of 8-bit activations and weights of 2, 4 or 8 bits on the tensor cores for int8.

    qfx_triton::gemm4(codes, x_scale, x_zero?, weight[], bias?, residual?, x_format, w_format, k, activation, dtype)

As `gemm8`, for integer weights per channel, with one scale, or in groups (or blocks) of whole
multiples of 32 columns. Weights of 3 bits are held as 4, those of 5 to 7 as 8. Sums are exact: over all of k where a
channel has one scale, then equal to `qfx.ops.packed.linear`; over a group otherwise, and f32 across groups.
`weight` is what `pack_w4a8` makes of a weight.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qfx.backends.triton import layout
from qfx.backends.triton.gemm4_config import FEW, Problem, configuration
from qfx.backends.triton.kernels import gemm4 as kernels
from qfx.backends.triton.kernels.gemm8 import reduce8
from qfx.backends.triton.launch import Config, device_of, launch
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.products import (
    Ends,
    aligned_rows,
    check_devices,
    check_ends,
    check_scales,
    constants_of,
    group_of,
    product_fake,
)
from qfx.backends.triton.quantize_rows import reason_against as reason_against_input
from qfx.format import Format
from qfx.numerics import dequantize, effective_scale
from qfx.packing import unpack_codes, unpack_zeros

_LEAST = 32  # columns of an instruction
SUB = 128  # columns that one shift gives
_REACH = 128 * 128  # of a product of an input's code and a weight's, in the upper bits of its byte


def container(bits: int) -> int:
    """Bits in which codes of `bits` are held."""
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def columns_of(w_format: str) -> int:
    """Columns of x that one shift of a unit of bytes serves: a power of two that divides the groups, at most 128."""
    group = group_of(Format.parse(w_format))
    return min(group & -group, SUB) if group else SUB


@functools.lru_cache(maxsize=4096)
def reason_against(x_format: str, w_format: str, k: int = 1) -> str | None:
    """Why a linear of these formats over k has no kernel here, or None. Every device of `device.LEAST` takes all."""
    if not x_format:
        return "the activation is not quantized"
    xf, wf = Format.parse(x_format), Format.parse(w_format)
    if reason := reason_against_input(xf):
        return reason
    if not (xf.is_integer and wf.is_integer) or xf.group:
        return f"'{x_format}' and '{w_format}': activations are integers with a scale per token, weights are integers"
    if wf.dynamic or wf.granularity in ("tok", "head"):
        return f"weights of '{w_format}' have no kernel"
    if columns_of(w_format) < _LEAST:
        return f"'{w_format}': groups are whole multiples of {_LEAST} columns"
    if not group_of(wf) and k * max(_REACH, xf.reach * wf.reach) >= 2**31:
        return f"sums over {k} products of '{x_format}' and '{w_format}' pass 32 bits"
    return None


def pack_w4a8(w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, k: int) -> list[Tensor]:
    """The tensors of a packed weight [N, K] (see `qfx.packing`) as `gemm4` takes them, on the same device.

    Codes in units (see `layout.pack_halves`), uint8 [N, bytes]. Then per channel scale f32 [N], sums of codes less zero
    points int32 [N] and, with zero points, these int32 [N]; in groups scale [G, N], sums of values f32 [N], zero points
    int8 [G, N]. Zero points are less 2^(bits-1), as the codes are.
    """
    fmt = Format.parse(w_format)
    codes, zero = unpack_codes(w, fmt, k), unpack_zeros(w_zero, fmt, w_scale)
    n, held, sub = codes.shape[0], container(fmt.bits), columns_of(w_format)
    shift = 1 << (fmt.bits - 1) if fmt.has_zero else 0
    signed = (codes.to(torch.int16) - shift).to(torch.int8)
    unit = sub * 8 // held
    data = layout.pack_halves(signed.view(torch.uint8) & ((1 << held) - 1), held, unit)
    shifted = None if zero is None or not fmt.has_zero else zero.to(torch.int32) - shift
    if not group_of(fmt):
        scale = effective_scale(w_scale, zero, fmt).reshape(-1).expand(n).contiguous()
        sums = signed.sum(-1, dtype=torch.int32)
        if shifted is None:
            return [data, scale, sums]
        shifted = shifted.reshape(-1).expand(n).contiguous()
        return [data, scale, sums - k * shifted, shifted]
    values = dequantize(codes, fmt, w_scale, zero).sum(-1, dtype=torch.float64).to(torch.float32)
    plain = w_scale.dtype in (torch.float16, torch.bfloat16, torch.float32) and not fmt.has_global_scale
    scale = w_scale if plain else effective_scale(w_scale, zero, fmt)
    groups = -(-layout.padded(k, unit) // group_of(fmt))
    packed = [data, _bygroup_of(scale, fmt, n, groups), values]
    return packed if shifted is None else [*packed, _bygroup_of(shifted.to(torch.int8), fmt, n, groups)]


def _bygroup_of(values: Tensor, fmt: Format, n: int, groups: int) -> Tensor:
    """[N, G] (or of blocks) to [groups, N], zero behind G."""
    if fmt.block:
        values = values.repeat_interleave(fmt.block[0], 0)[:n]
    found = values.new_zeros(groups, n)
    found[: values.shape[1]] = values.t()
    return found


def gemm4(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    x_format: str,
    w_format: str,
    k: int,
    activation: str,
    dtype: str,
) -> Tensor:
    """codes int8 [.., k or more] (u8 less 128) times a weight [N, k] of `pack_w4a8`: [.., N] in `dtype`.

    x_scale: f32 [.., 1] per token, or one value; x_zero: uint8, as the reference's. Columns from k on are not read.
    Raises ValueError for formats without a kernel and for tensors that do not fit.
    """
    xf, wf = Format.parse(x_format), Format.parse(w_format)
    _check(codes, x_scale, x_zero, weight, bias, residual, xf, wf, k, activation, dtype)
    rows = aligned_rows(codes.reshape(codes.shape[:-1].numel(), codes.shape[-1]))
    m, n, group, sub = rows.shape[0], weight[0].shape[0], group_of(wf), columns_of(w_format)
    y = torch.empty(m, n, dtype=Format.parse(dtype).code_dtype, device=rows.device)
    inside = m <= FEW or not wf.has_zero
    x_sums = None if inside else sums_of(rows, k, sub * 8 // container(wf.bits), sub if group else 0)
    w_zero = weight[3] if wf.has_zero else None
    ends = Ends.of(y, xf, x_scale, x_zero, x_sums, weight[1], w_zero, weight[2], bias, residual)
    constants = constants_of(xf, activation)
    problem = Problem(n, k, container(wf.bits), sub, group, wf.has_zero)
    config = configuration(device_of(rows), problem, m)
    _started(rows, weight[0], y, ends, problem, config, constants)
    return y.reshape(*codes.shape[:-1], n)


def _started(
    rows: Tensor, w: Tensor, y: Tensor, ends: Ends, problem: Problem, config: Config,
    constants: dict[str, int | str],
) -> None:  # fmt: skip
    """Launch the product, and the sum of its parts where k is split."""
    (m, n), split = y.shape, config["SPLIT"]
    tiles = -(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"])
    kind = torch.float32 if problem.group else torch.int32
    out = y if split == 1 else torch.empty(split, m, n, dtype=kind, device=y.device)
    launch(kernels.gemm4, (tiles, split), rows, w, out, *ends, m, n, problem.k, rows.stride(0), w.stride(0),
           BITS=problem.bits, SUB=problem.sub, GROUP=problem.group, EVEN_K=problem.k % problem.unit == 0,
           ASM=not device_of(rows).interpreted, **constants, config=config)  # fmt: skip
    if split > 1:
        reduce_parts(out, y, ends_of_parts(ends, problem.group), problem.group, constants)


def ends_of_parts(ends: Ends, group: int) -> Ends:
    """What is left for parts of k: zero points of the weight are taken off already, but where sums of x are given."""
    return ends._replace(x_sums=None, w_zero=None) if group or ends.x_sums is None else ends


def reduce_parts(parts: Tensor, y: Tensor, ends: Ends, group: int, constants: dict[str, int | str]) -> None:
    """The sum over k of parts [SPLIT, m, n], in their order, and the epilogue."""
    (split, m, n) = parts.shape
    height = min(16, 1 << max(m - 1, 0).bit_length())
    launch(reduce8, (-(-m // height), -(-n // 128)), parts, y, *ends, m, n, X_GROUP=0, W_GROUP=group, **constants,
           SPLIT=split, BLOCK_M=height, BLOCK_N=128, config={"num_warps": 4, "num_stages": 1})  # fmt: skip


def sums_of(rows: Tensor, k: int, unit: int, sub: int) -> Tensor:
    """Sums of the codes of x: int32 [m], or of `sub` columns each, as many as there are in whole units, [parts, m]."""
    if not sub:
        return rows[:, :k].sum(-1, dtype=torch.int32)
    m, parts = rows.shape[0], layout.padded(k, unit) // sub
    found = torch.empty(parts, m, dtype=torch.int32, device=rows.device)
    block = min(1 << (parts - 1).bit_length(), 2048 // sub)
    launch(kernels.part_sums, (m, -(-parts // block)), rows, found, m, k, rows.stride(0), parts, SUB=sub, BLOCK=block,
           config={"num_warps": 2, "num_stages": 1})  # fmt: skip
    return found


def _check(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], bias: Tensor | None,
    residual: Tensor | None, xf: Format, wf: Format, k: int, activation: str, dtype: str,
) -> None:  # fmt: skip
    if reason := reason_against(str(xf), str(wf), k):
        raise bad(f"there is no kernel: {reason}", "see the module's formats", f"'{xf}' times '{wf}'")
    n, bits = weight[0].shape[0], container(wf.bits)
    width = layout.padded(k, columns_of(str(wf)) * 8 // bits) * bits // 8
    if len(weight) != (4 if wf.has_zero else 3) or tuple(weight[0].shape) != (n, width):
        found = f"{len(weight)} tensors, codes {list(weight[0].shape)}"
        raise bad(f"the weight is not packed as '{wf}' for k={k}", f"pack_w4a8: [N, {width}] bytes", found)
    check_input(codes, x_scale, x_zero, xf, k)
    check_ends(n, codes.shape[:-1], bias, residual, activation, dtype)
    check_devices(codes.device, (x_scale, x_zero, *weight, bias, residual))


def check_input(codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, xf: Format, k: int) -> None:
    """Raises ValueError where codes are not int8 [.., k or more] with as many scales as their format has."""
    if codes.dtype != torch.int8 or codes.shape[-1] < k:
        raise bad("codes do not fit the weight", f"int8, rows of {k} or more", f"{codes.dtype}, {list(codes.shape)}")
    check_scales(codes, x_scale, x_zero, xf)


define(
    "gemm4(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor[] weight, Tensor? bias, Tensor? residual, "
    "str x_format, str w_format, int k, str activation, str dtype) -> Tensor",
    gemm4,
    product_fake,
)
