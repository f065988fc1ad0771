"""What products of operands in few bits share: their inputs, what the epilogue reads, and what is checked.

y = activation(x w^T + bias) + residual in `dtype` (one of DTYPES), activation one of ACTIVATIONS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfx.backends.triton.library import bad
from qfx.backends.triton.quantize_rows import ALIGNMENT, aligned, shift_of
from qfx.backends.triton.row_codes import dense
from qfx.format import Format

ACTIVATIONS = ("", "gelu", "gelu_tanh", "silu")
DTYPES = ("f16", "bf16", "f32")


class Ends(NamedTuple):
    """What the epilogue of a product of codes to y [m, n] reads, in the order in which kernels take it.

    x_sums int32: sums of the codes of the rows, where the weight has zero points and the kernel does not find them.
    w_sums: sums of the codes of the weight less its zero points, where the rows have zero points.
    """

    x_scale: Tensor
    x_zero: Tensor | None
    x_sums: Tensor | None
    w_scale: Tensor
    w_zero: Tensor | None
    w_sums: Tensor | None
    bias: Tensor | None
    residual: Tensor | None

    @classmethod
    def of(
        cls, y: Tensor, xf: Format, x_scale: Tensor, x_zero: Tensor | None, x_sums: Tensor | None, w_scale: Tensor,
        w_zero: Tensor | None, w_sums: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    ) -> Ends:  # fmt: skip
        """Of rows in the format `xf`, each tensor as kernels read it."""
        residual = None if residual is None else residual.reshape(y.shape).contiguous()
        zero, sums = (dense(x_zero), w_sums) if xf.has_zero else (None, None)
        return cls(x_scale.to(torch.float32).contiguous(), zero, x_sums, w_scale, w_zero, sums, dense(bias), residual)


def group_of(fmt: Format) -> int:
    """How many k share a scale, 0 where all of a row do."""
    return fmt.group or (fmt.block[1] if fmt.block else 0)


def aligned_rows(rows: Tensor, width: int | None = None) -> Tensor:
    """Rows [M, K] that begin at multiples of 16 bytes, of `width` columns where that is said: these, or a copy."""
    fits = width is None or rows.shape[1] == width
    if fits and rows.stride(1) == 1 and rows.stride(0) % ALIGNMENT == 0 and rows.storage_offset() % ALIGNMENT == 0:
        return rows
    padded = torch.zeros(rows.shape[0], width or aligned(rows.shape[1]), dtype=rows.dtype, device=rows.device)
    padded[:, : rows.shape[1]] = rows
    return padded


def constants_of(xf: Format, activation: str) -> dict[str, int | str]:
    """What an epilogue is told."""
    return {"X_SHIFT": shift_of(xf), "X_PER_ROW": xf.granularity == "tok", "ACTIVATION": activation}


def check_scales(codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, xf: Format) -> None:
    """Raises ValueError where there are not as many scales, or zero points, as the format of codes [.., K] has."""
    groups = -(-codes.shape[-1] // xf.group) if xf.group else 1
    scales = groups * (math.prod(codes.shape[:-1]) if xf.granularity else 1)
    if x_scale.numel() != scales or (xf.has_zero and (x_zero is None or x_zero.numel() != scales)):
        found = f"{x_scale.numel()} and {'no' if x_zero is None else x_zero.numel()}"
        raise bad("scales or zero points do not fit the codes", f"{scales} of each that '{xf}' has", found)


def check_ends(
    n: int, lead: Sequence[int], bias: Tensor | None, residual: Tensor | None, activation: str, dtype: str
) -> None:
    """Raises ValueError for what an epilogue cannot do with [*lead, n]."""
    if activation not in ACTIVATIONS or dtype not in DTYPES:
        raise bad("unknown activation or dtype", f"one of {ACTIVATIONS}, one of {DTYPES}", (activation, dtype))
    if bias is not None and tuple(bias.shape) != (n,):
        raise bad("the bias does not fit", f"shape [{n}]", list(bias.shape))
    if residual is not None and tuple(residual.shape) != (*lead, n):
        raise bad("the residual does not fit", f"shape {[*lead, n]}", list(residual.shape))


def check_devices(device: torch.device, tensors: Sequence[Tensor | None]) -> None:
    """Raises ValueError where one of the tensors lies elsewhere."""
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise bad("tensors lie on several devices", f"all on {device}", tensor.device)


def product_fake(codes: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: list[Tensor], *given: Any) -> Tensor:
    """The result's shape and type: [.., N] for a weight whose first tensor has N rows, in the dtype that comes last."""
    return codes.new_empty((*codes.shape[:-1], weight[0].shape[0]), dtype=Format.parse(given[-1]).code_dtype)
