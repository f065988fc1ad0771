"""Prompts by integers: many rows take 8-bit products, few MatMulNBits; the weight is what its few bits stand for."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from qfx.backends.onnx.prefill import MANY
from qfx.backends.onnx.slow_forms import slow_forms
from qfx.format import Format
from qfx.numerics import fake_quantize
from tests.backends.onnx.checks import sqnr
from tests.backends.onnx.files import File
from tests.backends.onnx.test_siblings import graph_of, packed
from tests.seeded import randn

FORMATS = ["i4/g16", "u4/g32", "i3/g16", "i2/g32", "u4/ch", "i8/ch", "u8/g32"]


def run(file: File, gm: Any, x: Tensor) -> list[Tensor]:
    (name,) = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return file({name: x})


@pytest.mark.parametrize("fmt", FORMATS)
def test_many_rows_are_rounded_per_token(fmt: str) -> None:
    function, gm = graph_of([fmt] * 2, [24, 9], k=70, biased=(1,))
    file = File(gm, prefill=True)
    assert file.kinds["If"] == file.kinds["MatMulIntegerToFloat"] == file.kinds["MatMulNBits"] == 1
    x = randn(2, MANY, 70, seed=1)
    x[0, 3] *= 100  # a token with large values does not cost the others their precision
    rounded = fake_quantize(x, Format.parse("i8/tok"), activation=True)
    for i, (found, expected) in enumerate(zip(run(file, gm, x), function(x), strict=True)):
        weight = packed(24 if i == 0 else 9, 70, fmt, i).dequantize()
        again = fake_quantize(weight, Format.parse("i8/ch"))
        exact = rounded @ again.T + (function.bias1 if i else 0)
        assert sqnr(exact, found) > 90
        assert sqnr(expected[0, 3], found[0, 3]) > 30
        assert sqnr(expected[1], found[1]) > 30


@pytest.mark.parametrize("rows", [1, MANY - 1])
def test_few_rows_are_those_of_the_file_without_it(rows: int) -> None:
    _, gm = graph_of(["i4/g16"] * 2, [24, 9], k=64)
    x = randn(1, rows, 64, seed=1)
    for one, other in zip(run(File(gm, prefill=True), gm, x), run(File(gm), gm, x), strict=True):
        assert torch.equal(one, other)


def test_the_border_lies_at_many_rows() -> None:
    _, gm = graph_of(["i2/g16"], [24], k=64)
    with_, without = File(gm, prefill=True), File(gm)
    x = randn(1, MANY, 64, seed=1)
    assert not torch.equal(run(with_, gm, x)[0], run(without, gm, x)[0])


def test_zeros_stay_zeros() -> None:
    _, gm = graph_of(["i4/g16"], [24], k=64)
    x = torch.zeros(1, 2 * MANY, 64)
    assert not bool(run(File(gm, prefill=True), gm, x)[0].any())


def test_8_bit_weights_are_taken_as_they_are() -> None:
    _, gm = graph_of(["i8/ch"], [128], k=1024)
    weights = File(gm, prefill=True).weights
    (codes,) = [w for name, w in weights.items() if name.endswith(".prompt")]
    assert torch.equal(codes.t(), packed(128, 1024, "i8/ch", 0).data)


def test_a_weight_of_zeros_has_a_scale() -> None:
    function, gm = graph_of(["i4/g16"], [128], k=1024)
    function.w0.fill_(0x88)
    gm.w0.fill_(0x88)
    weights = File(gm, prefill=True).weights
    (codes,) = [w for name, w in weights.items() if name.endswith(".prompt")]
    (scale,) = [w for name, w in weights.items() if name.endswith(".prompt.scale")] or [torch.ones(1)]
    assert not bool(codes.any())
    assert bool((scale > 0).all())


def test_nothing_slow_in_either_branch() -> None:
    _, gm = graph_of(["i4/g16"] * 2, [24, 9], k=64)
    model = File(gm, prefill=True).stage.model
    assert slow_forms(model.graph) == []
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    (branch,) = [n for n in broken.graph.node if n.op_type == "If"]
    for attribute in branch.attribute:
        for node in attribute.g.node:
            for one in node.attribute:
                if one.name == "accuracy_level":
                    one.i = 0
                if one.name == "bits":
                    one.i = 8
    assert [form.reason for form in slow_forms(broken.graph)], "a slow form inside a branch was not seen"


def test_no_float_weight_in_the_file() -> None:
    _, gm = graph_of(["i4/g16"], [128], k=256)
    model = File(gm, prefill=True).stage.model
    assert TensorProto.FLOAT not in {t.data_type for t in model.graph.initializer if list(t.dims) == [256, 128]}


def test_a_last_layer_of_one_token_has_no_second_weight() -> None:
    def last(own: Any, x: Tensor) -> Tensor:
        rest = (None, None, None, None, None, "", "i8/ch")
        y: Tensor = torch.ops.qfx.linear(x[:, -1:], own.w, own.scale, *rest)
        return y

    from tests.graphs import Function, capture

    function, one = Function(last), packed(16, 48, "i8/ch", 0)
    function.register_buffer("w", one.data)
    function.register_buffer("scale", one.scale)
    gm = capture(function, torch.randn(2, 5, 48), dynamic=True)
    assert "If" not in File(gm, prefill=True).kinds
