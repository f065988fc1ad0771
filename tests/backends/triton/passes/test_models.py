"""The passes on graphs of small models of transformers: what is fused, and that the result stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import qfx
from qfx import graph
from qfx.backends.triton import lower
from qfx.backends.triton.passes.fuse import fuse
from qfx.pipeline import apply_plan, prepare
from qfx.recipe import Recipe
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture, counts, error
from tests.tiny import build, ids

# Of each model: q, k and v are one product, as are gate and up; the codes of what attention gives are made alone.
W8A8 = {
    "llama": {"norm_quantize": 3, "act_quantize": 1, "quantize_dynamic": 1, "gemm8": 5},
    "bert": {"norm_quantize": 4, "act_quantize": 1, "quantize_dynamic": 1, "gemm8": 6},
}
WEIGHTS = {"llama": {"linear_weight_only": 5, "rms_norm": 3}, "bert": {"linear_weight_only": 6, "layer_norm": 4}}


def quantized(kind: str, recipe: str) -> fx.GraphModule:
    kwargs: dict[str, Any] = {"use_cache": False} if kind == "llama" else {}
    gm = capture(build(kind).to(DEVICE), ids().to(DEVICE), **kwargs)
    prepare(gm)
    apply_plan(gm, None, Recipe.parse(recipe))
    return gm


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize(("recipe", "expected"), [("w8a8", W8A8), ("w4a16", WEIGHTS)])
def test_what_is_fused(
    kind: str, recipe: str, expected: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[fx.GraphModule] = []

    def kept(gm: fx.GraphModule, kernels: dict[str, str]) -> bool:
        changed = fuse(gm, kernels)
        made.append(gm)
        return changed

    monkeypatch.setattr("qfx.backends.triton.lowering.fuse", kept)
    gm = quantized(kind, recipe)
    lowered = lower(gm)
    found = counts(made[0])
    assert {name: found.get(name) for name in expected[kind]} == expected[kind]
    linears = [n.name for n in gm.graph.nodes if graph.schema_name(n) == "qfx::linear"]
    assert len(linears) > expected[kind].get("gemm8", expected[kind].get("linear_weight_only", 0))
    assert all("(Triton)" in lowered.kernels[name] for name in linears)
    with torch.no_grad():
        assert error(list(gm(ids().to(DEVICE))), list(lowered(ids().to(DEVICE)))) < 2e-2


def test_the_report_of_a_compiled_model_has_a_row_for_each_linear() -> None:
    model = build("bert").to(DEVICE)
    recipe = {"rules": [{"target": "linear", "x": "i8/tok", "w": "i8/ch"}]}
    options: dict[str, Any] = {"recipe": recipe, "backend": "triton", "cache": False}
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="qfx", options=options)
        compiled(ids().to(DEVICE))
    rows = {row.node: row.kernel for row in qfx.report(compiled) if row.op == "linear"}
    torch._dynamo.reset()
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    assert {f"bert.encoder.layer.0.{part}" for part in parts} <= set(rows)
    assert set(rows.values()) == {"gemm8 i8/tok x i8/ch (Triton)"}
