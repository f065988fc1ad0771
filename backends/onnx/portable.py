"""What a file needs that other programs read: forms in ai.onnx for what a session gets as ONNX Runtime's own operators.

    standard form of        x static            x dynamic                            x float
    integer weight          Q, DQ, MatMul, DQ   Q, MatMulInteger, Cast, Mul          MatMul, DQ
    grouped weight          Q, DQ, MatMul, DQ   x rounded by arithmetic, MatMul, DQ  MatMul, blocked DQ (opset 21)
    other weights           the same with codes, a Gather from a table of values, and a Mul in place of DQ

Q and DQ are QuantizeLinear and DequantizeLinear; rows with scales of their own are quantized by arithmetic, since
OpenVINO knows no Q with scales found at run time. Weights of 4 bits and less are int4 or uint4, others int8 or uint8.
Weights that lie in a file and have no kernel keep their codes there: readers unpack them when they load the file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.scales import factors
from qfx.backends.onnx.values import Value
from qfx.numerics import F4_VALUES, NF4_VALUES
from qfx.packing import pack_bits

_FLOAT8 = {
    "f8e4m3": (torch.float8_e4m3fn, TensorProto.FLOAT8E4M3FN),
    "f8e5m2": (torch.float8_e5m2, TensorProto.FLOAT8E5M2),
}


def product(b: Builder, x: Value, weight: Value, alpha: float = 1.0) -> Value:
    """alpha * x @ weight^T over the last two dimensions; a weight whose shape is not known has two."""
    if not b.standard:
        return b.op("FusedMatMul", x, weight, domain=MICROSOFT, transB=1, alpha=None if alpha == 1.0 else alpha)
    if alpha != 1.0:
        x = Value(b.op("Mul", x, b.scalar(alpha, x.dtype)).name, x.dtype, x.shape)
    order = list(range(2 if weight.shape is None else weight.rank))
    order[-2:] = order[:-3:-1]
    return b.op("MatMul", x, b.op("Transpose", weight, perm=order))


def unpacked(b: Builder, weight: Weight) -> Value:
    """f32 [.., N, K] from the packed codes by operators that readers evaluate when they load the file."""
    shape = (*weight.data.shape[:-1], weight.k)
    if weight.format.is_plain:
        return _plain(b, weight, shape)
    values = _values(b, weight)
    group = weight.format.group or (weight.format.block[1] if weight.format.block else None)
    if group is None or weight.factor().dim() == 0:
        scale = factors(b, f"{weight.name}.factor", weight, lambda values: values)
        return Value(b.op("Mul", values, scale).name, torch.float32, shape)
    scale = factors(b, f"{weight.name}.factor", weight, lambda values: _spread_rows(weight, values).unsqueeze(-1))
    parts = scale.dims[-2]
    values = b.op("Reshape", values, b.ints([*shape[:-1], parts, group]))
    whole = b.op("Reshape", b.op("Mul", values, scale), b.ints([*shape[:-1], parts * group]))
    if parts * group != weight.k:
        whole = b.op("Slice", whole, b.ints([0]), b.ints([weight.k]), b.ints([-1]))
    return Value(whole.name, torch.float32, shape)


def _plain(b: Builder, weight: Weight, shape: tuple[int, ...]) -> Value:
    """f32 from floats without scales, which stay in their type in the file."""
    element = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(weight.format.type)
    if element is None:
        return b.derived(f"{weight.name}.codes", torch.float32, shape, lambda: weight.data)
    held = b.raw(f"{weight.name}.codes", element, shape, lambda: weight.data.contiguous().view(torch.uint8))
    return Value(b.cast(held, torch.float32).name, torch.float32, shape)


def _spread_rows(weight: Weight, per_scale: Tensor) -> Tensor:
    """Scales or zero points of blocks of several rows, one for each row."""
    block = weight.format.block
    if block is None:
        return per_scale
    return per_scale.repeat_interleave(block[0], -2)[..., : weight.data.shape[-2], :].contiguous()


def _values(b: Builder, weight: Weight) -> Value:
    """What the codes stand for before the scale, f32 [.., N, K padded to whole groups]."""
    fmt = weight.format
    width = _padded(weight)
    shape = (*weight.data.shape[:-1], width)
    if fmt.type in _FLOAT8:
        held, element = _FLOAT8[fmt.type]
        make = lambda: _filled(weight.codes().view(held).view(torch.uint8), width)  # noqa: E731
        return b.cast(b.raw(f"{weight.name}.codes", element, shape, make), torch.float32)
    if fmt.type in ("nf4", "f4e2m1"):
        table = b.const(NF4_VALUES if fmt.type == "nf4" else F4_VALUES, torch.float32)
        codes = b.raw(
            f"{weight.name}.codes", TensorProto.UINT4, shape, lambda: _nibbles(_filled(weight.codes(), width))
        )
        return b.op("Gather", table, b.ops("Cast", codes, dtypes=[torch.int32], to=TensorProto.INT32)[0], axis=0)
    codes = _integers(b, f"{weight.name}.codes", weight, shape, lambda: _filled(weight.codes(), width))
    values = b.ops("Cast", codes, dtypes=[torch.float32], to=TensorProto.FLOAT)[0]
    if weight.zero is None or not fmt.has_zero:
        return values
    zero = _spread_rows(weight, weight.zero) if weight.zero.dim() else weight.zero
    group = fmt.group or (fmt.block[1] if fmt.block else None)
    if group is not None and zero.dim():
        zero = zero.repeat_interleave(group, -1)
    zeros = zero.to(torch.uint8)
    points = b.derived(f"{weight.name}.points", torch.uint8, tuple(zeros.shape), lambda: zeros)
    return b.op("Sub", values, b.cast(points, torch.float32))


def columns(b: Builder, weight: Weight) -> Value:
    """f32 [K, N] by DequantizeLinear from integer codes that lie transposed in the file."""
    if weight.format.is_plain:
        return b.op("Transpose", _plain(b, weight, (weight.n, weight.k)), perm=[1, 0])
    fmt, n, width = weight.format, weight.n, _padded(weight)
    codes = _integers(b, f"{weight.name}.kn", weight, (width, n), lambda: _filled(weight.codes(), width).t())
    scale = factors(b, f"{weight.name}.kn.scale", weight, lambda values: _by_columns(weight, values))
    zero = None
    if weight.zero is not None and fmt.has_zero:
        points = _by_columns(weight, weight.zero)
        zero = _integers(b, f"{weight.name}.kn.zero", weight, tuple(points.shape), lambda: points)
    group = fmt.group or (fmt.block[1] if fmt.block else None)
    where: dict[str, Any] = {"axis": 1} if scale.rank == 1 else {}
    if scale.rank == 2:
        where = {"axis": 0, "block_size": group}
    y = b.op("DequantizeLinear", codes, scale, zero, dtype=torch.float32, **where)
    if width != weight.k:  # OpenVINO takes whole blocks only
        y = b.op("Slice", y, b.ints([0]), b.ints([weight.k]), b.ints([0]))
    return Value(y.name, torch.float32, (weight.k, n))


def _by_columns(weight: Weight, per_scale: Tensor) -> Tensor:
    """Scales or zero points for codes [K, N]: [], [N], or [K / group, N]."""
    if not per_scale.dim():
        return per_scale
    turned = _spread_rows(weight, per_scale).t().contiguous()
    return turned.reshape(-1) if turned.shape[0] == 1 else turned


def _integers(b: Builder, name: str, weight: Weight, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Value:
    """Codes as int4, uint4, int8 or uint8."""
    fmt = weight.format
    if fmt.bits <= 4:
        element = TensorProto.UINT4 if fmt.has_zero else TensorProto.INT4
        return b.raw(name, element, shape, lambda: _nibbles(make()))
    dtype = torch.uint8 if fmt.has_zero else torch.int8
    return b.derived(name, dtype, shape, lambda: make().to(dtype).contiguous())


def _padded(weight: Weight) -> int:
    """K padded to whole groups."""
    group = weight.format.group or (weight.format.block[1] if weight.format.block else None)
    return weight.k if group is None or weight.scale.dim() == 0 else -(-weight.k // group) * group


def _filled(codes: Tensor, width: int) -> Tensor:
    """Codes with zeros after the last, which are cut off again."""
    return codes if codes.shape[-1] == width else torch.nn.functional.pad(codes, (0, width - codes.shape[-1]))


def _nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte over the flat tensor, the first in the low half (ONNX's layout of int4 and uint4)."""
    flat = (codes.reshape(-1).to(torch.int16) & 15).to(torch.uint8)
    return pack_bits(torch.nn.functional.pad(flat, (0, flat.numel() % 2)), 4)
