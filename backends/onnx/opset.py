"""The lowest opset of ai.onnx that carries the nodes of a graph: the older it is, the more programs read the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
import torch
from onnx import defs

from qfx.backends.onnx.values import ONNX_TYPE

LOWEST = 17  # LayerNormalization came with it; the reductions and Split still have other forms there
# The IR version that came with an opset: readers of that age take no newer one.
_IR = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 11, 25: 12}


def needed_opset(nodes: Iterable[onnx.NodeProto], types: Mapping[str, int], highest: int) -> int:
    """The lowest opset in which each ai.onnx node has its attributes, its number of inputs and the types of these.

    types: ONNX element type of each value by name; a value without one fits everywhere.
    """
    seen = {_signature(node, types) for node in nodes if node.domain in ("", "ai.onnx")}
    return next((opset for opset in range(LOWEST, highest) if all(_has(s, opset) for s in seen)), highest)


def ir_version(opset: int) -> int:
    """The IR version that goes with an opset."""
    return _IR[opset]


Signature = tuple[str, tuple[str, ...], tuple[int, ...], int]


def _signature(node: onnx.NodeProto, types: Mapping[str, int]) -> Signature:
    inputs = tuple(types.get(name, 0) if name else -1 for name in node.input)
    return node.op_type, tuple(a.name for a in node.attribute), inputs, len(node.output)


def _has(signature: Signature, opset: int) -> bool:
    op_type, attributes, inputs, outputs = signature
    if not defs.has(op_type, ""):
        return True
    try:
        schema = defs.get_schema(op_type, opset, "")
    except defs.SchemaError:
        return False
    if not set(attributes) <= set(schema.attributes):
        return False
    if not schema.min_input <= len(inputs) <= schema.max_input or outputs > schema.max_output:
        return False
    return all(_fits(schema, i, t) for i, t in enumerate(inputs) if t > 0)


def _fits(schema: defs.OpSchema, position: int, element: int) -> bool:
    formal = schema.inputs[min(position, len(schema.inputs) - 1)]
    allowed: Sequence[str] = sorted(formal.types)
    return not allowed or f"tensor({_NAMES.get(element, '')})" in allowed


_NAMES = {
    **{ONNX_TYPE[t]: n for t, n in ((torch.float32, "float"), (torch.float64, "double"), (torch.bool, "bool"))},
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
    **{
        getattr(onnx.TensorProto, f"{u}INT{bits}"): f"{u.lower()}int{bits}"
        for u in ("", "U")
        for bits in (8, 16, 32, 64)
    },
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.UINT4: "uint4",
    onnx.TensorProto.FLOAT8E4M3FN: "float8e4m3fn",
    onnx.TensorProto.FLOAT8E5M2: "float8e5m2",
    **{getattr(onnx.TensorProto, name): name.lower() for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)},
}
