"""Models without weights: they trace and plan as real ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qfx.live.places import is_own_linear
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.rounding.parts import check_finite
from qfx.storage.hollow import filled, hollow, is_hollow, is_hollow_leaf


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, dtype=torch.bfloat16)
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.held = torch.ones(2)


def empty() -> Tied:
    with torch.device("meta"):
        return Tied()


def test_shapes_dtypes_and_ties_without_memory() -> None:
    model = empty()
    twin = hollow(model, {"head.weight": "table.weight"})
    assert twin.get_parameter("head.weight") is twin.get_parameter("table.weight")
    assert twin.get_parameter("head.bias").dtype == torch.bfloat16 and twin.get_parameter("head.bias").shape == (11,)
    assert {t.device.type for t in (*twin.parameters(), *twin.buffers(), twin.held)} == {"cpu"}
    assert all(p.untyped_storage().nbytes() <= 4 for p in twin.parameters()) and not twin.training
    assert len({p.data_ptr() for p in twin.parameters()}) == len(list(twin.parameters()))
    assert is_hollow(twin) and not is_hollow(model) and model.head.weight.is_meta and model.training


def test_a_plan_of_a_hollow_model_has_no_fingerprint() -> None:
    assert Plan.of(hollow(empty(), {}), Recipe.parse("w8a8")).fingerprint == ""
    with pytest.raises(ValueError, match="on the meta device and has no content"):
        Plan.of(empty(), Recipe.parse("w8a8"))


def test_a_leaf_is_tried_with_random_weights() -> None:
    with torch.device("meta"):
        leaf = Conv1D(6, 6)
    twin = hollow(leaf, {})
    assert is_hollow_leaf(twin) and not is_hollow_leaf(filled(twin))
    assert is_own_linear(twin, "transposed") and not is_own_linear(twin, "linear")
    assert torch.equal(filled(twin).get_parameter("weight"), filled(twin).get_parameter("weight"))


def test_a_leaf_that_is_no_linear_is_known() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + 0.5 * x

    with torch.device("meta"):
        leaf = Scaled()
    assert not is_own_linear(hollow(leaf, {}), "linear")


def test_a_spread_value_is_checked_once() -> None:
    check_finite(torch.zeros(()).expand(1 << 20, 1 << 20), "w")
    with pytest.raises(ValueError, match="w"):
        check_finite(torch.tensor(float("nan")).expand(3, 3), "w")
