"""qfx::embedding: rows gathered from a table as it is stored, and dequantized after that. No table lies in floats.

    codes                                   session, file for ONNX Runtime     file by the standard
    8 bits, one scale a row                 Gather, Sub zero, Mul              the same
    the layout of MatMulNBits (nbits.py)    GatherBlockQuantized               Gather, bits by arithmetic, Sub, Mul
    others (nf4, float8, odd groups)        Gather, bits by arithmetic, Gather from the type's values, Mul

A linear that reads the same codes in the layout of MatMulNBits (a tied lm_head) reads the very same tensor: it is
[N, blocks, block * bits / 8], and GatherBlockQuantized takes that as rows of `blocks` parts with one scale each. One
that multiplies integers reads columns, which ONNX Runtime makes of rows of 8 bits when it loads them (Weight.turned).
GatherBlockQuantized gives zeros for an id that is not in the table; a Gather of the ids before it fails there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.nbits import NBits, nbits_layout
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.scales import factors
from qfx.backends.onnx.values import Value
from qfx.format import Format
from qfx.graph import is_call
from qfx.numerics import F4_VALUES, NF4_VALUES
from qfx.packing import pack_bits
from qfx.passes._match import arguments

_VALUES = {"nf4": NF4_VALUES, "f4e2m1": F4_VALUES}


def embedding(b: Builder, ids: Value, w: Any, w_scale: Any, w_zero: Any, w_format: str, dim: int, dtype: Any) -> Value:
    """Rows `ids` (integers of any shape) of a packed table [N, dim], f32 [.., dim]."""
    assert b.node is not None
    weight = Weight.of(b, b.node.args[1:4], Format.parse(w_format), dim)
    fmt = weight.format
    if fmt.is_plain:
        b.note(f"the table is stored as {fmt}, gathered from f32", "none needed for the result; i8/ch stays int8")
        return b.op("Gather", weight.dequantized(b), ids, axis=0)
    layout = nbits_layout(weight)
    if layout is None:
        return _rows_by_value(b, ids, weight)
    whole_rows = layout.bits == fmt.bits == 8 and fmt.granularity in ("", "ch") and not fmt.has_global_scale
    if whole_rows and (b.standard or not _is_read_by_blocks(b.node)):
        return _rows_as_stored(b, ids, weight)
    return _rows_of_blocks(b, ids, weight, layout)


def _is_read_by_blocks(node: fx.Node) -> bool:
    """Is the table the weight of a weight-only linear too (a tied lm_head), which holds it in MatMulNBits' layout?"""
    codes = node.args[1]
    assert isinstance(codes, fx.Node)
    linears = [u for u in codes.users if is_call(u, torch.ops.qfx.linear.default) and u.args[1] is codes]
    return any(not arguments(u)["x_format"] for u in linears)


def _rows_as_stored(b: Builder, ids: Value, weight: Weight) -> Value:
    """Codes of 8 bits, [N, K], with a scale and zero point for each row or for all."""
    codes, scale, zero = weight.rows(b)
    if scale.rank:
        scale = Value(b.op("Unsqueeze", scale, b.ints([-1])).name, scale.dtype, (weight.n, 1))
    values = b.cast(b.op("Gather", codes, ids, axis=0), torch.float32)
    if zero is not None:
        values = b.op("Sub", values, b.cast(_gathered(b, zero, ids), torch.float32))
    return b.op("Mul", values, _gathered(b, scale, ids))


