"""Linears as a lowered graph has them, rounding and product, in one call."""

from __future__ import annotations

from torch import Tensor

from qfx.backends.triton import mixed_rows
from qfx.backends.triton.gemm4 import gemm4
from qfx.backends.triton.gemm8 import gemm8
from qfx.backends.triton.quantize_rows import quantize_dynamic, quantize_static
from qfx.backends.triton.rules_linear import DTYPES
from qfx.format import Format


def rounded(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None, x_format: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes of x with their scale and zero point: found at run time, or those given."""
    if Format.parse(x_format).dynamic:
        return quantize_dynamic(x, smooth, x_format)
    assert x_scale is not None
    return quantize_static(x, smooth, x_scale, x_zero, x_format), x_scale, x_zero


def linear_w8a8(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, smooth: Tensor | None, x_format: str, w_format: str, activation: str,
) -> Tensor:  # fmt: skip
    """x [.., K] float, divided by smooth [K], quantized, and `gemm8`, in x.dtype."""
    codes = rounded(x, x_scale, x_zero, smooth, x_format)
    return gemm8(*codes, weight, bias, residual, x_format, w_format, activation, DTYPES[x.dtype])


def linear_w4a8(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, smooth: Tensor | None, x_format: str, w_format: str, activation: str,
) -> Tensor:  # fmt: skip
    """As `linear_w8a8`, by `gemm4`."""
    codes = rounded(x, x_scale, x_zero, smooth, x_format)
    return gemm4(*codes, weight, bias, residual, x_format, w_format, x.shape[-1], activation, DTYPES[x.dtype])


def linear_mixed(
    x: Tensor, weight: list[Tensor], bias: Tensor | None, residual: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, smooth: Tensor | None, x_format: str, w_formats: str, activation: str,
) -> Tensor:  # fmt: skip
    """By `gemm_mixed`; with x_format "" by the op of float inputs."""
    if not x_format:
        return mixed_rows.linear_mixed(x, weight, bias, residual, smooth, w_formats, activation)
    codes, k = rounded(x, x_scale, x_zero, smooth, x_format), x.shape[-1]
    return mixed_rows.gemm_mixed(*codes, weight, bias, residual, x_format, w_formats, k, activation, DTYPES[x.dtype])
