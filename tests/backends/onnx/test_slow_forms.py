"""Slow forms are found in graphs that hold them, and in none that qfx makes."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import qfx
from qfx.backends.onnx import lower
from qfx.backends.onnx.kernels import optimized_graph
from qfx.backends.onnx.slow_forms import slow_forms
from qfx.capture import capture_export
from qfx.pipeline import prepare
from qfx.recipe import Recipe
from tests.backends.onnx.checks import sqnr


def held(name: str, element: int, *shape: int) -> TensorProto:
    tensor = TensorProto()
    tensor.name, tensor.data_type = name, element
    tensor.dims.extend(shape)
    return tensor


def graph(op_type: str, inputs: list[str], tensors: list[TensorProto], *before: Any, **attributes: Any) -> Any:
    node = helper.make_node(op_type, inputs, ["y"], name="linear/3", **attributes)
    return helper.make_graph([*before, node], "g", [], [], tensors)


U8, S8, F32 = TensorProto.UINT8, TensorProto.INT8, TensorProto.FLOAT
QUANTIZED = {
    element: helper.make_node("QuantizeLinear", ["x", "s", f"z{element}"], ["q"], name="linear/0")
    for element in (U8, S8)
}
POINTS = [held(f"z{U8}", U8), held(f"z{S8}", S8), held("s", F32)]
SLOW: dict[str, tuple[Any, str]] = {
    "skip norm": (graph("SkipLayerNormalization", ["x"], []), "slower than Add"),
    "8 bits": (graph("MatMulNBits", ["x", "w", "s"], [], bits=8, block_size=128), "accuracy level 0"),
    "8 bits, level 1": (graph("MatMulNBits", ["x", "w", "s"], [], bits=8, block_size=128, accuracy_level=1), "level 1"),
    "2 bits": (graph("MatMulNBits", ["x", "w", "s"], [], bits=2, block_size=64), "2 bits"),
    "2 bits, 16": (graph("MatMulNBits", ["x", "w", "s"], [], bits=2, block_size=16, accuracy_level=4), "blocks of 16"),
    "2 bits, 256": (
        graph("MatMulNBits", ["x", "w", "s"], [], bits=2, block_size=256, accuracy_level=4),
        "blocks of 256",
    ),
    "4 bits": (graph("MatMulNBits", ["x", "w", "s"], [], bits=4, block_size=32, accuracy_level=1), "floats were not"),
    "float zeros": (
        graph("MatMulNBits", ["x", "w", "s", "z"], [held("z", F32, 4)], bits=4, block_size=32, accuracy_level=4),
        "float zero points",
    ),
    "g_idx": (
        graph("MatMulNBits", ["x", "w", "s", "", "g"], [], bits=4, block_size=32, accuracy_level=4),
        "g_idx",
    ),
    "experts by row": (graph("QMoE", ["x", "r"], [], accuracy_level=4), "one scale for each row"),
    "experts by floats": (graph("QMoE", ["x", "r"], [], block_size=32), "accuracy level 0"),
    "s8 x s8": (graph("MatMulInteger", ["q", "w"], [held("w", S8, 4, 4), *POINTS], QUANTIZED[S8]), "s8 x s8"),
    "u8 x u8": (graph("MatMulIntegerToFloat", ["q", "w"], [held("w", U8, 4, 4), *POINTS], QUANTIZED[U8]), "u8 x u8"),
    "scale by column": (graph("QuantizeLinear", ["x", "s"], [held("s", F32, 8)]), "each column"),
    "floats": (graph("MatMul", ["x", "w"], []), "product of integers was asked"),
    "dequantized": (graph("DequantizeLinear", ["w", "s"], [held("w", S8, 4, 4)]), "dequantized in each call"),
}
FAST = {
    "4 bits": graph("MatMulNBits", ["x", "w", "s"], [], bits=4, block_size=32, accuracy_level=4),
    "8 bits": graph("MatMulNBits", ["x", "w", "s"], [], bits=8, block_size=128, accuracy_level=4),
    "2 bits": graph("MatMulNBits", ["x", "w", "s"], [], bits=2, block_size=64, accuracy_level=4),
    "experts, 4 bits": graph("QMoE", ["x", "r"], [], block_size=32, accuracy_level=4),
    "experts, 8 bits": graph("QMoE", ["x", "r"], [], block_size=32, expert_weight_bits=8),
    "u8 x s8": graph("MatMulIntegerToFloat", ["q", "w"], [held("w", S8, 4, 4), *POINTS], QUANTIZED[U8]),
    "one scale": graph("QuantizeLinear", ["x", "s"], [held("s", F32)]),
    "norm": graph("LayerNormalization", ["x", "w"], []),
    "activations dequantized": graph("DequantizeLinear", ["x", "s"], []),
}


@pytest.mark.parametrize("name", SLOW)
def test_found(name: str) -> None:
    made, reason = SLOW[name]
    (found,) = slow_forms(made, {"linear"})
    assert found.owner == "linear"
    assert reason in found.reason


@pytest.mark.parametrize("name", FAST)
def test_not_found(name: str) -> None:
    assert not slow_forms(FAST[name], {"linear"})


def test_floats_are_no_fault_where_floats_were_asked() -> None:
    assert not slow_forms(SLOW["floats"][0], {"another"})
    assert not slow_forms(SLOW["4 bits"][0], floats={"linear"})


@pytest.mark.parametrize("name", ["4 bits", "8 bits", "2 bits"])
def test_rounded_activations_are_a_fault_where_floats_were_asked(name: str) -> None:
    (found,) = slow_forms(FAST[name], floats={"linear"})
    assert "rounds its activations to 8 bits where floats were asked" in found.reason


@pytest.mark.parametrize("name", ["8 bits", "8 bits, level 1", "2 bits"])
def test_float_activations_of_other_bits_are_slow_even_where_they_were_asked(name: str) -> None:
    assert slow_forms(SLOW[name][0], floats={"linear"})


# ---- the lowering table: each row against the reference kernels, and without a slow form ----


class Block(nn.Module):
    """An embedding tied to the last layer, attention, a norm and a feed-forward part, as encoders have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 64)
        self.qkv = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.out, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q, k, v = (p(x).view(*x.shape[:2], 4, 16).transpose(1, 2) for p in self.qkv)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm(x + self.out(y.transpose(1, 2).reshape(x.shape)))
        z: Tensor = self.head(x + self.down(nn.functional.gelu(self.up(x))))
        return z