def _rows_of_blocks(b: Builder, ids: Value, weight: Weight, layout: NBits) -> Value:
    """Codes [N, blocks, block * bits / 8]; scales and zero points [N, blocks, 1]."""
    blocks = -(-weight.k // layout.block)
    data, scales, _ = layout.weights(b, weight)
    steps = b.op("Unsqueeze", scales, b.ints([-1]))
    points = layout.points(b, weight)
    if not b.standard:
        known = _in_range(b, ids, weight.n)
        rows = b.op(
            "GatherBlockQuantized", data, known, steps, points, domain=MICROSOFT, dtype=torch.float32,
            bits=layout.bits, block_size=layout.block, gather_axis=0, quantize_axis=2,
        )  # fmt: skip
    else:
        codes = _unpacked(b, b.op("Gather", data, ids, axis=0), layout.bits, (*ids.dims, blocks), layout.block)
        middle = b.scalar(float(1 << (layout.bits - 1)), torch.float32)
        zero = middle if points is None else b.cast(b.op("Gather", points, ids, axis=0), torch.float32)
        rows = b.op("Mul", b.op("Sub", codes, zero), b.op("Gather", steps, ids, axis=0))
    return _joined(b, rows, (*ids.dims, blocks, layout.block), weight.k)


def _in_range(b: Builder, ids: Value, n: int) -> Value:
    """The ids, looked up among 0 .. n - 1 (made when the file is loaded), which fails for others."""
    zero, one, end = (b.scalar(number, torch.int32) for number in (0, 1, n))
    return b.op("Gather", b.op("Range", zero, end, one), ids, axis=0)


def _rows_by_value(b: Builder, ids: Value, weight: Weight) -> Value:
    """Codes of any format, each group in whole bytes; what a code stands for is looked up or computed."""
    fmt, n = weight.format, weight.n
    group = fmt.group or (fmt.block[1] if fmt.block else weight.k)
    groups = -(-weight.k // group)
    bits = next(size for size in (2, 4, 8) if fmt.bits <= size)
    shape = (n, groups, -(-group * bits // 8))
    data = b.derived(f"{weight.name}.by{bits}", torch.uint8, shape, lambda: _bytes(weight, group, groups, bits))
    codes = _unpacked(b, b.op("Gather", data, ids, axis=0), bits, (*ids.dims, groups), group)
    if fmt.is_float:
        table = b.const(_VALUES[fmt.type] if fmt.type in _VALUES else _float8_values(fmt), torch.float32)
        values = b.op("Gather", table, b.cast(codes, torch.int32), axis=0)
    else:
        values = b.op("Sub", codes, _points(b, ids, weight))
    scale = factors(b, f"{weight.name}.steps", weight, lambda values: _by_row(weight, values)[1]())
    return _joined(b, b.op("Mul", values, _gathered(b, scale, ids)), (*ids.dims, groups, group), weight.k)


def _points(b: Builder, ids: Value, weight: Weight) -> Value:
    """What is taken off unsigned codes: the zero points of each row, or the offset of signed codes."""
    fmt = weight.format
    if not fmt.has_zero:
        return b.scalar(float(1 << (fmt.bits - 1)), torch.float32)
    assert weight.zero is not None
    points = b.derived(f"{weight.name}.offsets", torch.uint8, *_by_row(weight, weight.zero))
    return b.cast(_gathered(b, points, ids), torch.float32)


def _by_row(weight: Weight, values: Tensor) -> tuple[tuple[int, ...], Any]:
    """Scales or zero points for codes [N, groups, group]: their shape, [N, groups, 1] or [], and how to make them."""
    if not values.dim():
        return (), lambda: values
    block = weight.format.block
    spread = values if block is None else values.repeat_interleave(block[0], 0)[: weight.n]
    return (*spread.shape, 1), lambda: spread.unsqueeze(-1).contiguous()


def _bytes(weight: Weight, group: int, groups: int, bits: int) -> Tensor:
    """u8 [N, groups, bytes of a group]: unsigned codes, the first in the low bits."""
    codes = weight.codes()
    fmt = weight.format
    if fmt.is_float:
        codes = codes.view(torch.uint8)
    elif not fmt.has_zero:
        codes = (codes.to(torch.int16) + (1 << (fmt.bits - 1))).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, groups * group - weight.k))
    return pack_bits(codes.reshape(weight.n, groups, group), bits).contiguous()


def _float8_values(fmt: Format) -> Tensor:
    """f32 [256]: what each byte stands for; the bytes that are no number are not used."""
    return torch.arange(256, dtype=torch.uint8).view(fmt.code_dtype).to(torch.float32)


def _unpacked(b: Builder, packed: Value, bits: int, lead: tuple[Any, ...], count: int) -> Value:
    """u8 [*lead, bytes] to f32 [*lead, count] of unsigned codes, by arithmetic that every program has."""
    wide = b.cast(packed, torch.float32)
    width = -(-count * bits // 8)
    if bits == 8:
        return Value(wide.name, wide.dtype, (*lead, width))
    each = 8 // bits
    divisors = b.const([float(1 << (bits * i)) for i in range(each)], torch.float32)
    shifted = b.op("Floor", b.op("Div", b.op("Unsqueeze", wide, b.ints([-1])), divisors))
    base = b.scalar(float(1 << bits), torch.float32)
    codes = b.op("Sub", shifted, b.op("Mul", b.op("Floor", b.op("Div", shifted, base)), base))
    codes = b.reshape(codes, (*lead, width * each))
    if width * each != count:
        codes = b.op("Slice", codes, b.ints([0]), b.ints([count]), b.ints([-1]))
    return Value(codes.name, codes.dtype, (*lead, count))


def _joined(b: Builder, rows: Value, shape: tuple[Any, ...], k: int) -> Value:
    """[*lead, parts, part] of this shape to [*lead, k]: the parts one after the other, without the padding."""
    *lead, parts, part = shape
    whole = b.reshape(Value(rows.name, rows.dtype, shape), (*lead, parts * part))
    if parts * part != k:
        whole = b.op("Slice", whole, b.ints([0]), b.ints([k]), b.ints([-1]))
    return Value(whole.name, whole.dtype, (*lead, k))


def _gathered(b: Builder, per_row: Value, ids: Value) -> Value:
    return b.op("Gather", per_row, ids, axis=0) if per_row.rank else per_row


EMIT: dict[str, Emit] = {"qfx.embedding.default": embedding}
