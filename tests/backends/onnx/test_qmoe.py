"""qfx::moe by QMoE against its reference kernel: layouts, biases, limits, routers; where it fits and where not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx import graph
from qfx.backends.onnx import lower
from qfx.backends.onnx.kernels import optimized_graph
from qfx.backends.onnx.lowering import build
from qfx.backends.onnx.slow_forms import slow_forms
from qfx.capture import capture_export
from qfx.format import Format
from qfx.packing import Packed, pack_weight
from qfx.passes.moe import moe
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.onnx.checks import floats, sqnr
from tests.backends.onnx.test_quant import graph_of
from tests.graphs import Function

MOE = torch.ops.qfx.moe.default
ROUNDED = 32.0  # dB: the inputs of both products are rounded to 8 bits per block
E, H, WIDE, K = 5, 64, 96, 2


def packed(fmt: str, *shape: int, seed: int) -> Packed:
    return pack_weight(floats(*shape, seed=seed) / shape[-1] ** 0.5, Format.parse(fmt))


def routed(rows: int) -> tuple[Tensor, Tensor]:
    values, ids = floats(rows, E, seed=7).softmax(-1).topk(K)
    return ids, values


def arguments(fmt: str, *, bias: bool = False, gate: tuple[Any, ...] = (False, 1.0, 0.0, math.inf)) -> list[Any]:
    up, down = packed(fmt, E, 2 * WIDE, H, seed=2), packed(fmt, E, H, WIDE, seed=3)
    biases = (floats(E, 2 * WIDE, seed=4), floats(E, H, seed=5)) if bias else (None, None)
    first = (up.data, up.scale, up.zero, biases[0])
    return [*first, down.data, down.scale, down.zero, biases[1], *gate, fmt, fmt]


@pytest.mark.parametrize("fmt", ["i4/g32", "u4/g32", "i8/ch", "u8/ch", "i4/g16", "i2/g32", "u2/g16", "i3/g32", "i8"])
def test_formats(fmt: str) -> None:
    x = floats(7, H)
    gm, reference = graph_of(MOE, x, *routed(7), *arguments(fmt))
    lowered = lower(gm, strict=True)
    (found,) = lowered(x)
    assert found.shape == reference.shape
    assert sqnr(reference, found) > ROUNDED
    assert lowered.kernels["moe_default"].startswith("QMoE")
    assert not lowered.slow


GATES = [(False, 1.0, 0.0, math.inf), (True, 1.0, 0.0, math.inf), (True, 1.702, 1.0, 0.7), (False, 1.702, 1.0, 0.7)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_gates_and_biases(gate: tuple[Any, ...], bias: bool) -> None:
    x = floats(7, H) * 3
    gm, reference = graph_of(MOE, x, *routed(7), *arguments("i4/g32", bias=bias, gate=gate))
    assert sqnr(reference, lower(gm, strict=True)(x)[0]) > ROUNDED
    others = [g for g in GATES if g != gate and (g[0] == gate[0] or not bias)]
    for other in others:  # negative control
        wrong = MOE(x, *routed(7), *arguments("i4/g32", bias=bias, gate=other))
        assert sqnr(wrong, lower(gm)(x)[0]) < 25


def test_chosen_experts_without_weight() -> None:
    """A router that is no softmax: any choice of experts, weights of zero among them."""
    x, ids = floats(4, H), torch.tensor([[3, 0], [0, 3], [4, 1], [2, 1]])
    weights = torch.tensor([[0.0, 1.0], [2.0, 0.5], [0.0, 0.0], [3.0, 1.0]])
    gm, reference = graph_of(MOE, x, ids, weights, *arguments("i8/ch"))
    (found,) = lower(gm, strict=True)(x)
    assert not reference[2].any() and not found[2].any()
    assert sqnr(reference, found) > ROUNDED


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_row_counts(rows: int) -> None:
    x = floats(rows, H)
    gm, reference = graph_of(MOE, x, *routed(rows), *arguments("i4/g32"))
    (found,) = lower(gm, strict=True)(x)
    assert found.shape == reference.shape
    assert not rows or sqnr(reference, found) > ROUNDED


def mixture(router: str, keep: bool = True) -> Function:
    """A block as transformers spells it."""

    def forward(own: Any, x: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(x, own.router)
        if router == "topk":
            values, ids = scores.topk(K, -1)
            weights = values.softmax(-1)
        else:
            values, ids = (scores.sigmoid() if router == "sigmoid" else scores.softmax(-1)).topk(K, -1)
            weights = values / values.sum(-1, keepdim=True) if router == "normalized" else values
            weights = weights - 0.5 if router == "below zero" else weights
        by_expert, order = ids.reshape(-1).sort()
        offs = torch.histc(by_expert.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
        rows = x[order // K]
        both = torch.ops.qfx.grouped_linear(rows, own.up, offs)
        gate, value = both.chunk(2, -1)
        hidden = torch.nn.functional.silu(gate) * (value if keep else value + 1)
        y = torch.ops.qfx.grouped_linear(hidden, own.down, offs) * weights.reshape(-1)[order].unsqueeze(-1)
        places = torch.empty_like(order)
        places[order] = torch.arange(order.shape[0])
        result: Tensor = y[places].reshape(-1, K, H).sum(1)
        return result

    torch.manual_seed(0)
    up, down = torch.randn(E, 2 * WIDE, H) / H**0.5, torch.randn(E, H, WIDE) / WIDE**0.5
    return Function(forward, router=torch.randn(E, H) / H**0.5, up=up, down=down)


def quantized(model: Function, x: Tensor, w: str = "i4/g32", xf: str = "none") -> Any:
    gm = capture_export(model.eval(), (x,), {}).gm
    prepare(gm)
    rule = {"target": "experts", "w": w, **({} if xf == "none" else {"x": xf})}
    assert not apply_plan(gm, None, Recipe.parse({"name": "experts", "rules": [rule]}))
    return gm


@pytest.mark.parametrize("router", ["normalized", "plain", "topk", "sigmoid"])
@torch.no_grad()
def test_routers(router: str) -> None:
    x = floats(9, H)
    gm = quantized(mixture(router), x)
    (reference,) = gm(x)
    _, built = build(gm)
    nodes = [n.op_type for n in built.model.graph.node]
    assert nodes.count("QMoE") == 1 and "MatMulNBits" not in nodes
    assert ("TopK" in nodes) == ("ScatterElements" in nodes) == (router == "sigmoid")
    lowered = lower(gm, strict=True)
    assert sqnr(reference, lowered(x)[0]) > ROUNDED
    kernels = {name: kernel for name, kernel in lowered.kernels.items() if "grouped" in name}
    assert set(kernels.values()) == {"QMoE 4-bit, blocks of 32, 8-bit activations"} and len(kernels) == 2
    told = [note.node for note in lowered.notes if "QMoE rounds them" in note.reason]
    assert told == ["up", "down"]


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("another gate", {"keep": False}),
        ("integers", {"w": "i8/ch", "xf": "i8/tok"}),
        ("a format without a kernel", {"w": "nf4/g32"}),
        ("blocks that do not fit", {"w": "i4/g24"}),
        ("a router that may give weights below zero", {"router": "below zero"}),
    ],
)
@torch.no_grad()
def test_near_misses_are_loops(case: str, changes: dict[str, Any]) -> None:
    x = floats(9, H)
    formats = {name: value for name, value in changes.items() if name in ("w", "xf")}
    gm = quantized(mixture(changes.get("router", "normalized"), changes.get("keep", True)), x, **formats)
    _, built = build(gm)
    assert "QMoE" not in {n.op_type for n in built.model.graph.node}
    assert sqnr(gm(x)[0], lower(gm)(x)[0]) > ROUNDED, case


@torch.no_grad()
def test_the_standard_form_and_prompts_keep_the_loop() -> None:
    gm = quantized(mixture("normalized"), floats(9, H))
    for options in ({"runtime": "standard"}, {"prefill": True}):
        _, built = build(gm, **options)
        assert "QMoE" not in {n.op_type for n in built.model.graph.node}


def test_the_pass_leaves_the_quantized_graph_alone() -> None:
    gm = quantized(mixture("normalized"), floats(9, H))
    before = [n.name for n in gm.graph.nodes]
    lower(gm)
    assert [n.name for n in gm.graph.nodes] == before
    assert moe(gm, fits=lambda *nodes: False) is False
    assert [n.name for n in gm.graph.nodes] == before
    assert moe(gm, fits=lambda *nodes: True) is True
    assert "qfx::moe" in {graph.schema_name(n) for n in gm.graph.nodes if n.op == "call_function"}


def test_no_slow_form() -> None:
    x = floats(7, H)
    gm, _ = graph_of(MOE, x, *routed(7), *arguments("i4/g32"))
    (built,) = lower(gm, strict=True).models
    assert not slow_forms(optimized_graph(built))
