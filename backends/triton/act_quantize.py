"""An activation function, perhaps gated, whose result goes straight to codes.

qfx_triton::act_quantize(Tensor x, Tensor? up, str act, Tensor? x_scale, Tensor? x_zero, Tensor? smooth, str format,
    bool keep) -> Tensor[]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.backends.triton import row_codes
from qfx.backends.triton.kernels import act_quantize as kernels
from qfx.backends.triton.launch import device_of, launch
from qfx.backends.triton.library import define
from qfx.errors import explain, nearest
from qfx.format import Format

ACTS = {
    "silu": kernels.SILU.value, "gelu": kernels.GELU.value, "gelu_tanh": kernels.GELU_TANH.value,
    "quick_gelu": kernels.QUICK_GELU.value,
}  # fmt: skip


def act_quantize(
    x: Tensor, up: Tensor | None, act: str, x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None,
    format: str, keep: bool,  # noqa: A002
) -> list[Tensor]:  # fmt: skip
    """y = act(x) * up; y [.., K] (divided by smooth) as an operand in `format`. act: one of ACTS.

    act(x) and y are rounded to x.dtype, as single operators have them, and the codes are exactly those of that y:
    those of `qfx.numerics`. x and up may be parts of one tensor. Returns what `row_codes` says; then y where `keep`.
    Raises ValueError for tensors that do not fit each other, a format that rows cannot have, an unknown function.
    """
    fmt, device = Format.parse(format), device_of(x)
    if act not in ACTS:
        raise ValueError(explain(f"act_quantize: unknown function, {nearest(act, ACTS)}", found=repr(act)))
    static = row_codes.known_scale(fmt, x_scale, x_zero)
    row_codes.check("act_quantize", x, fmt, alike={"up": up}, vectors={"smooth": smooth}, static=static)
    rows, more = row_codes.flat(x), None if up is None else row_codes.flat(up)
    made = row_codes.outputs(x, fmt)
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None
    programs, config = row_codes.settings(device, "act_quantize", rows, more, smooth)
    kernel = kernels.act_quantize if "STAGES" in config else kernels.act_quantize_long
    launch(kernel, (programs,), rows, more, None if smooth is None else smooth.contiguous(), *static,
           *row_codes.slots(made, fmt), kept, *rows.shape, made[0].shape[-1], rows.stride(0),
           0 if more is None else more.stride(0),
           config=config, ACT=ACTS[act], **row_codes.constants(x, smooth, fmt, device))  # fmt: skip
    return [*made, *(t for t in (kept,) if t is not None)]


def _fake(
    x: Tensor, up: Tensor | None, act: str, x_scale: Tensor | None, x_zero: Tensor | None, smooth: Tensor | None,
    format: str, keep: bool,  # noqa: A002
) -> list[Tensor]:  # fmt: skip
    made = row_codes.outputs(x, Format.parse(format))
    return [*made, torch.empty(x.shape, dtype=x.dtype, device=x.device)] if keep else made


define(
    "act_quantize(Tensor x, Tensor? up, str act, Tensor? x_scale, Tensor? x_zero, Tensor? smooth, str format, "
    "bool keep) -> Tensor[]",
    act_quantize,
    _fake,
)
