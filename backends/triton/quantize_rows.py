"""Activations to the 8-bit codes that matrix products take.

    qfx_triton::quantize_dynamic(x, smooth?, format) -> (codes, scale, zero)      every format with a scale at run time
    qfx_triton::quantize_static(x, smooth?, scale, zero?, format) -> codes        formats with one known scale

They give operands: rows of `aligned(K)` codes, zero behind K, so that each begins at a multiple of 16 bytes.
Codes of integers are int8 there, those of u8 less 128; zero points are the reference's (uint8), empty where the format
has none. Formats: integers of 2 to 8 bits or f8e4m3, per tensor or per token; `f8e4m3/gN/dyn` with N a power of two.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.kernels import act_quantize as act_kernels
from qfx.backends.triton.kernels import quantize_rows as kernels
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import bad, define
from qfx.backends.triton.row_codes import ALIGNMENT, aligned, reason_against, shift_of
from qfx.format import Format

__all__ = ["ALIGNMENT", "aligned", "quantize_dynamic", "quantize_static", "reason_against", "shift_of"]


def quantize_dynamic(x: Tensor, smooth: Tensor | None, format: str) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
    """x [.., K] float, divided by smooth [K], to an operand: codes [.., aligned(K)], scale f32, zero uint8.

    scale: [.., 1] per token, [.., G] in groups, () for the tensor; zero likewise, or [0]. See `run_time_qparams`.
    """
    fmt = _checked(x, smooth, format, dynamic=True)
    rows, width, smooth = row_codes.flat(x), aligned(x.shape[-1]), row_codes.dense(smooth)
    if fmt.group:
        codes, scale, zero = _by_group(rows, smooth, fmt, width)
    elif fmt.granularity == "tok":
        codes, scale, zero = _by_row(rows, smooth, fmt, width)
    else:
        scale, zero = _of_tensor(rows, smooth, fmt)
        divided = rows if smooth is None else rows / smooth.to(torch.float32)  # x / (scale * smooth) rounds otherwise
        codes = _launched(divided, None, scale, zero, fmt, width, static=True)
    codes, scale = codes.reshape(*x.shape[:-1], width), scale.reshape(_scale_shape(x, fmt))
    return codes, scale, zero.reshape(scale.shape) if fmt.has_zero else zero


def quantize_static(x: Tensor, smooth: Tensor | None, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:  # noqa: A002
    """x [.., K] float to the codes [.., aligned(K)] of an operand, with a known scale (one value) and zero (uint8).

    smooth [K] multiplies the scale, as in `qfx.ops.packed.linear`.
    """
    fmt = _checked(x, smooth, format, dynamic=False)
    if scale.numel() != 1 or (fmt.has_zero and (zero is None or zero.numel() != 1)):
        found = f"{scale.numel()} scales, {'no' if zero is None else zero.numel()} zero points"
        raise bad("one scale of the whole tensor is needed", "one value, and one zero point for u2..u8", found)
    width = aligned(x.shape[-1])
    rows, smooth = row_codes.flat(x), row_codes.dense(smooth)
    codes = _launched(rows, smooth, scale.to(torch.float32), zero, fmt, width, static=True)
    return codes.reshape(*x.shape[:-1], width)


def _by_row(rows: Tensor, smooth: Tensor | None, fmt: Format, width: int) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
    zero = torch.empty(rows.shape[0] if fmt.has_zero else 0, dtype=torch.uint8, device=rows.device)
    return _launched(rows, smooth, scale, zero, fmt, width, static=False), scale, zero


def _launched(
    rows: Tensor, smooth: Tensor | None, scale: Tensor, zero: Tensor | None, fmt: Format, width: int, *, static: bool
) -> Tensor:
    codes = torch.empty(rows.shape[0], width, dtype=_operand_dtype(fmt), device=rows.device)
    known = (scale, zero if fmt.has_zero else None)
    given, found = (known, (None, None)) if static else ((None, None), known)
    device = device_of(rows)
    programs, config = row_codes.settings(device, "quantize_rows", rows, None, smooth)
    kernel = act_kernels.act_quantize if "STAGES" in config else act_kernels.act_quantize_long
    launch(kernel, (programs,), rows, None, smooth, *given, codes.view(torch.uint8) if fmt.is_float else codes, *found,
           None, *rows.shape, width, rows.stride(0), 0,
           config=config, ACT=act_kernels.PLAIN.value, **row_codes.constants(rows, smooth, fmt, device))  # fmt: skip
    return codes


def _by_group(rows: Tensor, smooth: Tensor | None, fmt: Format, width: int) -> tuple[Tensor, Tensor, Tensor]:
    assert fmt.group is not None
    groups = -(-rows.shape[1] // fmt.group)
    codes = torch.empty(rows.shape[0], width, dtype=fmt.code_dtype, device=rows.device)
    scale = torch.empty(rows.shape[0], groups, dtype=torch.float32, device=rows.device)
    block = min(triton.next_power_of_2(max(groups, 1)), max(4096 // fmt.group, 1))
    launch(kernels.quantize_groups, (rows.shape[0], -(-groups // block)), rows, smooth, codes.view(torch.uint8), scale,
           rows.shape[1], rows.stride(0), width, groups, QMAX=fmt.qmax, BY_HAND=device_of(rows).by_hand,
           GROUP=fmt.group, BLOCK=block, config=_config(block * fmt.group))  # fmt: skip
    return codes, scale, torch.empty(0, dtype=torch.uint8, device=rows.device)


def _of_tensor(rows: Tensor, smooth: Tensor | None, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scale and zero point of all rows, shape [1]."""
    m, k = rows.shape
    low, high = torch.empty(2, m, dtype=torch.float32, device=rows.device).unbind()
    block = triton.next_power_of_2(max(k, 1))
    launch(kernels.row_ranges, (m,), rows, smooth, low, high, k, rows.stride(0), BLOCK=block, config=_config(block))
    scale = torch.empty(1, dtype=torch.float32, device=rows.device)
    zero = torch.empty(1 if fmt.has_zero else 0, dtype=torch.uint8, device=rows.device)
    launch(kernels.tensor_params, (1,), low, high, scale, zero, m, CLIP=fmt.clip / 100, QMAX=fmt.qmax,
           SIGNED=fmt.symmetric, BLOCK=1024, config={"num_warps": 4, "num_stages": 1})  # fmt: skip
    return scale, zero


