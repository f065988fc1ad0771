"""The lowest opset that carries a graph, and the IR version that goes with it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, checker, helper

from qfx.backends.onnx.build import OPSET
from qfx.backends.onnx.opset import LOWEST, ir_version, needed_opset


def node(op_type: str, count: int = 1, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, [f"i{i}" for i in range(count)], ["y"], **attributes)


FLOAT, INT4 = {"i0": TensorProto.FLOAT}, {"i0": TensorProto.INT4, "i1": TensorProto.FLOAT}

NEEDED = {
    "an old operator": (node("Relu"), FLOAT, LOWEST),
    "LayerNormalization": (node("LayerNormalization", 2, axis=-1), FLOAT, 17),
    "axes of a reduction as an input": (node("ReduceMax", 2, keepdims=1), FLOAT, 18),
    "axes of a reduction as an attribute": (node("ReduceMax", 1, axes=[0], keepdims=1), FLOAT, 17),
    "Gelu": (node("Gelu"), FLOAT, 20),
    "a float8 cast": (node("Cast", 1, to=1), {"i0": TensorProto.FLOAT8E4M3FN}, 19),
    "int4": (node("DequantizeLinear", 2, axis=1), INT4, 21),
    "blocks": (node("DequantizeLinear", 2, axis=0, block_size=32), {"i0": TensorProto.INT8}, 21),
    "an operator of another domain": (node("MatMulNBits", 3, domain="com.microsoft", bits=4), FLOAT, LOWEST),
    "an operator that no schema knows": (node("NoSuchOperator"), FLOAT, LOWEST),
}


@pytest.mark.parametrize("name", NEEDED)
def test_needed(name: str) -> None:
    one, types, expected = NEEDED[name]
    assert needed_opset([one], types, OPSET) == expected


def test_the_highest_need_counts() -> None:
    assert needed_opset([NEEDED["an old operator"][0], NEEDED["Gelu"][0]], FLOAT, OPSET) == 20


def test_unknown_types_fit() -> None:
    assert needed_opset([node("DequantizeLinear", 2, axis=1)], {}, OPSET) == LOWEST


def test_nothing_to_carry() -> None:
    assert needed_opset([], {}, OPSET) == LOWEST


@pytest.mark.parametrize("opset", range(LOWEST, OPSET + 1))
def test_versions_go_together(opset: int) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    opsets = [helper.make_opsetid("", opset)]
    checker.check_model(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version(opset)))
    assert ir_version(opset) == helper.find_min_ir_version_for(opsets)
