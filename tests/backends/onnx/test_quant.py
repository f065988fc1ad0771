"""qfx operators on ONNX Runtime against their reference kernels, over formats and shapes; which kernels run them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qfx.ops.floats
import qfx.ops.packed
from qfx.backends.onnx import OnnxLowered, lower
from qfx.format import Format
from qfx.numerics import choose_qparams
from qfx.packing import Packed, pack_weight
from tests.backends.onnx.checks import floats, sqnr

assert qfx.ops.packed.linear is not None
assert qfx.ops.floats.rope is not None

EXACT = 110.0  # dB: the same codes, sums in f32
ROUNDED = 35.0  # dB: MatMulNBits rounds its activations to 8 bits per block


def graph_of(target: Any, x: Tensor, *arguments: Any) -> tuple[fx.GraphModule, Tensor]:
    """One call on the placeholder x, the tensors among its arguments held by the module; and the reference result."""
    root, graph, mode = nn.Module(), fx.Graph(), FakeTensorMode()
    node = graph.placeholder("x")
    node.meta["val"] = mode.from_tensor(x)
    given: list[Any] = [node]
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            root.register_buffer(f"c{i}", argument)
            held = graph.get_attr(f"c{i}")
            held.meta["val"] = mode.from_tensor(argument)
            given.append(held)
        else:
            given.append(argument)
    call = graph.call_function(target, tuple(given))
    reference = target(x, *arguments)
    call.meta["val"] = mode.from_tensor(reference)
    graph.output((call,))
    return fx.GraphModule(root, graph), reference


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None, x_format: str, smooth: Tensor | None = None, strict: bool = False
) -> tuple[float, OnnxLowered]:
    """SQNR of qfx::linear on ONNX Runtime to the reference."""
    scale, zero = None, None
    if x_format and not Format.parse(x_format).dynamic and not Format.parse(x_format).is_plain:
        seen = x if smooth is None else x / smooth
        scale, zero = choose_qparams(seen, Format.parse(x_format), activation=True)
    data = (packed.data, packed.scale, packed.zero, bias, scale, zero, smooth, x_format, str(packed.format))
    gm, reference = graph_of(torch.ops.qfx.linear.default, x, *data)
    lowered = lower(gm, strict=strict)
    (found,) = lowered(x)
    assert found.shape == reference.shape
    assert found.dtype == reference.dtype
    return sqnr(reference, found), lowered


def inputs() -> Tensor:
    x = floats(2, 5, 96) * floats(2, 5, 1, seed=1).abs() * 3
    x[0, 0] = 0  # a row without a scale of its own
    return x


WEIGHTS = ["i8/ch", "i8", "u8/ch", "u8", "i4/ch", "u4/ch", "i2", "i3/ch", "u6/ch"]
INPUTS = ["i8/tok", "i8", "u8", "i8/dyn", "u8/dyn", "u8/tok", "i4/tok", "u4/tok", "i6"]
INPUTS += ["i4/tok/c80", "u4/tok/c90", "i8/tok/c50", "u8/dyn/c50", "i4/dyn/c70"]  # values beyond saturate


@pytest.mark.parametrize(("w_format", "x_format"), list(itertools.product(WEIGHTS, INPUTS)))
def test_integer_linear_is_exact(w_format: str, x_format: str) -> None:
    packed = pack_weight(floats(40, 96, seed=2), Format.parse(w_format))
    for bias, smooth in ((None, None), (floats(40, seed=3), floats(96, seed=4).abs() + 0.5)):
        quality, lowered = linear(inputs(), packed, bias, x_format, smooth, strict=True)
        assert quality > EXACT
        kernel = lowered.kernels["linear_default"]
        assert kernel in ("MatMulIntegerToFloat u8 x s8", "DynamicQuantizeMatMul u8 x s8")


GROUPED = [
    *("i8/ch", "i8", "u8/ch", "i4/ch", "i4/g32", "u4/g32", "i4/g16", "i4/g128", "i8/g32", "u8/g48", "i3/g32", "u3/g64"),
    *("i2/g32", "i2/g16", "u2/g32", "u2/g64", "i5/g32", "u6/g32", "i4/b8x32", "u4/b16x32", "i4/g32/f16", "i4/g32/e8m0"),
    *("i8/g16/e4m3", "i4/g64/bf16", "i4/g256"),
]


@pytest.mark.parametrize("w_format", GROUPED)
def test_weight_only_linear_by_nbits(w_format: str) -> None:
    for k, n in ((96, 40), (130, 24)):
        packed = pack_weight(floats(n, k, seed=2), Format.parse(w_format))
        x = floats(3, k, seed=5)
        quality, lowered = linear(x, packed, floats(n, seed=3), "", strict=True)
        assert quality > ROUNDED
        assert lowered.kernels["linear_default"].startswith("MatMulNBits")
        quality, _ = linear(x, packed, None, "i8/tok", floats(k, seed=4).abs() + 0.5, strict=True)
        assert quality > ROUNDED - 6  # for integer pairs it is exact


HELD_IN_FOUR = "codes of 2 bits are held in 4: no fast kernel multiplies them with floats"


@pytest.mark.parametrize("x_format", ["f32", "bf16"])
@pytest.mark.parametrize("w_format", GROUPED)
def test_weight_only_linear_with_float_activations(w_format: str, x_format: str) -> None:
    """x=f32 is exact: products of 4 bits on floats, and nothing of it is slow."""
    fmt = Format.parse(w_format)
    for k, n in ((96, 40), (130, 24), (20, 7)):
        packed = pack_weight(floats(n, k, seed=2), fmt)
        for bias, smooth in ((None, None), (floats(n, seed=3), floats(k, seed=4).abs() + 0.5)):
            quality, lowered = linear(floats(3, k, seed=5), packed, bias, x_format, smooth, strict=True)
            assert quality > EXACT
            kernel = lowered.kernels["linear_default"]
            assert kernel.startswith("MatMulNBits 4-bit")
            assert "float activations" in kernel
            assert ("(x2)" in kernel) == (fmt.bits > 4)
            assert not lowered.slow
            kept = fmt.bits == 2 and "/g16" not in w_format  # those lie in 4 bits in any case
            assert [n.reason for n in lowered.notes if n.node != "graph"] == ([HELD_IN_FOUR] if kept else [])


@pytest.mark.parametrize(("w_format", "bits"), [("i4/g32", 4), ("u8/g32", 8), ("i8/ch", 8), ("u2/g64", 4)])
def test_float_activations_need_no_float_weight(w_format: str, bits: int) -> None:
    """Bytes of the session's weights: those of the codes and their scales."""
    packed = pack_weight(floats(64, 256, seed=2), Format.parse(w_format))
    _, lowered = linear(floats(3, 256), packed, None, "f32")
    (built,) = lowered.models
    codes = {t.numel() for t in built.weights.values() if t.dtype == torch.uint8 and t.numel() > 4096}
    assert codes == {64 * 256 // 2}
    assert sum(t.numel() for t in built.weights.values() if t.numel() > 4096) == 64 * 256 * bits // 8


def test_activations_in_another_format_are_told_to_be_rounded_again() -> None:
    packed = pack_weight(floats(40, 96, seed=2), Format.parse("i4/g32"))
    words = {"": "float activations", "i8": "activations in i8", "u4/tok": "activations in u4/tok"}
    for x_format, asked in words.items():
        quality, lowered = linear(inputs(), packed, None, x_format)
        assert quality > ROUNDED - 6
        assert lowered.notes[0].reason.startswith(f"{asked} were asked; MatMulNBits rounds them to 8 bits")
        assert "x='f32'" in lowered.notes[0].next_step
    assert not linear(inputs(), packed, None, "i8/tok")[1].notes


@given(
    st.sampled_from(["i8", "u8", "i6", "u7", "i4", "u4", "i3", "i2", "u2"]),
    st.sampled_from(["ch", "g16", "g32", "g48", "g128"]),
    st.integers(1, 150),
    st.integers(1, 9),
    st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_halves_and_wider_codes_hold_any_weight(kind: str, granularity: str, k: int, n: int, seed: int) -> None:
    packed = pack_weight(floats(n, k, seed=seed) * 3 + 1, Format.parse(f"{kind}/{granularity}"))
    quality, lowered = linear(floats(2, k, seed=seed + 1), packed, None, "f32")
    assert quality > EXACT
    assert not lowered.slow


def test_a_bitstream_that_fits_is_used_where_it_lies() -> None:
    packed = pack_weight(floats(40, 256, seed=2), Format.parse("i4/g64"))
    _, lowered = linear(floats(3, 256), packed, None, "", strict=True)
    (built,) = lowered.models
    assert packed.data.data_ptr() in {t.data_ptr() for t in built.weights.values()}


@pytest.mark.parametrize(
    "w_format", ["nf4/g64", "f8e4m3/ch", "f8e5m2", "f4e2m1/g32/e8m0", "f4e2m1/g16/e4m3", "i4/g20", "bf16"]
)
@pytest.mark.parametrize("x_format", ["", "i8/tok", "i8", "bf16"])
def test_other_formats_compute_in_f32_and_say_so(w_format: str, x_format: str) -> None:
    packed = pack_weight(floats(40, 96, seed=2), Format.parse(w_format))
    quality, lowered = linear(inputs(), packed, floats(40, seed=3), x_format)
    assert quality > EXACT
    assert f"the weight is stored as {w_format}, computed in f32" in [note.reason for note in lowered.notes]
    assert "FusedMatMul f32" in lowered.kernels["linear_default"]


def test_unknown_activation_formats_run_in_torch_and_are_told() -> None:
    packed = pack_weight(floats(40, 96, seed=2), Format.parse("i8/ch"))
    quality, lowered = linear(inputs(), packed, None, "f8e4m3/tok")
    assert quality == float("inf")
    assert [note.reason for note in lowered.notes] == ["runs in torch: activations in f8e4m3/tok"]
    assert [note.next_step for note in lowered.notes] == ["other formats for it, such as those of w8a8 or w4a16"]
    assert lowered.kernels == {"linear_default": "torch qfx.linear.default"}


@pytest.mark.parametrize("rows", [0, 1, 33])
def test_row_counts(rows: int) -> None:
    packed = pack_weight(floats(17, 50, seed=2), Format.parse("i8/ch"))
    x = floats(rows, 50)
    quality, _ = linear(x, packed, floats(17), "i8/tok", strict=True)
    assert quality > EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_f32(dtype: torch.dtype) -> None:
    packed = pack_weight(floats(40, 96, seed=2), Format.parse("i8/ch"))
    quality, lowered = linear(inputs().to(dtype), packed, floats(40).to(dtype), "i8/tok", strict=True)
    assert quality > 45  # the reference rounds its output too
    assert [n.node for n in lowered.notes] == ["graph"]


def test_the_wrong_weight_is_far_off() -> None:
    """Negative control: the tolerance above tells a weight from its neighbour."""
    x, fmt = inputs(), Format.parse("i8/ch")
    good, bad = pack_weight(floats(40, 96, seed=2), fmt), pack_weight(floats(40, 96, seed=9), fmt)
    data = (good.data, good.scale, None, None, None, None, None, "i8/tok", "i8/ch")
    gm, _ = graph_of(torch.ops.qfx.linear.default, x, *data)
    wrong = torch.ops.qfx.linear(x, bad.data, bad.scale, None, None, None, None, None, "i8/tok", "i8/ch")
    assert sqnr(wrong, lower(gm)(x)[0]) < 5


@pytest.mark.parametrize("w_format", ["i8/ch", "i8", "u8/ch", "i4/g32", "nf4/g32"])
def test_dequantize(w_format: str) -> None:
    packed = pack_weight(floats(30, 64), Format.parse(w_format))
    arguments = (packed.data, packed.scale, packed.zero, w_format, 64, torch.float32)

    def times(x: Tensor, *given: Any) -> Tensor:
        y: Tensor = x @ torch.ops.qfx.dequantize(*given)
        return y

    x = floats(4, 30)
    root, graph, mode = nn.Module(), fx.Graph(), FakeTensorMode()
    node = graph.placeholder("x")
    node.meta["val"] = mode.from_tensor(x)
    held: list[Any] = []
    for i, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            root.register_buffer(f"c{i}", argument)
            held.append(graph.get_attr(f"c{i}"))
            held[-1].meta["val"] = mode.from_tensor(argument)
        else:
            held.append(argument)
    weight = graph.call_function(torch.ops.qfx.dequantize.default, tuple(held))
    weight.meta["val"] = mode.from_tensor(packed.dequantize())
    product = graph.call_function(torch.ops.aten.mm.default, (node, weight))
    product.meta["val"] = mode.from_tensor(x @ packed.dequantize())
    graph.output((product,))
    lowered = lower(fx.GraphModule(root, graph), strict=True)
    assert sqnr(times(x, *arguments), lowered(x)[0]) > EXACT


@pytest.mark.parametrize(
    ("w_format", "x_format"), [("i8/ch", "i8/tok"), ("i4/g32", ""), ("u8/ch", "i8/tok"), ("i8", "i8/tok")]
)
def test_quantized_experts(w_format: str, x_format: str) -> None:
    packed = pack_weight(floats(3, 24, 64), Format.parse(w_format))
    x, ends = floats(10, 64), torch.tensor([4, 4, 9], dtype=torch.int32)
    arguments = (packed.data, packed.scale, packed.zero, ends, x_format, w_format)
    gm, reference = graph_of(torch.ops.qfx.grouped_linear_quant.default, x, *arguments)
    lowered = lower(gm, strict=True)
    assert sqnr(reference, lowered(x)[0]) > (EXACT if x_format else ROUNDED)


def test_experts() -> None:
    x, ends = floats(10, 64), torch.tensor([4, 4, 9], dtype=torch.int32)
    gm, reference = graph_of(torch.ops.qfx.grouped_linear.default, x, floats(3, 24, 64), ends)
    lowered = lower(gm, strict=True)
    assert sqnr(reference, lowered(x)[0]) > EXACT
    assert lowered.kernels["grouped_linear_default"] == "FusedMatMul f32 (x3)"
