"""Forms that ONNX Runtime runs slowly, looked for in the graph that it made of a model.

SkipLayerNormalization                        slower than Add and LayerNormalization
MatMulNBits, 8 bits, accuracy level below 4   unpacks the whole weight in each call
MatMulNBits, 2 bits, blocks of 16 or 256, or level below 4: no fast kernel
MatMulNBits, 4 bits, level below 4            slower than with rounded activations: only where floats were asked
MatMulNBits with float zero points or g_idx   is not packed
QMoE without blocks, or level below 4         computes with the weights as floats
integer products of s8 x s8 or u8 x u8        slower than u8 x s8 (u8 x u8: where the processor has VNNI)
QuantizeLinear with a scale for each column   slower than Mul and one scale
a product of floats, or a weight dequantized in each call, where a product of integers was asked
and what is fast but not as asked: MatMulNBits of level 4, which rounds its activations, where floats were asked
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import TensorProto

from qfx import processor
from qfx.backends.onnx.branch import every_node

_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_ROUNDS = 4  # the accuracy level that rounds activations to 8 bits
_INTEGER_PRODUCTS = {"MatMulInteger", "MatMulIntegerToFloat"}


@dataclass(frozen=True)
class SlowForm:
    """owner: the FX node whose kernel it is."""

    owner: str
    reason: str


def slow_forms(graph: onnx.GraphProto, integers: Collection[str] = (), floats: Collection[str] = ()) -> list[SlowForm]:
    """What is slow in an optimized graph. integers: FX nodes that shall be products of integers; floats: those whose
    activations nothing shall round to integers."""
    held = {t.name: t for t in graph.initializer}
    makers = {name: node for node in every_node(graph.node) for name in node.output}
    found = []
    for node in every_node(graph.node):
        owner = node.name.split("/")[0]
        if node.op_type == "MatMulNBits":
            reason = _nbits(node, held, exact=owner in floats)
        else:
            reason = _reason(node, held, makers, asked=owner in integers)
        if reason:
            found.append(SlowForm(owner, reason))
    return found


def _reason(
    node: onnx.NodeProto, held: Mapping[str, TensorProto], makers: Mapping[str, onnx.NodeProto], *, asked: bool
) -> str:
    if node.op_type in ("SkipLayerNormalization", "EmbedLayerNormalization"):
        return f"{node.op_type} is slower than Add and LayerNormalization"
    if node.op_type == "QMoE":
        return _qmoe(node)
    if node.op_type in _INTEGER_PRODUCTS:
        return _integer_product(node, held, makers)
    if node.op_type == "QuantizeLinear":
        scale = held.get(node.input[1])
        by_column = scale is not None and len(scale.dims) == 1 and scale.dims[0] > 1
        return "QuantizeLinear with a scale for each column is slower than Mul and one scale" if by_column else ""
    if asked and node.op_type in _PRODUCTS:
        return f"{node.op_type} of floats where a product of integers was asked"
    if asked and node.op_type == "DequantizeLinear" and node.input[0] in held:
        return "its weight is dequantized in each call"
    return ""


def _nbits(node: onnx.NodeProto, held: Mapping[str, TensorProto], *, exact: bool) -> str:
    attrs: dict[str, Any] = {a.name: a.i for a in node.attribute}
    bits, block, level = attrs["bits"], attrs["block_size"], attrs.get("accuracy_level", 0)
    if bits == 8 and level != _ROUNDS:
        return f"MatMulNBits with 8 bits and accuracy level {level} unpacks the whole weight in each call"
    if bits == 2 and (level != _ROUNDS or block in (16, 256)):
        return f"MatMulNBits with 2 bits, blocks of {block} and accuracy level {level} has no fast kernel"
    if exact and level == _ROUNDS:
        return "MatMulNBits with accuracy level 4 rounds its activations to 8 bits where floats were asked"
    if not exact and level != _ROUNDS:
        return f"MatMulNBits with accuracy level {level} is slower than with level 4, and floats were not asked"
    given = list(node.input) + [""] * 6
    zero = held.get(given[3])
    if given[4] or (zero is not None and zero.data_type != TensorProto.UINT8):
        return "MatMulNBits with float zero points or g_idx is not packed"
    return ""


def _qmoe(node: onnx.NodeProto) -> str:
    attrs: dict[str, Any] = {a.name: a.i for a in node.attribute}
    bits, level = attrs.get("expert_weight_bits", 4), attrs.get("accuracy_level", 0)
    if not attrs.get("block_size"):
        return "QMoE with one scale for each row computes with the weights as floats"
    if level != _ROUNDS and bits != 8:  # 8 bits are computed by integers at every level
        return f"QMoE with {bits} bits and accuracy level {level} computes with the weights as floats"
    return ""


def _integer_product(
    node: onnx.NodeProto, held: Mapping[str, TensorProto], makers: Mapping[str, onnx.NodeProto]
) -> str:
    left, right = (_type(name, held, makers) for name in node.input[:2])
    if left == TensorProto.INT8 and right == TensorProto.INT8:
        return f"{node.op_type} of s8 x s8 is slower than u8 x s8"
    if left == TensorProto.UINT8 and right == TensorProto.UINT8 and not processor.saturates():
        return f"{node.op_type} of u8 x u8 is slower than u8 x s8"
    return ""


def _type(name: str, held: Mapping[str, TensorProto], makers: Mapping[str, onnx.NodeProto]) -> int:
    """The element type of a value, where it can be told from what makes it; else 0."""
    if name in held:
        return int(held[name].data_type)
    maker = makers.get(name)
    if maker is None:
        return 0
    if maker.op_type == "DynamicQuantizeLinear":
        return int(TensorProto.UINT8)
    if maker.op_type == "Cast":
        to: int = next(a.i for a in maker.attribute if a.name == "to")
        return to
    if maker.op_type == "QuantizeLinear":
        points = maker.input[2] if len(maker.input) > 2 else ""
        return _type(points, held, makers) if points else int(TensorProto.UINT8)
    return _type(maker.input[0], held, makers) if maker.op_type in _MOVES else 0


_MOVES = {"Reshape", "Transpose", "Expand", "Clip", "Squeeze", "Unsqueeze", "Identity"}
