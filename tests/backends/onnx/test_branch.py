"""If: both ways are right, what they share is computed once outside, and nothing of the inside leaks."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from qfx.backends.onnx.branch import choose, choose_each, every_node, read_by
from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.graph import _model
from qfx.backends.onnx.values import Value


def builder() -> tuple[Builder, Value, Value]:
    """A graph with the inputs x, f32 [n, 3], and flag, bool []."""
    b = Builder(torch.nn.Module(), "onnxruntime")
    b.inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3]))
    b.inputs.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    return b, Value("x", torch.float32, (2, 3)), Value("flag", torch.bool, ())


def finished(b: Builder, y: Value) -> ort.InferenceSession:
    b.outputs.append(helper.make_tensor_value_info(y.name, TensorProto.FLOAT, None))
    return ort.InferenceSession(_model(b).SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_condition_picks() -> None:
    b, x, flag = builder()
    two = b.scalar(2.0, torch.float32)
    y = choose(b, flag, x, lambda: b.op("Mul", x, two), lambda: b.op("Sub", b.op("Neg", x), two))
    session = finished(b, b.op("Add", y, two))
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given, expected in ((True, data * 2 + 2), (False, -data)):
        (found,) = session.run(None, {"x": data, "flag": np.array(given)})
        np.testing.assert_array_equal(found, expected)


def test_what_both_share_stands_outside_once() -> None:
    b, x, flag = builder()
    length = Value("n", torch.int64, (1,))

    def shifted(sign: str) -> Value:
        if "size" not in b.memo:
            b.memo["size"] = b.cast(b.op("Mul", length, b.ints([2])), torch.float32)
        return Value(b.op(sign, x, b.memo["size"]).name, torch.float32, x.shape)

    b.inputs.append(helper.make_tensor_value_info("n", TensorProto.INT64, [1]))
    y = choose(b, flag, x, lambda: shifted("Add"), lambda: shifted("Sub"))
    session = finished(b, y)
    outer = [node.op_type for node in b.nodes]
    assert outer.count("Cast") == outer.count("Mul") >= 1
    branches = {node.op_type for node in every_node(b.nodes)} - set(outer)
    assert branches == {"Add", "Sub"}
    data = np.ones((2, 3), dtype=np.float32)
    (found,) = session.run(None, {"x": data, "flag": np.array(False), "n": np.array([4])})
    np.testing.assert_array_equal(found, data - 8)


def test_nothing_inside_is_remembered() -> None:
    b, x, flag = builder()

    def remembered() -> Value:
        b.memo["inside"] = b.op("Exp", x)
        b._constants["size of the inside",] = b.memo["inside"]
        return b.op("Neg", b.memo["inside"])

    choose(b, flag, x, remembered, lambda: b.op("Neg", x))
    assert "inside" not in b.memo
    assert ("size of the inside",) not in b._constants


def test_constants_of_a_branch_keep_their_names() -> None:
    b, x, flag = builder()
    y = choose(b, flag, x, lambda: b.op("Mul", x, b.scalar(7.0, torch.float32)), lambda: b.op("Neg", x))
    b.scalar(9.0, torch.float32)
    values = dict.fromkeys(b.initializers, helper.make_node)
    assert len(values) == 2
    (found,) = finished(b, y).run(None, {"x": np.ones((1, 3), np.float32), "flag": np.array(True)})
    np.testing.assert_array_equal(found, np.full((1, 3), 7.0))


def test_dead_nodes_of_a_branch_are_left_out() -> None:
    b, x, flag = builder()

    def wasteful() -> Value:
        b.op("Exp", x)
        return b.op("Neg", x)

    choose(b, flag, x, wasteful, lambda: b.op("Abs", x))
    assert {node.op_type for node in every_node(b.nodes)} == {"If", "Neg", "Abs"}


def test_a_node_reads_what_its_branches_take_from_outside() -> None:
    b, x, flag = builder()
    scale = b.const(torch.arange(3.0), torch.float32)
    choose(b, flag, x, lambda: b.op("Mul", b.op("Neg", x), scale), lambda: b.op("Neg", x))
    assert read_by(b.nodes[-1]) == {"flag", "x", scale.name}


def test_a_branch_must_depend_on_its_source() -> None:
    b, x, flag = builder()
    with pytest.raises(AssertionError, match="does not depend"):
        choose(b, flag, x, lambda: x, lambda: b.op("Neg", x))


def test_both_ways_have_one_dtype() -> None:
    b, x, flag = builder()
    with pytest.raises(AssertionError, match=r"float32.*int64"):
        choose(b, flag, x, lambda: b.op("Neg", x), lambda: b.cast(x, torch.int64))


def pair(b: Builder) -> tuple[Value, Value]:
    """Further inputs: y, f32 [n, 3], and other, bool []."""
    b.inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3]))
    b.inputs.append(helper.make_tensor_value_info("other", TensorProto.BOOL, []))
    return Value("y", torch.float32, (2, 3)), Value("other", torch.bool, ())


def test_several_values_of_either_source() -> None:
    b, x, flag = builder()
    y, other = pair(b)
    first, second = choose_each(
        b, flag, [x, y], lambda: [b.op("Neg", x), b.op("Neg", y)], lambda: [b.op("Abs", x), b.op("Add", y, x)]
    )
    session = finished(b, b.op("Concat", first, second, b.op("Where", other, x, y), axis=0))
    data = {"x": np.full((1, 3), -1.0, np.float32), "y": np.full((1, 3), 5.0, np.float32), "other": np.array(True)}
    for given, expected in ((True, [1, -5, -1]), (False, [1, 4, -1])):
        (found,) = session.run(None, {**data, "flag": np.array(given)})
        np.testing.assert_array_equal(found[:, 0], expected)


@pytest.mark.parametrize(("flag_is", "other_is", "expected"), [(1, 1, 6.0), (1, 0, 1.0), (0, 1, -2.0), (0, 0, -2.0)])
def test_a_branch_in_a_branch(flag_is: int, other_is: int, expected: float) -> None:
    b, x, flag = builder()
    y, other = pair(b)

    def inner() -> list[Value]:
        turned = b.op("Neg", x)
        return choose_each(b, other, [turned], lambda: [b.op("Add", turned, y)], lambda: [b.op("Abs", turned)])

    (chosen,) = choose_each(b, flag, [x], inner, lambda: [b.op("Add", x, x)])
    assert [node.op_type for node in b.nodes] == ["If"]
    data = {"x": np.full((1, 3), -1.0, np.float32), "y": np.full((1, 3), 5.0, np.float32)}
    given = {"flag": np.array(bool(flag_is)), "other": np.array(bool(other_is))}
    (found,) = finished(b, chosen).run(None, {**data, **given})
    np.testing.assert_array_equal(found, np.full((1, 3), expected))