IDS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))
# input and weight formats -> (the kernel that runs, dB to the reference)
ROWS: dict[tuple[str, str], tuple[str, float]] = {
    ("i8/tok", "i8/ch"): ("MatMulIntegerToFloat", 60), ("u8/tok", "i8/ch"): ("MatMulIntegerToFloat", 60),
    ("i8/dyn", "i8/ch"): ("MatMulIntegerToFloat", 60), ("u8/dyn", "i8/ch"): ("DynamicQuantizeMatMul", 60),
    ("i8", "i8/ch"): ("MatMulIntegerToFloat", 60), ("u8", "i8/ch"): ("MatMulIntegerToFloat", 60),
    ("", "i8/ch"): ("MatMulNBits", 35), ("", "i8/g32"): ("MatMulNBits", 35), ("", "i4/g32"): ("MatMulNBits", 35),
    ("", "u4/g64"): ("MatMulNBits", 35), ("", "i2/g64"): ("MatMulNBits", 35), ("", "i3/g32"): ("MatMulNBits", 35),
    ("f32", "i4/g32"): ("MatMulNBits", 60), ("f32", "u4/g64"): ("MatMulNBits", 60),
    ("f32", "i8/g32"): ("MatMulNBits", 60), ("f32", "u2/g64"): ("MatMulNBits", 60), ("", "u2/g64"): ("MatMulNBits", 35),
    ("i8/tok", "i4/g32"): ("MatMulNBits", 30), ("i8/tok", "i4/ch"): ("MatMulIntegerToFloat", 60),
    ("", "nf4/g64"): ("FusedMatMul", 40), ("", "f8e4m3/ch"): ("FusedMatMul", 40),
}  # fmt: skip


@pytest.mark.parametrize(("x", "w"), ROWS)
def test_row(x: str, w: str) -> None:
    rules = [{"target": "linear", "w": w, **({"x": x} if x else {})}, {"target": "embedding", "w": "i8/ch"}]
    rules.append({"target": "head", "w": "i8/ch", **({"x": "f32" if x == "f32" else "i8/tok"} if x else {})})
    model = qfx.quantize(Block().eval(), Recipe.parse({"name": "row", "rules": rules}), data=[(IDS,)])
    gm = capture_export(model, (IDS,)).gm
    prepare(gm)
    lowered = lower(gm)
    kernel, least = ROWS[x, w]
    with torch.no_grad():
        assert sqnr(model(IDS), lowered(IDS)[0]) > least
    linears = {n.name for n in gm.graph.nodes if str(n.target).startswith("qfx.linear")}
    asked = linears if kernel in ("MatMulIntegerToFloat", "DynamicQuantizeMatMul") else set()
    floats = linears if x == "f32" else set()
    optimized = [optimized_graph(built) for built in lowered.models]
    assert not [form for one in optimized for form in slow_forms(one, asked, floats)]
    assert kernel in {node.op_type for one in optimized for node in one.node}
    assert not lowered.slow
    assert isinstance(optimized[0], onnx.GraphProto)
