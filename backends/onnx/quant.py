"""qfx::linear and qfx::dequantize as the fastest ONNX Runtime kernels that compute what they mean.

integer x integer       MatMulIntegerToFloat, activations u8 with zero point 128, weights s8 per column
weight only, grouped    MatMulNBits with 2, 4 or 8 bits (its activations are rounded to 8 bits per block)
the same with x="f32"   MatMulNBits of 4 bits on float activations; 8 bits as two such products, 2 bits held in 4
other formats           the weight dequantized once to f32, with a note
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qfx.backends.onnx import portable, prefill, siblings
from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.nbits import NBits, Operands, nbits_layout
from qfx.backends.onnx.quant_input import Codes, fake_quantized, quantized_input
from qfx.backends.onnx.quant_weights import Weight
from qfx.backends.onnx.values import Value
from qfx.format import Format
from qfx.graph import is_call
from qfx.live.segments import number_of
from qfx.passes._match import arguments


def linear(
    b: Builder, x: Value, w: Any, w_scale: Any, w_zero: Any, bias: Value | None, x_scale: Value | None,
    x_zero: Value | None, smooth: Value | None, x_format: str, w_format: str,
) -> Value:  # fmt: skip
    """y = quantized(x / smooth) @ weight^T + bias."""
    assert b.node is not None
    weight = Weight.of(b, b.node.args[1:4], Format.parse(w_format), x.dims[-1])
    return product(b, x, weight, bias, x_scale, x_zero, smooth, x_format)


def product(
    b: Builder, x: Value, weight: Weight, bias: Value | None, x_scale: Value | None, x_zero: Value | None,
    smooth: Value | None, x_format: str,
) -> Value:  # fmt: skip
    """quantized(x / smooth) @ weight^T + bias by the fastest kernels that compute it."""
    rows = b.cast(x, torch.float32)
    bias = None if bias is None else b.cast(bias, torch.float32)
    fmt = Format.parse(x_format) if x_format else None
    if (
        b.standard
        and weight.format.is_integer
        and weight.rank == 2
        and not (fmt is not None and fmt.dynamic and is_integer_pair(fmt, weight.format))
    ):
        return _standard(b, rows, weight, bias, x_scale, x_zero, smooth, fmt)
    if fmt is not None and is_integer_pair(fmt, weight.format):
        return _integer(b, rows, weight, bias, x_scale, x_zero, smooth, fmt)
    if fmt is None:
        rows = rows if smooth is None else b.op("Div", rows, smooth)
    layout = None if b.standard else nbits_layout(weight)
    if fmt is not None and not (layout is not None and _is_8bit_dynamic(fmt)):
        rows = fake_quantized(b, rows, fmt, x_scale, x_zero, smooth)
    elif fmt is not None and smooth is not None:
        rows = b.op("Div", rows, smooth)
    if layout is not None:
        if fmt is not None and fmt.is_plain:
            return _by_floats(b, rows, weight, layout, bias)
        if not (fmt is not None and _is_8bit_dynamic(fmt)):
            what = "float activations were asked" if fmt is None else f"activations in {fmt} were asked"
            b.note(
                f"{what}; MatMulNBits rounds them to 8 bits per block inside (about 40 dB)",
                "none where that is enough; a rule with x='f32' for this node computes them in f32",
            )
        return _nbits(b, rows, weight, layout, bias)
    if not (weight.format.is_plain and number_of(weight.name)):  # columns kept apart (outliers) are asked to be float
        b.note(
            f"the weight is stored as {weight.format}, computed in f32",
            "none needed for the result; for speed use i8, i4/g32 or i4/g128",
        )
    y = portable.product(b, rows, _float(b, weight))
    return y if bias is None else b.op("Add", y, bias)


def is_integer_product(node: fx.Node) -> bool:
    """Shall a node be a product of integers?"""
    if not is_call(node, torch.ops.qfx.linear.default):
        return False
    given = arguments(node)
    return bool(given["x_format"]) and is_integer_pair(Format.parse(given["x_format"]), Format.parse(given["w_format"]))


def is_float_product(node: fx.Node) -> bool:
    """Shall a node multiply activations that nothing rounds to integers?"""
    if not is_call(node, torch.ops.qfx.linear.default, torch.ops.qfx.grouped_linear_quant.default):
        return False
    asked = arguments(node)["x_format"]
    return bool(asked) and Format.parse(asked).is_plain


def is_integer_pair(x: Format, w: Format) -> bool:
    """Is a product of input and weight one of integers, with scales of tensors, tokens and channels?"""
    plain = x.scale_type == "f32" and not w.has_global_scale
    return plain and x.is_integer and w.is_integer and x.granularity in ("", "tok") and w.granularity in ("", "ch")


def _is_8bit_dynamic(fmt: Format) -> bool:
    """MatMulNBits rounds its input to 8 bits per block at run time, finer than per token: nothing is rounded before."""
    return fmt.type == "i8" and fmt.dynamic and fmt.granularity in ("", "tok") and fmt.clip == 100


def _integer(
    b: Builder, x: Value, weight: Weight, bias: Value | None, x_scale: Value | None, x_zero: Value | None,
    smooth: Value | None, fmt: Format,
) -> Value:  # fmt: skip
    """Exact integer sums, scaled: MatMulIntegerToFloat, or DynamicQuantizeMatMul where it means the same."""
    if str(fmt) == "u8/dyn" and smooth is None and not b.standard:
        codes, scale, zero = weight.columns(b)
        return b.op("DynamicQuantizeMatMul", x, codes, scale, zero, bias, domain=MICROSOFT, dtype=torch.float32)
    q = quantized_input(b, x, fmt, x_scale, x_zero, smooth)
    y = integer_product(b, q, weight, bias if q.rows is None else None)
    if q.rows is None:
        return y
    y = b.op("Mul", y, q.rows)
    y = y if bias is None else b.op("Add", y, bias)
    return b.reshape(Value(y.name, y.dtype, (q.rows.dims[0], weight.n)), (*x.dims[:-1], weight.n))


def integer_product(b: Builder, q: Codes, weight: Weight, bias: Value | None = None) -> Value:
    """Exact sums of codes times the scales, + bias; what is still to be multiplied is the scale of each row, q.rows."""
    codes, scale, zero = weight.columns(b)
    if b.standard:
        sums = b.op("MatMulInteger", q.codes, codes, q.zero, zero, dtype=torch.int32)
        y = b.op("Mul", b.cast(sums, torch.float32), scale if q.rows is not None else b.op("Mul", scale, q.scale))
        y = y if bias is None else b.op("Add", y, bias)
    else:
        y = b.op(
            "MatMulIntegerToFloat", q.codes, codes, q.scale, scale, q.zero, zero, bias,
            domain=MICROSOFT, dtype=torch.float32,
        )  # fmt: skip
    return y if q.shift is None else b.op("Sub", y, b.op("Mul", q.shift, weight.column_sums(b)))


def _float(b: Builder, weight: Weight) -> Value:
    """The weight as f32 [.., N, K]; a file keeps its codes."""
    return portable.unpacked(b, weight) if b.portable else weight.dequantized(b)


def _standard(
    b: Builder, x: Value, weight: Weight, bias: Value | None, x_scale: Value | None, x_zero: Value | None,
    smooth: Value | None, fmt: Format | None,
) -> Value:  # fmt: skip
    """A product of dequantized values; what reads the file may make an integer kernel of it."""
    if fmt is None:
        rows = x if smooth is None else b.op("Div", x, smooth)
    elif fmt.is_integer and not fmt.dynamic and fmt.granularity == "":
        q = quantized_input(b, x, fmt, x_scale, x_zero, smooth)
        rows = b.op("DequantizeLinear", q.codes, q.scale, q.zero, dtype=torch.float32)
    else:
        rows = fake_quantized(b, x, fmt, x_scale, x_zero, smooth)
    y = b.op("MatMul", rows, portable.columns(b, weight), dtype=torch.float32)
    return y if bias is None else b.op("Add", y, bias)


_ROUNDED, _FLOATS = 4, 1  # accuracy levels: activations rounded to 8 bits per block, or used as they are


def _nbits(b: Builder, x: Value, weight: Weight, layout: NBits, bias: Value | None) -> Value:
    done = siblings.taken(b)
    if done is not None:
        return done
    group = siblings.siblings(b, x.dims[-1])
    weights = [one.weight for one in group] or [weight]
    packed = layout.weights(b, *weights)
    if group:
        bias = siblings.stacked_bias(b, group)
    n = sum(one.n for one in weights)

    def few() -> Value:
        return _matmul_nbits(b, x, (weight.k, n), layout, packed, bias, _ROUNDED)

    y = prefill.product(b, x, weights, bias, few) if prefill.has_prompts(b, x) else few()
    y = Value(y.name, y.dtype, (*x.dims[:-1], n))
    return siblings.split(b, y, group) if group else y


def _by_floats(b: Builder, x: Value, weight: Weight, layout: NBits, bias: Value | None) -> Value:
    """Activations in f32. Only 4 bits have a fast kernel for that, so 8 bits are 16 * high + low of 4 each."""
    shape = (weight.k, weight.n)
    if layout.bits == 8:
        four = NBits(4, layout.block)
        high, low = layout.halves(b, weight)
        upper = _matmul_nbits(b, x, shape, four, high, bias, _FLOATS)
        return b.op("Add", upper, _matmul_nbits(b, x, shape, four, low, None, _FLOATS))
    if layout.bits == 2:
        b.note(
            "codes of 2 bits are held in 4: no fast kernel multiplies them with floats",
            "none needed for the result; without x='f32' they stay in 2 bits",
        )
        layout = NBits(4, layout.block)
    return _matmul_nbits(b, x, shape, layout, layout.weights(b, weight), bias, _FLOATS)


def _matmul_nbits(
    b: Builder, x: Value, shape: tuple[int, int], layout: NBits, packed: Operands, bias: Value | None, level: int
) -> Value:
    k, n = shape
    attrs = {"K": k, "N": n, "bits": layout.bits, "block_size": layout.block, "accuracy_level": level}
    return b.op("MatMulNBits", x, *packed, None, bias, domain=MICROSOFT, dtype=torch.float32, **attrs)


def dequantize(b: Builder, w: Any, w_scale: Any, w_zero: Any, w_format: str, last_dim: int, dtype: Any) -> Value:
    """A packed weight as floats: 8-bit integers by DequantizeLinear, others computed once at lowering."""
    assert b.node is not None
    weight = Weight.of(b, b.node.args[0:3], Format.parse(w_format), last_dim)
    fmt = weight.format
    if fmt.type == "i8" and fmt.granularity in ("", "ch") and weight.rank == 2 and not fmt.has_global_scale:
        codes, scale, _ = weight.rows(b)
        return b.op("DequantizeLinear", codes, scale, dtype=torch.float32, axis=0)
    b.note(f"the weight is stored as {fmt}, held in f32", "none needed for the result")
    return _float(b, weight)


EMIT: dict[str, Emit] = {
    "qfx.linear.default": linear,
    "qfx.dequantize.default": dequantize,
}
