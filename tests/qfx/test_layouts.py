"""qfx.layouts: how a module holds what the graph calls a weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx import graph
from qfx.layouts import is_transposed, layout_of
from qfx.pipeline import prepare
from tests.graphs import Function, capture
from tests.zoo import ZOO


def layouts(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, str]:
    gm: fx.GraphModule = capture(model, *inputs, **kwargs)
    prepare(gm)
    kinds = ("aten::linear", "aten::embedding", "qfx::grouped_linear")
    nodes = [n for n in gm.graph.nodes if n.op == "call_function" and graph.schema_name(n) in kinds]
    return {graph.fqn_of(n): layout_of(n) for n in nodes if graph.weight_of(n) is not None}


def test_layouts_of_modules_and_of_weights_that_others_read() -> None:
    def forward(own: Any, ids: Tensor) -> Any:
        x = own.conv(own.table(ids).transpose(1, 2)).transpose(1, 2)
        x = own.fc(x) + F.linear(x, own.read.weight) + x @ own.free + F.linear(x, own.odd.reshape(8, 8))
        return x @ own.table.weight.t()

    layers = {"table": nn.Embedding(9, 8), "conv": nn.Conv1d(8, 8, 1), "fc": nn.Linear(8, 8), "read": nn.Linear(8, 8)}
    model = Function(forward, **layers, free=torch.randn(8, 8), odd=torch.randn(4, 16))
    found = layouts(model, torch.arange(6).reshape(2, 3))
    assert found["fc"] == "linear" and found["read"] == "linear-read"
    assert found["free"] == "transposed" and found["odd"] == "unknown"
    assert found["table"] in ("embedding", "linear-read")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", {"transformer.h.0.attn.c_attn": "transposed", "transformer.wte": "embedding", "lm_head": "linear"}),
        ("vit", {"vit.embeddings.patch_embeddings.projection": "patch", "classifier": "linear"}),
        ("mixtral", {"model.layers.0.mlp.experts.gate_up_proj": "experts"}),
        ("gpt_oss", {"model.layers.0.mlp.experts.gate_up_proj": "experts-transposed"}),
    ],
)
def test_layouts_in_the_zoo(name: str, expected: dict[str, str]) -> None:
    model, inputs = ZOO[name]()
    found = layouts(model, **inputs)
    assert {fqn: found[fqn] for fqn in expected} == expected


def test_which_are_transposed() -> None:
    yes = ("transposed", "transposed-read", "experts-transposed")
    assert all(map(is_transposed, yes))
    assert not any(map(is_transposed, ("linear", "linear-read", "embedding", "experts", "patch", "unknown", "")))
