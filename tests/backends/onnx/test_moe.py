"""Experts on ONNX Runtime against their reference kernels: rows split by expert, quantized once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qfx.ops.floats
from qfx.backends.onnx import OnnxLowered, lower
from qfx.backends.onnx.lowering import build
from qfx.format import Format
from qfx.packing import Packed, pack_weight
from tests.backends.onnx.checks import floats, sqnr
from tests.backends.onnx.test_quant import EXACT, ROUNDED, graph_of

assert qfx.ops.floats.grouped_linear_quant is not None

GROUPED = torch.ops.qfx.grouped_linear_quant.default


def arguments(packed: Packed, ends: list[int], x_format: str) -> tuple[Any, ...]:
    offs = torch.tensor(ends, dtype=torch.int32)
    return packed.data, packed.scale, packed.zero, offs, x_format, str(packed.format)


def lowered(x: Tensor, *given: Any) -> tuple[float, OnnxLowered]:
    gm, reference = graph_of(GROUPED, x, *given)
    made = lower(gm, strict=True)
    (found,) = made(x)
    assert found.shape == reference.shape
    return sqnr(reference, found), made


def rows(count: int) -> Tensor:
    return floats(count, 64) * floats(count, 1, seed=1).abs() * 3


@pytest.mark.parametrize("w_format", ["i8/ch", "u8/ch", "i8", "u8", "i4/ch", "u4/ch"])
@pytest.mark.parametrize("x_format", ["i8/tok", "u8/tok", "i4/tok", "u4/tok"])
def test_integer_experts_are_exact(w_format: str, x_format: str) -> None:
    packed = pack_weight(floats(3, 24, 64, seed=2), Format.parse(w_format))
    quality, made = lowered(rows(10), *arguments(packed, [4, 4, 9], x_format))
    assert quality > EXACT
    assert made.kernels == {"grouped_linear_quant_default": "MatMulIntegerToFloat u8 x s8 (x3)"}


@settings(deadline=None, max_examples=8)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=5), after=st.integers(0, 2))
def test_any_split(counts: list[int], after: int) -> None:
    ends = torch.tensor(counts).cumsum(0).tolist()
    packed = pack_weight(floats(len(counts), 24, 64, seed=2), Format.parse("i8/ch"))
    x = rows(ends[-1] + after)
    gm, reference = graph_of(GROUPED, x, *arguments(packed, ends, "i8/tok"))
    (found,) = lower(gm, strict=True)(x)
    assert found.shape == reference.shape
    assert torch.allclose(found, reference, rtol=1e-5, atol=1e-5)
    assert not found[ends[-1] :].any()


def test_rows_of_another_expert_are_far_off() -> None:
    """Negative control: the tolerance tells where an expert's rows end."""
    packed = pack_weight(floats(3, 24, 64, seed=2), Format.parse("i8/ch"))
    x = rows(10)
    moved = GROUPED(x, *arguments(packed, [5, 5, 10], "i8/tok"))
    gm, _ = graph_of(GROUPED, x, *arguments(packed, [4, 4, 10], "i8/tok"))
    assert sqnr(moved, lower(gm)(x)[0]) < 30


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
def test_rows_are_quantized_and_split_once(runtime: str) -> None:
    packed = pack_weight(floats(3, 24, 64, seed=2), Format.parse("i8/ch"))
    gm, _ = graph_of(GROUPED, rows(10), *arguments(packed, [4, 4, 9], "i8/tok"))
    _, built = build(gm, runtime=runtime)
    kernels = Counter(node.op_type for node in built.model.graph.node)
    assert kernels["ReduceMax"] == kernels["Split"] == 1
    assert kernels["MatMulInteger" if runtime == "standard" else "MatMulIntegerToFloat"] == 3


@pytest.mark.parametrize("w_format", ["i4/g32", "u4/g32", "i8/ch", "i2/g32", "nf4/g32"])
def test_weight_only_experts(w_format: str) -> None:
    packed = pack_weight(floats(3, 24, 64, seed=2), Format.parse(w_format))
    quality, made = lowered(rows(10), *arguments(packed, [4, 4, 9], ""))
    assert quality > ROUNDED
    assert "(x3)" in made.kernels["grouped_linear_quant_default"]


def test_other_input_formats_run_in_torch_and_are_told() -> None:
    packed = pack_weight(floats(3, 24, 64, seed=2), Format.parse("i8/ch"))
    x = rows(10)
    gm, reference = graph_of(GROUPED, x, *arguments(packed, [4, 4, 9], "i8/dyn"))
    made = lower(gm)
    assert torch.equal(made(x)[0], reference)
    assert [note.reason for note in made.notes] == ["runs in torch: experts with activations in i8/dyn"]
