"""Rows of 8-bit codes, sorted by expert, times codes of the weights of their experts, on the tensor cores.

    qfx_triton::grouped_gemm(codes, x_scale, x_zero?, weight[], offs, x_format, w_format, k, dtype) -> y [T, N]

With x rounded by `quantize_dynamic` it is `qfx::grouped_linear_quant`: integers as `gemm4` multiplies them, of 2 to 8
bits, per channel or in groups of whole multiples of 32; e4m3 as `gemm8` does. The host reads no value of offs, see
`kernels/experts.py`. `weight` and w_format come from `pack_grouped`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qfx.backends.triton import gemm4, gemm4_config, gemm8, gemm8_config, tuning
from qfx.backends.triton.device import Device
from qfx.backends.triton.experts import checked_ends, stacked, tiles_of
from qfx.backends.triton.kernels import experts_gemm as kernels
from qfx.backends.triton.launch import Config, device_of, launch
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.products import DTYPES, aligned_rows, check_devices, check_scales, constants_of, group_of
from qfx.backends.triton.row_codes import dense
from qfx.format import Format
from qfx.ops.floats import alone, of_expert

_TUNED = "experts_gemm"
_OF_ONE = ("TILES", "SPLIT", "HALVES", "GROUP", "PERSISTENT")  # constants of a configuration


def reason_against(x_format: str, w_format: str, k: int = 1) -> str | None:
    """Why experts of these formats over k have no kernel here, or None."""
    if not x_format:
        return "the activation is not quantized"
    if not Format.parse(x_format).dynamic:
        return f"'{x_format}': rows of experts have scales found at run time"
    if Format.parse(w_format).is_integer:
        return gemm4.reason_against(x_format, w_format, k)
    return gemm8.reason_against(x_format, w_format, k)


def pack_grouped(w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, k: int) -> tuple[list[Tensor], str]:
    """The tensors of a packed weight [E, N, K] as `pack_w4a8` or, of e4m3, `pack_gemm8` gives them, with E in front.

    And their format: nested scales are written out.
    """
    w_scale, w_zero, fmt = alone(w_scale, w_zero, Format.parse(w_format))
    pack = gemm4.pack_w4a8 if fmt.is_integer else gemm8.pack_gemm8
    made = [pack(w[e], *of_expert(w_scale, w_zero, e), str(fmt), k) for e in range(w.shape[0])]
    return stacked(made), str(fmt)


def grouped_gemm(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], offs: Tensor, x_format: str,
    w_format: str, k: int, dtype: str,
) -> Tensor:  # fmt: skip
    """codes [T, k or more] int8 (u8 less 128) or e4m3, sorted by expert, times a weight of `pack_grouped`: [T, N].

    x_scale, x_zero: as `quantize_dynamic` gives them. offs int32 or int64 [E]: where the rows of each expert end; rows
    after the last end give zeros. Raises ValueError for formats without a kernel and for tensors that do not fit.
    """
    xf, wf = Format.parse(x_format), Format.parse(w_format)
    _check(codes, x_scale, x_zero, weight, offs, xf, wf, k, dtype)
    offs = offs.to(torch.int32).contiguous()
    y = torch.empty(codes.shape[0], weight[0].shape[1], dtype=Format.parse(dtype).code_dtype, device=codes.device)
    if 0 in y.shape or not len(offs):
        return y.zero_()
    scale = x_scale.to(torch.float32).contiguous()
    if wf.is_integer:
        _integers(codes, scale, dense(x_zero) if xf.has_zero else None, weight, offs, y, xf, wf, k)
    else:
        _e4m3(codes, scale, weight, offs, y, xf, wf)
    return y


def _integers(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], offs: Tensor, y: Tensor, xf: Format,
    wf: Format, k: int,
) -> None:  # fmt: skip
    rows, device = aligned_rows(codes), device_of(codes)
    (t, n), experts, group = y.shape, len(offs), group_of(wf)
    bits, sub = gemm4.container(wf.bits), gemm4.columns_of(str(wf))
    problem = gemm4_config.Problem(n, k, bits, sub, group, wf.has_zero)
    config = _configuration(device, gemm4_config, problem, t, experts)
    x_sums = None
    if wf.has_zero and config["BLOCK_M"] > gemm4_config.FEW:
        x_sums = gemm4.sums_of(rows, k, problem.unit, sub if group else 0)
    tiles, by_row = tiles_of(t, experts, config["BLOCK_M"])
    told = {key: value for key, value in constants_of(xf, "").items() if key != "ACTIVATION"}
    launch(kernels.grouped_integers, (tiles * triton.cdiv(n, config["BLOCK_N"]),), rows, weight[0], y, x_scale, x_zero,
           x_sums, weight[1], weight[3] if wf.has_zero else None, weight[2] if xf.has_zero else None, offs, t, n, k,
           experts, tiles, rows.stride(0), weight[0].stride(1), weight[1].shape[1] if group else 1, **told, BITS=bits,
           SUB=sub, GROUP=group, ASM=not device.interpreted, EVEN_K=k % problem.unit == 0, BY_ROW=by_row,
           EXPERTS=triton.next_power_of_2(experts + 1), config=config)  # fmt: skip


def _e4m3(
    codes: Tensor, x_scale: Tensor, weight: list[Tensor], offs: Tensor, y: Tensor, xf: Format, wf: Format
) -> None:
    w, w_scale = weight
    device, (t, n), experts, k = device_of(codes), y.shape, len(offs), w.shape[2]
    rows, groups = aligned_rows(codes, k), (group_of(xf), group_of(wf))
    problem = gemm8_config.Problem(n, k, True, min((g for g in groups if g), default=0), device.by_hand)
    config = _configuration(device, gemm8_config, problem, t, experts)
    tiles, by_row = tiles_of(t, experts, config["BLOCK_M"])
    if device.by_hand:
        rows, w = rows.view(torch.uint8), w.view(torch.uint8)
    launch(kernels.grouped_e4m3, (tiles * triton.cdiv(n, config["BLOCK_N"]),), rows, w, y, x_scale, w_scale, offs, t,
           n, k, experts, tiles, rows.stride(0), x_scale.shape[-1] if groups[0] else 0,
           w_scale.shape[-1] if groups[1] else 0, w_scale[0].numel(), X_PER_ROW=xf.granularity == "tok",
           X_GROUP=groups[0], W_GROUP=groups[1], W_ROWS=wf.block[0] if wf.block else 1, BY_HAND=device.by_hand,
           EVEN_K=k % config["BLOCK_K"] == 0, BY_ROW=by_row, EXPERTS=triton.next_power_of_2(experts + 1),
           config=config)  # fmt: skip


def _configuration(device: Device, family: Any, problem: object, t: int, experts: int) -> Config:
    """The measured configuration of `t` rows, else by the rule of gemm4_config or gemm8_config for an even share."""

    def candidates(most: int) -> list[Config]:
        return [_kept(config) for config in family.unsplit_candidates(device, problem, -(-most // experts))]

    found = tuning.tuned(device, _TUNED, f"e={experts} {problem}", t, candidates)
    return found or _kept(family.unsplit(device, problem, -(-t // experts)))


def _kept(config: Config) -> Config:
    """Without what only the products of one weight have."""
    return {key: value for key, value in config.items() if key not in _OF_ONE}


def _check(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], offs: Tensor, xf: Format, wf: Format,
    k: int, dtype: str,
) -> None:  # fmt: skip
    if reason := reason_against(str(xf), str(wf), k):
        raise bad(f"there is no kernel: {reason}", "see the module's formats", f"'{xf}' times '{wf}'")
    count = (4 if wf.has_zero else 3) if wf.is_integer else 2
    if dtype not in DTYPES or len(weight) != count or weight[0].dim() != 3:
        found = f"{len(weight)} tensors, codes {list(weight[0].shape)}"
        raise bad(f"the weight is not packed as '{wf}'", f"{count} tensors of pack_grouped", found)
    kind, widths = (torch.int8, codes.shape[-1:]) if wf.is_integer else (torch.float8_e4m3fn, weight[0].shape[2:])
    if codes.dtype != kind or codes.dim() != 2 or not k <= codes.shape[1] <= widths[0]:
        raise bad("codes do not fit the weight", f"{kind} [T, {k} or more]", f"{codes.dtype}, {list(codes.shape)}")
    checked_ends(offs, weight[0])
    check_scales(codes, x_scale, x_zero, xf)
    check_devices(codes.device, (x_scale, x_zero, *weight, offs))


def _fake(codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], *given: object) -> Tensor:
    dtype = Format.parse(str(given[-1])).code_dtype
    return codes.new_empty((codes.shape[0], weight[0].shape[1]), dtype=dtype)


define(
    "grouped_gemm(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor[] weight, Tensor offs, str x_format, "
    "str w_format, int k, str dtype) -> Tensor",
    grouped_gemm,
    _fake,
)