def _config(block: int) -> dict[str, int]:
    return {"num_warps": min(max(block // 512, 1), 16), "num_stages": 1}


def _operand_dtype(fmt: Format) -> torch.dtype:
    return fmt.code_dtype if fmt.is_float else torch.int8


def _scale_shape(x: Tensor, fmt: Format) -> tuple[int, ...]:
    return fmt.scale_shape(x.shape)


def _checked(x: Tensor, smooth: Tensor | None, text: str, *, dynamic: bool) -> Format:
    fmt = Format.parse(text)
    if reason := reason_against(fmt):
        raise bad(f"an activation cannot be quantized here: {reason}", "see the module's formats", text)
    if fmt.dynamic != dynamic:
        found = f"'{text}' has {'a scale found at run time' if fmt.dynamic else 'a known scale'}"
        raise bad("the op does not fit the format", "quantize_dynamic for the former, else quantize_static", found)
    if x.dtype not in row_codes.FLOATS:
        raise bad("activations are floats", "float16, bfloat16 or float32", x.dtype)
    if smooth is not None and smooth.shape != x.shape[-1:]:
        raise bad("smooth does not fit", f"shape [{x.shape[-1]}]", list(smooth.shape))
    return fmt


def _fake_static(x: Tensor, smooth: Tensor | None, scale: Tensor, zero: Tensor | None, format: str) -> Tensor:  # noqa: A002
    return x.new_empty((*x.shape[:-1], aligned(x.shape[-1])), dtype=_operand_dtype(Format.parse(format)))


def _fake_dynamic(x: Tensor, smooth: Tensor | None, format: str) -> tuple[Tensor, Tensor, Tensor]:  # noqa: A002
    fmt = Format.parse(format)
    scale = x.new_empty(_scale_shape(x, fmt), dtype=torch.float32)
    zero = x.new_empty(scale.shape if fmt.has_zero else (0,), dtype=torch.uint8)
    return _fake_static(x, None, scale, None, format), scale, zero


define(
    "quantize_dynamic(Tensor x, Tensor? smooth, str format) -> (Tensor, Tensor, Tensor)",
    quantize_dynamic,
    _fake_dynamic,
)
define(
    "quantize_static(Tensor x, Tensor? smooth, Tensor scale, Tensor? zero, str format) -> Tensor",
    quantize_static,
    _fake_static,
)
