"""qfx.passes.bias_correction: a shift goes into biases of graphs and of live models, and makes one where none is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.passes.bias_correction import Site, apply, nodes_of, site_of
from qfx.passes.linear import linear as linear_pass
from qfx.passes.rewrites import apply_record
from tests.graphs import Function, after

SHIFT = torch.tensor([1.0, -2.0, 0.5])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "bias"), [("a", "a.bias"), ("b", None)])
def test_graph_and_live_model_shift_alike(name: str, bias: str | None) -> None:
    model, x = Pair().eval(), torch.randn(2, 4)
    gm, _ = after(linear_pass, model, x)
    wanted = model(x) + (SHIFT if name == "b" else SHIFT @ model.b.weight.T)
    assert site_of(nodes_of(gm, name)[0]) == Site(name, bias)
    before = gm(x)[0]
    for module in (gm, model):
        apply_record(module, {"name": "bias-correction", "linear": name, "bias": bias, "factor": "k"}, {"k": SHIFT})
    gm.recompile()
    torch.testing.assert_close(gm(x)[0], wanted)
    torch.testing.assert_close(model(x), wanted)
    assert not torch.allclose(before, wanted)


def test_a_module_whose_missing_bias_is_an_attribute() -> None:
    """As in modules of users: `self.bias = None`, which is not what nn.Linear does."""
    model = Pair().eval()
    del model.b._parameters["bias"]
    model.b.bias = None  # type: ignore[assignment]
    apply(model, Site("b", None), SHIFT)
    assert isinstance(model.b.bias, nn.Parameter) and torch.equal(model.b.bias, SHIFT)


def test_tensors_that_others_hold_stay() -> None:
    model = Pair()
    held = model.a.bias
    kept = held.detach().clone()
    apply(model, Site("a", "a.bias"), SHIFT)
    assert torch.equal(held, kept) and model.a.bias is not held
    assert model.a.bias.requires_grad


def test_a_graph_without_the_linear_is_left() -> None:
    gm, _ = after(linear_pass, Pair(), torch.randn(2, 4))
    text = gm.code
    apply_record(gm, {"name": "bias-correction", "linear": "c", "bias": None, "factor": "k"}, {"k": SHIFT})
    gm.recompile()
    assert gm.code == text


def test_biases_that_cannot_be_shifted() -> None:
    def twice(self: Any, x: Tensor) -> Tensor:
        found: Tensor = nn.functional.linear(x, self.w, self.b) + self.b
        return found

    def computed(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w, self.b.exp())

    for function, reason in ((twice, "its bias b is also used by"), (computed, "its bias is computed in the graph")):
        model = Function(function, w=torch.randn(3, 4), b=torch.randn(3))
        gm, _ = after(linear_pass, model, torch.randn(2, 4))
        node = next(n for n in gm.graph.nodes if "linear" in str(n.target))
        assert reason in str(site_of(node))
