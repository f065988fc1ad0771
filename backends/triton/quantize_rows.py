"""Rows of an activation to int8 or fp8 with one scale each: the format `i8/tok` and `f8e4m3/tok`.

qfx_triton::quantize_rows(Tensor x, Tensor? smooth, str format) -> (Tensor codes, Tensor scale)
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton.kernels.quantize_rows import quantize_rows as kernel
from qfx.backends.triton.launch import launch
from qfx.backends.triton.library import define
from qfx.format import Format


def quantize_rows(x: Tensor, smooth: Tensor | None, format: str) -> tuple[Tensor, Tensor]:  # noqa: A002
    """x [.., K] float (divided by smooth [K]) to codes [.., K] of the format's code dtype and scales f32 [.., 1].

    The same codes as `qfx.numerics.quantize` with the scale of the row; an all-zero row has the scale 1.
    """
    fmt = Format.parse(format)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    codes = torch.empty(x.shape, dtype=fmt.code_dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(max(rows.shape[1], 1))
    warps = min(max(block // 512, 1), 16)
    launch(kernel, (rows.shape[0],), rows, smooth, codes, scale, rows.shape[1], rows.stride(0),
           QMAX=fmt.qmax, QMIN=fmt.qmin, BLOCK=block, config={"num_warps": warps, "num_stages": 1})  # fmt: skip
    return codes, scale


def _fake(x: Tensor, smooth: Tensor | None, format: str) -> tuple[Tensor, Tensor]:  # noqa: A002
    codes = torch.empty(x.shape, dtype=Format.parse(format).code_dtype, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


_LIBRARY = define(
    "quantize_rows(Tensor x, Tensor? smooth, str format) -> (Tensor, Tensor)", quantize_rows, _fake
) or globals().get("_LIBRARY")
