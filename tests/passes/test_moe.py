"""qfx.passes.moe: experts between a router and a sum become one operator that computes the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qfx import graph, run
from qfx.passes.moe import PARTS, moe
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.graphs import capture, error
from tests.zoo import ZOO

RECIPE = {"name": "experts", "rules": [{"target": "experts", "w": "i4/g16"}]}


def always(*nodes: fx.Node) -> bool:
    return True


def quantized(name: str) -> tuple[fx.GraphModule, list[Tensor]]:
    model, inputs = ZOO[name]()
    gm = capture(model, **inputs)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse(RECIPE))
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return gm, [tensors[i] for i in gm.meta["used_inputs"]]


def fused(gm: fx.GraphModule) -> list[fx.Node]:
    run.run(gm, [lambda one: moe(one, fits=always)])
    return [n for n in gm.graph.nodes if n.op == "call_function" and graph.schema_name(n) == "qfx::moe"]


@pytest.mark.parametrize(
    ("name", "gate"),
    [
        ("mixtral", (False, 1.0, 0.0, math.inf)),
        ("qwen3_moe", (False, 1.0, 0.0, math.inf)),
        ("gpt_oss", (True, 1.702, 1.0, 7.0)),
    ],
)
@torch.no_grad()
def test_layers_of_models(name: str, gate: tuple[Any, ...]) -> None:
    gm, inputs = quantized(name)
    expected = gm(*inputs)
    nodes = fused(gm)
    assert len(nodes) == 2
    assert error(expected, gm(*inputs)) <= 1e-5
    kinds = {graph.schema_name(n) for n in gm.graph.nodes if n.op == "call_function"}
    assert not kinds & {"qfx::grouped_linear_quant", "aten::sort", "aten::histc"}
    for node in nodes:
        assert node.args[11:15] == gate
        assert [fqn.rpartition(".")[2] for _, fqn in node.meta[PARTS]] == ["gate_up_proj", "down_proj"]
        assert (node.args[6] is not None) == (node.args[10] is not None) == (name == "gpt_oss")


@torch.no_grad()
def test_what_does_not_fit_stays() -> None:
    gm, _ = quantized("mixtral")
    before = [n.name for n in gm.graph.nodes]
    assert moe(gm, fits=lambda *nodes: False) is False
    assert [n.name for n in gm.graph.nodes] == before


def _changed(gm: fx.GraphModule, name: str, at: int, value: Any) -> None:
    """Another argument for each call of an operator."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and graph.op_name(node) == name:
            node.args = (*node.args[:at], value, *node.args[at + 1 :])


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("floor_divide", 1, 1), ("histc", 3, 2), ("sum", 1, [0]), ("grouped_linear_quant", 5, "i8/tok"), ("split", 1, 48)],
)
@torch.no_grad()
def test_near_misses_stay(name: str, at: int, value: Any) -> None:
    gm, _ = quantized("mixtral")
    _changed(gm, name, at, value)
    assert moe(gm, fits=always) is False
