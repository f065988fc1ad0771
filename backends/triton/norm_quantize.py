"""RMSNorm or LayerNorm whose result goes straight to codes, a residual added before.

qfx_triton::norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool layer,
    Tensor? x_scale, Tensor? x_zero, Tensor? smooth, str format, bool keep_norm, bool keep_sum) -> Tensor[]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.kernels import norm_quantize as kernels
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define
from qfx.format import Format


def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool,
    x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None, format: str,  # noqa: A002
    keep_norm: bool, keep_sum: bool,
) -> list[Tensor]:  # fmt: skip
    """s = x + residual, y = norm(s) * weight + bias; y [.., K] (divided by smooth) as an operand in `format`.

    layer: (s - mean) / sqrt(variance + eps), else s / sqrt(mean square + eps). s and y are rounded to x.dtype, as
    single operators have them, and the codes are exactly those of that y: those of `qfx.numerics`. Returns what
    `row_codes` says; then y where `keep_norm`; then s where `keep_sum`.
    Raises ValueError for tensors that do not fit each other, and for a format that rows cannot have.
    """
    fmt, device = Format.parse(format), device_of(x)
    static = row_codes.known_scale(fmt, x_scale, x_zero)
    vectors = {"weight": weight, "bias": bias, "smooth": smooth}
    row_codes.check("norm_quantize", x, fmt, alike={"residual": residual}, vectors=vectors, static=static)
    rows, more = row_codes.flat(x), None if residual is None else row_codes.flat(residual)
    made = row_codes.outputs(x, fmt)
    norm = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep_norm else None
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep_sum else None
    weight, bias, smooth = (None if v is None else v.contiguous() for v in (weight, bias, smooth))
    programs, config = row_codes.settings(device, "norm_quantize", rows, more, smooth, 1 if bias is None else 2)
    kernel = kernels.norm_quantize if "STAGES" in config else kernels.norm_quantize_long
    launch(kernel, (programs,), rows, more, weight, bias, smooth, *static, *row_codes.slots(made, fmt), norm, total,
           *rows.shape, made[0].shape[-1], rows.stride(0), 0 if more is None else more.stride(0), eps,
           config=config, LAYER=layer, **row_codes.constants(x, smooth, fmt, device))  # fmt: skip
    return [*made, *(t for t in (norm, total) if t is not None)]


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, layer: bool,
    x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None, format: str,  # noqa: A002
    keep_norm: bool, keep_sum: bool,
) -> list[Tensor]:  # fmt: skip
    floats = int(keep_norm) + int(keep_sum)
    more = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(floats)]
    return [*row_codes.outputs(x, Format.parse(format)), *more]


define(
    "norm_quantize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool layer, Tensor? x_scale, "
    "Tensor? x_zero, Tensor? smooth, str format, bool keep_norm, bool keep_sum) -> Tensor[]",
    norm_quantize,
    _fake,
)
