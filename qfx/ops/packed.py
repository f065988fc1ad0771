"""The three ops of qfx and their reference kernels: linear, embedding, dequantize.

    qfx::linear(x, w, w_scale, w_zero?, bias?, x_scale?, x_zero?, smooth?, x_format, w_format) -> Tensor
    qfx::embedding(ids, w, w_scale, w_zero?, w_format, dim, dtype) -> Tensor
    qfx::dequantize(w, w_scale, w_zero?, w_format, last_dim, dtype) -> Tensor

Weights are the tensors of a `qfx.packing.Packed` and get no gradient. `linear` passes one straight through the rounding
to x and bias, so that adapters train above a quantized model. Importing this module registers the ops with torch once
per process; a second copy of the module finds them there and registers nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import Format
from qfx.numerics import QParams, effective_scale, fake_quantize, quantize, run_time_qparams
from qfx.numerics import dequantize as dequantize_codes
from qfx.ops.library import UNSAFE, define
from qfx.packing import check_storage, unpack_codes, unpack_zeros

_INTEGER_GRANULARITY = ("", "tok")

_LARGE = 1 << 22  # elements of a weight


@torch.no_grad()
def linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    smooth: Tensor | None,
    x_format: str,
    w_format: str,
) -> Tensor:
    """x [.., K] float times a packed weight [N, K]; returns [.., N] in x.dtype.

    x_format "" leaves x in float (weight-only). smooth [K] divides x first. Integer formats with one scale for the
    tensor, per channel or per token accumulate exactly: y = acc * x_scale * w_scale + bias. Others dequantize and
    multiply in f32. Raises ValueError for data that does not fit its format and for a static x_format without a scale.
    """
    wf = Format.parse(w_format)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).to(torch.float32)
    w_zero = unpack_zeros(w_zero, wf, w_scale)
    if x_format and _exact(Format.parse(x_format), wf):
        codes = unpack_codes(w, wf, x.shape[-1])
        y = _integer_linear(rows, codes, w_scale, w_zero, x_scale, x_zero, smooth, Format.parse(x_format), wf)
    else:
        if x_format:
            rows = as_rounded(rows, Format.parse(x_format), x_scale, x_zero, smooth)
        elif smooth is not None:
            rows = rows / smooth
        if w.shape[-2] * x.shape[-1] > _LARGE and wf.by_row and not wf.is_plain:
            y = _multiplied(rows, w, wf, w_scale, w_zero, bias, x.dtype)
            return y.reshape(*x.shape[:-1], w.shape[-2])
        y = rows @ dequantize_codes(unpack_codes(w, wf, x.shape[-1]), wf, w_scale, w_zero).t()
    return _finished(y, bias, x.dtype).reshape(*x.shape[:-1], w.shape[-2])


@torch.no_grad()
def embedding(
    ids: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, dim: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` (int32 or int64, any shape) of a packed table [V, dim]; returns [.., dim] in `dtype`."""
    fmt = Format.parse(w_format)
    flat = ids.reshape(-1)
    codes = unpack_codes(w.index_select(0, flat), fmt, dim)
    if fmt.nested:  # blocks of scales go across rows
        w_scale, w_zero, fmt = effective_scale(w_scale, w_zero, fmt), None, Format(fmt.type, fmt.granularity)
    if fmt.block:  # one scale row serves M table rows
        scale, zero = _gather_blocks(w_scale, flat, fmt), _gather_blocks(w_zero, flat, fmt)
        fmt = Format(fmt.type, f"g{fmt.block[1]}", fmt.scale_type)
    else:
        scale, zero = _gather(w_scale, flat), _gather(w_zero, flat)
    assert scale is not None
    zero = unpack_zeros(zero, fmt, scale)
    return dequantize_codes(codes, fmt, scale, zero, dtype).reshape(*ids.shape, dim).contiguous()


@torch.no_grad()
def dequantize(
    w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, last_dim: int, dtype: torch.dtype
) -> Tensor:
    """A packed weight of any leading dimensions as floats [.., N, last_dim] in `dtype`; never a view of `w`."""
    fmt = Format.parse(w_format)
    zero = unpack_zeros(w_zero, fmt, w_scale)
    values = dequantize_codes(unpack_codes(w, fmt, last_dim), fmt, w_scale, zero, dtype)
    return values.clone() if values.data_ptr() == w.data_ptr() else values.contiguous()


