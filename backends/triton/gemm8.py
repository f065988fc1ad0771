"""Linears of 8-bit activations and 8-bit weights on the tensor cores: integers exactly, e4m3 with f32 sums.

    qfx_triton::gemm8(codes, x_scale, x_zero?, weight[], bias?, residual?, x_format, w_format, activation, dtype) -> y

y = activation(x w^T + bias) + residual in `dtype` ("f16", "bf16", "f32"), activation "", "gelu", "gelu_tanh" or "silu".
`gemm8` takes what `quantize_dynamic` or a producer that quantizes gives: with x rounded it is `qfx.ops.packed.linear`
for these formats. `weight` is what `pack_gemm8` makes of a weight.

Integer weights of 2 to 8 bits, per channel or for the tensor, are held as int8. e4m3 weights have scales per channel,
for the tensor, in blocks or groups (`f8e4m3/b128x128` with `f8e4m3/g128/dyn`, as in DeepSeek-V3, arXiv 2412.19437).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from qfx.backends.triton import descriptors
from qfx.backends.triton.device import Device
from qfx.backends.triton.gemm8_config import Problem, configuration, heuristic
from qfx.backends.triton.kernels import gemm8 as kernels
from qfx.backends.triton.kernels.gemm8_described import gemm8_described
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
from qfx.backends.triton.quantize_rows import aligned, shift_of
from qfx.backends.triton.quantize_rows import reason_against as reason_against_input
from qfx.format import Format
from qfx.packing import unpack_codes, unpack_zeros

_LEAST_GROUP = 32


@functools.lru_cache(maxsize=4096)
def reason_against(x_format: str, w_format: str, k: int = 1) -> str | None:
    """Why a linear of these formats over k has no kernel here, or None. Every device of `device.LEAST` takes all."""
    if not x_format:
        return "the activation is not quantized"
    xf, wf = Format.parse(x_format), Format.parse(w_format)
    if reason := reason_against_input(xf):
        return reason
    if xf.is_integer != wf.is_integer or (wf.is_float and wf.type != "f8e4m3") or wf.is_plain:
        return f"'{x_format}' and '{w_format}' have no product of 8 bits: both are integers, or both f8e4m3"
    if wf.has_global_scale or wf.dynamic or wf.granularity in ("tok", "head"):
        return f"weights of '{w_format}' have no kernel of 8 bits"
    if wf.is_integer:
        if wf.granularity not in ("", "ch"):
            return f"'{w_format}': integer products take weights with a scale for the tensor or per channel"
        if k * xf.reach * wf.reach >= 2**31:
            return f"sums over {k} products of '{x_format}' and '{w_format}' pass 32 bits"
        return None
    for fmt in (xf, wf):
        group = group_of(fmt)
        if group and (group & (group - 1) or group < _LEAST_GROUP):
            return f"'{fmt}': groups of a product are powers of two from {_LEAST_GROUP} on"
    return None


def pack_gemm8(w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, k: int) -> list[Tensor]:
    """The tensors of a packed weight [N, K] (see `qfx.packing`) as `gemm8` takes them, on the same device.

    Integers: codes int8 [N, aligned(K)], scale f32 [N], sums of codes less zero points int32 [N] and, with zero points,
    these int32 [N]. e4m3: codes [N, aligned(K)] and scale f32 [N], or [N / R, K / G] of blocks or groups.
    """
    fmt = Format.parse(w_format)
    codes = unpack_codes(w, fmt, k)
    zero = unpack_zeros(w_zero, fmt, w_scale)
    n, width = codes.shape[0], aligned(k)
    scale = w_scale.to(torch.float32)
    if not group_of(fmt):
        scale = scale.reshape(-1).expand(n)
    scale = scale.contiguous()
    if fmt.is_float:
        padded = codes.new_zeros(n, width)
        padded[:, :k] = codes
        return [padded, scale]
    shift = shift_of(fmt)
    padded = torch.zeros(n, width, dtype=torch.int8, device=w.device)
    padded[:, :k] = (codes.to(torch.int16) - shift).to(torch.int8)
    sums = padded.sum(-1, dtype=torch.int32)
    if zero is None:
        return [padded, scale, sums]
    shifted = (zero.to(torch.int32) - shift).reshape(-1).expand(n).contiguous()
    return [padded, scale, sums - k * shifted, shifted]


def gemm8(
    codes: Tensor,
    x_scale: Tensor,
    x_zero: Tensor | None,
    weight: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    x_format: str,
    w_format: str,
    activation: str,
    dtype: str,
) -> Tensor:
    """codes [.., K or aligned(K)] int8 (u8 less 128) or e4m3 times a weight of `pack_gemm8`: [.., N] in `dtype`.

    x_scale: f32 [.., 1] per token, one value for the tensor, [.., G] in groups; x_zero: uint8, as the reference's.
    Raises ValueError for formats without a kernel and for tensors that do not fit.
    """
    xf, wf = Format.parse(x_format), Format.parse(w_format)
    w, w_scale = weight[:2]
    n, k = w.shape
    device = device_of(codes)
    _check(codes, x_scale, x_zero, weight, bias, residual, xf, wf, activation, dtype)
    rows = aligned_rows(codes.reshape(codes.shape[:-1].numel(), codes.shape[-1]), k)
    m = rows.shape[0]
    y = torch.empty(m, n, dtype=Format.parse(dtype).code_dtype, device=rows.device)
    groups, by_hand = (group_of(xf), group_of(wf)), wf.is_float and device.by_hand
    problem = Problem(n, k, wf.is_float, min((g for g in groups if g), default=0), by_hand)
    config = configuration(device, problem, m)
    x_sums = rows.sum(-1, dtype=torch.int32) if wf.has_zero else None
    w_sums, w_zero = None if wf.is_float else weight[2], weight[3] if wf.has_zero else None
    ends = Ends.of(y, xf, x_scale, x_zero, x_sums, w_scale, w_zero, w_sums, bias, residual)
    constants = {**constants_of(xf, activation), "X_GROUP": groups[0], "W_GROUP": groups[1]}
    inner = {"W_ROWS": wf.block[0] if wf.block else 1, "FLOAT": wf.is_float, "BY_HAND": by_hand}
    widths = (x_scale.shape[-1] if groups[0] else 0, w_scale.shape[-1] if groups[1] else 0)
    if by_hand:
        rows, w = rows.view(torch.uint8), w.view(torch.uint8)
    if config.get("DESCRIPTORS") and not _describable(device, rows, w):
        config = heuristic(device, problem, m)  # the same sums, by pointers
    _started(rows, w, y, ends, widths, config, constants, inner, device)
    return y.reshape(*codes.shape[:-1], n)


def _started(
    rows: Tensor, w: Tensor, y: Tensor, ends: Ends, widths: tuple[int, int], config: Config,
    constants: dict[str, int | str], inner: dict[str, int], device: Device,
) -> None:  # fmt: skip
    """Launch the product, and the sum of its parts where k is split."""
    (m, n), k = y.shape, w.shape[1]
    if config.get("LIBRARY"):
        parts, split = _product(rows, w), 1
    elif config.get("DESCRIPTORS"):
        _described(rows, w, y, ends, widths, config, {**constants, **inner}, device)
        return
    else:
        split = config["SPLIT"]
        tiles = -(-m // config["BLOCK_M"]) * -(-n // (config["BLOCK_N"] * config["HALVES"]))
        programs = min(tiles, device.processors) if config["PERSISTENT"] else tiles
        kind = torch.float32 if inner["FLOAT"] else torch.int32
        parts = y if split == 1 else torch.empty(split, m, n, dtype=kind, device=y.device)
        launch(kernels.gemm8, (programs, split), rows, w, parts, *ends, m, n, k, rows.stride(0), *widths, **constants,
               **inner, EVEN_K=k % config["BLOCK_K"] == 0, config=config)  # fmt: skip
    if parts is not y:
        height = min(16, 1 << max(m - 1, 0).bit_length())
        launch(kernels.reduce8, (-(-m // height), -(-n // 128)), parts, y, *ends, m, n, **constants, SPLIT=split,
               BLOCK_M=height, BLOCK_N=128, config={"num_warps": 4, "num_stages": 1})  # fmt: skip


def _describable(device: Device, rows: Tensor, w: Tensor) -> bool:
    """Whether both operands can come by descriptors here: codes of others may begin anywhere."""
    return descriptors.has_descriptors(device) and not (
        descriptors.reason_against(rows) or descriptors.reason_against(w)
    )


def _described(
    rows: Tensor, w: Tensor, y: Tensor, ends: Ends, widths: tuple[int, int], config: Config,
    constants: Mapping[str, int | str], device: Device,
) -> None:  # fmt: skip
    """Launch the product with tensor descriptors of both operands."""
    height, width, depth = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    tiles = -(-y.shape[0] // height) * -(-y.shape[1] // (width * config["HALVES"]))
    programs = min(tiles, device.processors * config["PERSISTENT"]) if config["PERSISTENT"] else tiles
    given = {key: value for key, value in config.items() if key not in ("DESCRIPTORS", "PROMOTE")}
    promote = None if constants["BY_HAND"] or not config["PROMOTE"] else min(config["PROMOTE"], depth)
    launch(gemm8_described, (programs,), descriptors.described(rows, height, depth),
           descriptors.described(w, width, depth), y, *ends, *y.shape, w.shape[1], *widths, **constants,
           PROMOTE=promote, config=given)  # fmt: skip


def _product(rows: Tensor, w: Tensor) -> Tensor:
    """Sums of the products by cuBLAS: int32, or f32 with its own promotion of partial sums."""
    if w.dtype == torch.int8:
        return torch._int_mm(rows, w.t())
    one = torch.ones((), dtype=torch.float32, device=w.device)
    a, b = rows.view(torch.float8_e4m3fn), w.view(torch.float8_e4m3fn)
    product: Tensor = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return product


def _check(
    codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], bias: Tensor | None,
    residual: Tensor | None, xf: Format, wf: Format, activation: str, dtype: str,
) -> None:  # fmt: skip
    n, k = weight[0].shape
    if reason := reason_against(str(xf), str(wf), k):
        raise bad(f"there is no kernel: {reason}", "see the module's formats", f"'{xf}' times '{wf}'")
    expected = torch.float8_e4m3fn if xf.is_float else torch.int8
    if codes.dtype != expected or not k - 15 <= codes.shape[-1] <= k:
        raise bad("codes do not fit the weight", f"{expected}, rows of {k}", f"{codes.dtype}, {list(codes.shape)}")
    if len(weight) != (2 if wf.is_float else 4 if wf.has_zero else 3):
        raise bad(f"the weight is not packed as '{wf}'", "the tensors of pack_gemm8", f"{len(weight)} tensors")
    check_scales(codes, x_scale, x_zero, xf)
    check_ends(n, codes.shape[:-1], bias, residual, activation, dtype)
    check_devices(codes.device, (x_scale, x_zero, *weight, bias, residual))


define(
    "gemm8(Tensor codes, Tensor x_scale, Tensor? x_zero, Tensor[] weight, Tensor? bias, Tensor? residual, "
    "str x_format, str w_format, str activation, str dtype) -> Tensor",
    gemm8,
    product_fake,
)
