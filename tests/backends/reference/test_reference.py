"""The oracle: torch runs the graph as it stands."""

from __future__ import annotations

import torch
from torch import nn

from qfx.backends import reference
from qfx.capture import capture_export
from tests.backends.onnx.checks import floats, same


def test_it_runs_the_graph_by_torch_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.GELU()).eval()
    captured = capture_export(model, (floats(2, 6),))
    lowered = reference.lower(captured.gm, strict=True)
    x = floats(3, 6)
    (found,) = lowered(x)
    with torch.no_grad():
        same(found, model(x))
    assert lowered.notes == []
    assert lowered.kernels["linear"] == "aten::linear (reference)"
    assert set(lowered.kernels) == {n.name for n in captured.gm.graph.nodes if n.op == "call_function"}


def test_every_node_is_supported() -> None:
    captured = capture_export(nn.Linear(6, 4), (floats(2, 6),))
    assert [reference.supports(n) for n in captured.gm.graph.nodes] == [None] * len(captured.gm.graph.nodes)