def _multiplied(
    rows: Tensor, w: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """rows [M, K] times a very large packed weight [N, K], unpacked part by part: [M, N] in `dtype`."""
    found = rows.new_empty(len(rows), len(w), dtype=dtype)
    step = max(1, _LARGE // 4 // rows.shape[1])
    for start in range(0, len(w), step):
        part = slice(start, start + step)
        codes = unpack_codes(w[part], fmt, rows.shape[1])
        values = dequantize_codes(codes, fmt, scale[part], None if zero is None else zero[part])
        found[:, part] = _finished(rows @ values.t(), None if bias is None else bias[part], dtype)
    return found


def _finished(y: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Products f32 with the bias, in `dtype`."""
    return (y if bias is None else y + bias.to(torch.float32)).to(dtype)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact a [M, K] @ b [N, K]^T of int8 codes, int32 [M, N]. K is below 2^17, so that no sum overflows."""
    m, k = a.shape
    if a.device.type == "cuda":
        native = m > 16 and k % 8 == 0 and b.shape[0] % 8 == 0
    else:
        native = k > 1  # torch 2.13 on CPU returns uninitialised memory for K = 1
    if native:
        return torch._int_mm(a, b.t())
    return (a.to(torch.float64) @ b.to(torch.float64).t()).to(torch.int32)


def _exact(xf: Format, wf: Format) -> bool:
    return (
        xf.is_integer
        and wf.is_integer
        and xf.granularity in _INTEGER_GRANULARITY
        and wf.granularity in ("", "ch")
        and not xf.has_global_scale
        and not wf.has_global_scale
    )


def _input_params(rows: Tensor, fmt: Format, scale: Tensor | None, zero: Tensor | None) -> QParams:
    """Scale and zero point of the input: found from it where the format is dynamic, else those given."""
    if fmt.dynamic:
        return run_time_qparams(rows, fmt)
    if scale is None or (fmt.has_zero and zero is None):
        raise ValueError(
            explain(
                f"qfx::linear: static input format '{fmt}' has no {'scale' if scale is None else 'zero point'}",
                expected="x_scale, and x_zero for u2..u8",
                found="None",
                next_step=f"calibrate the layer, or use '{fmt.type}/tok' to find the scale at run time",
            )
        )
    return QParams(scale, zero)


def _quantized_input(
    rows: Tensor, fmt: Format, scale: Tensor | None, zero: Tensor | None, smooth: Tensor | None
) -> tuple[Tensor, QParams]:
    """Codes of the input and their parameters. Static scales are multiplied by smooth; dynamic ones see x / smooth."""
    if smooth is not None and fmt.dynamic:
        rows = rows / smooth
    params = _input_params(rows, fmt, scale, zero)
    if smooth is None or fmt.dynamic:
        return quantize(rows, fmt, params.scale, params.zero), params
    per_element = Format(fmt.type)  # a scale per column broadcasts as it is
    divisor = effective_scale(params.scale, params.zero, fmt) * smooth
    return quantize(rows, per_element, divisor, params.zero), params


def as_rounded(rows: Tensor, fmt: Format, scale: Tensor | None, zero: Tensor | None, smooth: Tensor | None) -> Tensor:
    """An input f32 [M, K] of `linear`, divided by smooth [K], as it comes back from its format: f32."""
    if fmt.is_plain or fmt.group or fmt.block or fmt.has_global_scale:
        rows = rows if smooth is None else rows / smooth
        if fmt.is_plain:
            return fake_quantize(rows, fmt)
        return fake_quantize(rows, fmt, *_input_params(rows, fmt, scale, zero))
    codes, params = _quantized_input(rows, fmt, scale, zero, smooth)
    return dequantize_codes(codes, fmt, params.scale, params.zero)


def _integer_linear(
    rows: Tensor,
    codes: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    smooth: Tensor | None,
    xf: Format,
    wf: Format,
) -> Tensor:
    """sum (qx - zx)(qw - zw) in int32, then one f32 scaling by x and one by w."""
    qx, params = _quantized_input(rows, xf, x_scale, x_zero, smooth)
    acc = _accumulate(qx, params.zero, xf, codes, w_zero, wf)
    x_factor = params.scale.to(torch.float32)
    w_factor = w_scale.to(torch.float32).reshape(1, -1)
    return acc.to(torch.float32) * x_factor * w_factor


def _accumulate(qx: Tensor, zx: Tensor | None, xf: Format, qw: Tensor, zw: Tensor | None, wf: Format) -> Tensor:
    """Exact integer sums [M, N]. int32 while the greatest possible sum fits, else f64 (exact to 2^53)."""
    k = qx.shape[-1]
    if k * xf.reach * wf.reach >= 2**31:
        a, b = _centred(qx, zx, torch.float64), _centred(qw, zw, torch.float64)
        return a @ b.t()
    a, a0 = _as_int8(qx, zx, xf)
    b, b0 = _as_int8(qw, zw, wf)
    acc = int_matmul(a, b)
    if b0 is not None:
        acc = acc - a.sum(-1, keepdim=True, dtype=torch.int32) * b0.reshape(1, -1)
    if a0 is not None:
        acc = acc - a0.reshape(-1, 1) * b.sum(-1, dtype=torch.int32)
    if a0 is not None and b0 is not None:
        acc = acc + k * a0.reshape(-1, 1) * b0.reshape(1, -1)
    return acc


def _as_int8(codes: Tensor, zero: Tensor | None, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Codes as int8 with their int32 zero point: unsigned codes of 8 bits are shifted by 128."""
    if not fmt.has_zero:
        return codes, None
    assert zero is not None, f"{fmt} needs a zero point"
    shift = 128 if fmt.bits == 8 else 0
    return (codes.to(torch.int16) - shift).to(torch.int8), zero.to(torch.int32) - shift


def _centred(codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) if zero is None else codes.to(dtype) - zero.to(dtype)


def _gather(per_row: Tensor | None, ids: Tensor) -> Tensor | None:
    """Rows of a tensor of scales; a scale of the whole tensor stays."""
    if per_row is None or per_row.ndim == 0:
        return per_row
    return per_row[ids]


def _gather_blocks(per_block: Tensor | None, ids: Tensor, fmt: Format) -> Tensor | None:
    assert fmt.block is not None
    return _gather(per_block, ids // fmt.block[0])


def _linear_fake(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    smooth: Tensor | None,
    x_format: str,
    w_format: str,
) -> Tensor:
    _check_static(w, w_format, x.shape[-1])
    return x.new_empty((*x.shape[:-1], w.shape[-2]))


def _embedding_fake(
    ids: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, dim: int, dtype: torch.dtype
) -> Tensor:
    _check_static(w, w_format, dim)
    return w.new_empty((*ids.shape, dim), dtype=dtype)


def _dequantize_fake(
    w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, last_dim: int, dtype: torch.dtype
) -> Tensor:
    _check_static(w, w_format, last_dim)
    return w.new_empty((*w.shape[:-1], last_dim), dtype=dtype)


def _check_static(w: Tensor, w_format: str, last_dim: int) -> None:
    """Misfits show while tracing already, unless a size is symbolic."""
    if isinstance(last_dim, int) and isinstance(w.shape[-1], int):
        check_storage(w, Format.parse(w_format), last_dim)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, w_scale, w_zero, bias, _, _, smooth, _, w_format = inputs
    ctx.save_for_backward(w, w_scale, w_zero, smooth)
    ctx.w_format, ctx.last_dim, ctx.dtype = w_format, x.shape[-1], None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Straight through the rounding of x: grad @ w / smooth; the bias gets the sum over the rows."""
    w, w_scale, w_zero, smooth = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 10
    wide = grad.to(torch.float32)
    if ctx.needs_input_grad[0]:
        weight = torch.ops.qfx.dequantize(w, w_scale, w_zero, ctx.w_format, ctx.last_dim, torch.float32)
        back = wide @ weight
        grads[0] = (back if smooth is None else back / smooth).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grads[4] = wide.reshape(-1, wide.shape[-1]).sum(0).to(ctx.dtype)
    return tuple(grads)


define(
    "linear(Tensor x, Tensor w, Tensor w_scale, Tensor? w_zero, Tensor? bias, Tensor? x_scale, Tensor? x_zero, "
    "Tensor? smooth, str x_format, str w_format) -> Tensor",
    linear,
    _linear_fake,
    tags=UNSAFE,
    gradient=(_save_for_backward, _linear_backward),
)
define(
    "embedding(Tensor ids, Tensor w, Tensor w_scale, Tensor? w_zero, str w_format, int dim, ScalarType dtype) "
    "-> Tensor",
    embedding,
    _embedding_fake,
    tags=UNSAFE,
)
define(
    "dequantize(Tensor w, Tensor w_scale, Tensor? w_zero, str w_format, int last_dim, ScalarType dtype) -> Tensor",
    dequantize,
    _dequantize_fake,
    tags=UNSAFE,
)
