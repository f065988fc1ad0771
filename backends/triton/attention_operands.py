"""Queries, keys and values on their way to the attention kernels: rounded, centred, in rows of a power of two.

Codes lie in the narrowest type in which both factors of a product are exact, so that every pair of formats has a
kernel: int8 where both are integers within +-127, e4m3 where both are and the GPU has it, else f16, bf16 or f32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels.attention_operands import round_operand
from qfx.backends.triton.launch import dot_dtype, launch
from qfx.format import Format
from qfx.numerics import run_time_qparams
from qfx.ops.heads import Static

_ORDER = (torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)
_FLOATS = {torch.float16: _ORDER[2:3] + _ORDER[4:], torch.bfloat16: _ORDER[3:], torch.float32: _ORDER[4:]}
_SMALL = 127
_MANTISSA = {  # bits behind the point, least normal value
    "f8e4m3": (3, 2.0**-6),
    "f8e5m2": (2, 2.0**-14),
    "f16": (10, 2.0**-14),
    "bf16": (7, 2.0**-126),
}


def constants(fmt: Format | None) -> dict[str, Any]:
    """How values become codes, as the kernels take it. None: values stay as they are."""
    bits, least = _MANTISSA.get("" if fmt is None else fmt.type, (0, 1.0))
    found: dict[str, Any] = {"SCALED": False, "BY_ROW": False, "INTEGER": False, "AFFINE": False, "BITS": bits,
                             "LEAST": least, "QMIN": 0.0, "QMAX": 1.0, "CLIP": 1.0}  # fmt: skip
    if fmt is not None and not fmt.is_plain:
        found.update(SCALED=True, BY_ROW=fmt.granularity == "tok", INTEGER=fmt.is_integer, AFFINE=fmt.has_zero,
                     QMIN=float(fmt.qmin), QMAX=float(fmt.qmax), CLIP=fmt.clip / 100)  # fmt: skip
    return found


def holding(fmt: Format | None, dtype: torch.dtype, device: Device) -> tuple[torch.dtype, ...]:
    """Types of codes, the narrowest first, in which an operand of `dtype` is exact once it is rounded to `fmt`."""
    if fmt is None or fmt.type == "f32":
        return _FLOATS[dtype]
    if fmt.is_plain:
        return _FLOATS[fmt.code_dtype]
    if fmt.is_integer and max(fmt.qmax, -fmt.qmin) <= _SMALL:
        return _ORDER[:1] + _ORDER[2:]
    if fmt.type == "f8e4m3" and device.has_fp8 and not device.interpreted:
        return _ORDER[1:]
    return _ORDER[2:]


def common(one: Sequence[torch.dtype], other: Sequence[torch.dtype]) -> torch.dtype:
    """The narrowest type that holds both; the interpreter multiplies f32 in the place of bf16."""
    return dot_dtype(next(dtype for dtype in _ORDER if dtype in one and dtype in other))


@dataclass(frozen=True)
class Steps:
    """Scales that do not differ by row. scale and zero: f32, one or one for each head; None where rows have their own.

    stride: 0, or 1 by head.
    """

    scale: Tensor | None = None
    zero: Tensor | None = None

    @property
    def stride(self) -> int:
        return 0 if self.scale is None or self.scale.numel() == 1 else 1


def steps_of(x: Tensor, given: Static, mean: Tensor | None) -> Steps:
    """Scales of an operand [B, H, L, D], as given or from the values without their `mean` [B, H, 1, D]."""
    fmt = given.format
    if fmt is None or fmt.is_plain or fmt.granularity == "tok":
        return Steps()
    if fmt.dynamic:
        found = run_time_qparams(x if mean is None else x.to(torch.float32) - mean, fmt)
        zero = None if found.zero is None else found.zero.to(torch.float32).reshape(-1)
        return Steps(found.scale.reshape(-1), zero)
    return fixed(fmt, given, x.device)


def fixed(fmt: Format, given: Static, where: torch.device) -> Steps:
    """The scales of a static format."""
    zero = numbers(tuple(map(float, given.zero)), where) if fmt.has_zero else None
    return Steps(numbers(tuple(map(float, given.scale)), where), zero)


@functools.cache
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """f32 numbers on a device, copied there once: copies from the host cannot be captured in a CUDA graph.

    They stay as long as the process: a graph that was captured knows their address, and nothing of who holds them.
    """
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.cache
def indices(values: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 numbers on a device, copied there once, as `numbers`."""
    return torch.tensor(values, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class Laid:
    """An operand as the kernels read it. codes [B, H, rows, WIDTH]; step, bias f32 [B, H, rows]."""

    codes: Tensor
    step: Tensor | None = None
    bias: Tensor | None = None


def lay(
    x: Tensor, fmt: Format | None, steps: Steps, dtype: torch.dtype, width: int, *, mean: Tensor | None = None,
    centred: bool = False, stepped: bool = False, factor: float = 1.0, times: Steps | None = None, share: int = 1,
    biased: bool = False, multiplied: bool = False,
) -> Laid:  # fmt: skip
    """x [B, H, rows, D] float, rounded to `fmt`, as codes of `dtype`, `width` a row.

    mean f32 [B, H / share, 1, D]: of the keys, taken off x where `centred`. stepped: the scale of each row, times
    `factor` and `times` (scales of H / share heads), is returned. biased: so is x mean * factor. multiplied: codes are
    multiplied by their scale.
    """
    batch, heads, rows, depth = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    codes = torch.empty((batch, heads, rows, width), dtype=dtype, device=x.device)
    step, bias = (
        torch.empty((batch, heads, rows), dtype=torch.float32, device=x.device) if wanted else None
        for wanted in (stepped, biased)
    )
    mean = mean if biased or centred else None
    block = max(16, 8192 // width)
    launch(round_operand, (batch, heads, triton.cdiv(rows, block)), x, mean, steps.scale, steps.zero,
           None if times is None else times.scale, codes, step, bias, rows, *x.stride()[:3], steps.stride,
           0 if times is None else times.stride, factor, SHARE=share, CENTRED=centred,
           **constants(fmt), MULTIPLIED=multiplied, D=depth, WIDTH=width, BLOCK=block,
           config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return Laid(codes, step, bias)
