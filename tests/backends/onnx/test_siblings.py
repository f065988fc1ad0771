"""Linears of one input become one kernel in files: same numbers, fewer kernels, and only where they are alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qfx import run
from qfx.backends.onnx import lowering
from qfx.format import Format
from qfx.packing import Packed, pack_weight
from qfx.passes.cleanup import cleanup
from tests.backends.onnx.checks import sqnr
from tests.backends.onnx.files import File
from tests.graphs import Function, capture
from tests.seeded import randn

EXACT = 55.0  # dB between MatMulNBits' own roundings of one input in two products


def packed(n: int, k: int, fmt: str, seed: int) -> Packed:
    weight = randn(n, k, seed=seed)
    return pack_weight(weight, Format.parse(fmt))


def three(own: Any, x: Tensor) -> Any:
    """Three linears of x; `own.kinds` are their formats, `own.biased` those with a bias."""
    x, found = x * own.ones, []
    for i, fmt in enumerate(own.kinds):
        parts = [getattr(own, f"{what}{i}", None) for what in ("w", "scale", "zero", "bias")]
        found.append(torch.ops.qfx.linear(x, *parts, None, None, None, "", fmt))
    return tuple(found)


def graph_of(kinds: list[str], widths: list[int], k: int = 48, biased: tuple[int, ...] = ()) -> tuple[Any, Any]:
    tensors: dict[str, Any] = {"ones": torch.ones(k)}  # they tell K
    for i, (fmt, n) in enumerate(zip(kinds, widths, strict=True)):
        one = packed(n, k, fmt, i)
        tensors |= {f"w{i}": one.data, f"scale{i}": one.scale}
        if one.zero is not None:
            tensors[f"zero{i}"] = one.zero
        if i in biased:
            tensors[f"bias{i}"] = randn(n, seed=9 + i)
    function = Function(three)
    for name, value in tensors.items():
        function.register_buffer(name, value)
    function.kinds = kinds  # type: ignore[assignment]
    gm = capture(function, torch.randn(2, 5, k), dynamic=True)
    run.run(gm, [cleanup])
    return function, gm


def numbers(function: Any, gm: fx.GraphModule, file: File, k: int = 48) -> list[float]:
    x = randn(3, 4, k, seed=5)
    (name,) = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return [sqnr(e, f) for e, f in zip(function(x), file({name: x}), strict=True)]


@pytest.mark.parametrize("fmt", ["i4/g16", "u4/g32", "i8/ch", "i3/g16", "i2/g64", "u4/ch"])
def test_one_kernel_with_the_numbers_of_three(fmt: str) -> None:
    function, gm = graph_of([fmt] * 3, [7, 16, 5], k=40)
    file = File(gm)
    assert (file.kinds["MatMulNBits"], file.kinds["Split"]) == (1, 1)
    alone = File(gm, runtime="session")
    assert (alone.kinds["MatMulNBits"], alone.kinds["Split"]) == (3, 0)
    x = randn(3, 4, 40, seed=5)
    (name,) = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    for one, other, third in zip(file({name: x}), alone({name: x}), function(x), strict=True):
        assert sqnr(other, one) > EXACT
        assert sqnr(third, one) > 34


@pytest.mark.parametrize("biased", [(), (1,), (0, 1, 2)])
def test_biases_of_some(biased: tuple[int, ...]) -> None:
    function, gm = graph_of(["i8/ch"] * 3, [8, 4, 6], biased=biased)
    file = File(gm)
    assert file.kinds["MatMulNBits"] == 1
    assert "Add" not in file.kinds
    assert min(numbers(function, gm, file)) > 34


def test_only_those_that_are_alike() -> None:
    function, gm = graph_of(["i4/g16", "i8/ch", "i4/g16"], [8, 8, 8])
    file = File(gm)
    assert file.kinds["MatMulNBits"] == 2
    assert min(numbers(function, gm, file)) > 34
    _, gm = graph_of(["i4/g16", "i4/g32"], [8, 8])
    assert File(gm).kinds["MatMulNBits"] == 2


def test_a_weight_that_is_used_twice_stays_alone() -> None:
    one = packed(8, 48, "i8/ch", 0)

    def twice(own: Any, x: Tensor) -> Any:
        rest = (None, None, None, None, None, "", "i8/ch")
        return tuple(torch.ops.qfx.linear(x, own.w, own.scale, *rest) + i for i in range(2))

    function = Function(twice)
    function.register_buffer("w", one.data)
    function.register_buffer("scale", one.scale)
    gm = capture(function, torch.randn(2, 5, 48), dynamic=True)
    file = File(gm)
    assert "Split" not in file.kinds
    assert min(numbers(function, gm, file)) > 34


@pytest.mark.parametrize("prefill", [False, True])
def test_a_weight_in_two_companies(prefill: bool) -> None:
    """As DeBERTa's query projection, of the text beside keys and values, of positions beside those of other layers."""

    def forward(own: Any, x: Tensor) -> Any:
        x, found = x * own.ones, []
        for factor, pair in ((1.0, (0, 1)), (2.0, (0, 2))):
            y = x * factor
            for i in pair:
                bias = own.bias0 if (i, factor) == (0, 2.0) else None
                w, scale = getattr(own, f"w{i}"), getattr(own, f"scale{i}")
                found.append(torch.ops.qfx.linear(y, w, scale, None, bias, None, None, None, "", "i4/g16"))
        return tuple(found)

    function, _ = graph_of(["i4/g16"] * 3, [32, 32, 32], biased=(0,))
    function.function = forward
    gm = capture(function, torch.randn(2, 5, 48), dynamic=True)
    run.run(gm, [cleanup])
    file = File(gm, prefill=prefill)
    assert prefill or file.kinds["MatMulNBits"] == 2
    assert min(numbers(function, gm, file)) > 34


def test_the_packed_weight_is_the_only_one_in_the_file() -> None:
    _, gm = graph_of(["i4/g16"] * 3, [64, 64, 64], k=64)
    held = [t for t in File(gm).stage.model.graph.initializer if len(t.dims) == 3]
    assert [list(t.dims) for t in held] == [[192, 4, 8]]


def test_standard_files_know_no_such_kernel() -> None:
    _, gm = graph_of(["i4/g16"] * 3, [8, 8, 8])
    kinds = [node.op_type for node in lowering.build(gm, runtime="standard")[1].model.graph.node]
    assert "Split" not in kinds
    assert kinds.count("MatMul") == 3
