"""qfx.live.places: how a module holds what the graph calls a weight, and what is refused before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.errors import UnsupportedError
from qfx.live.places import find, held, is_own_linear, kind_of
from qfx.plan import Plan
from qfx.recipe import Recipe


def test_the_owner_of_a_name() -> None:
    model = nn.Module()
    model.fc, model.w = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    model.register_buffer("b", torch.ones(1))
    model.plain = torch.ones(1)
    assert held(model, "fc") == ("fc", "weight") and held(model, "w") == ("", "w")
    assert held(model, "b") == ("", "b") and held(model, "plain") == ("", "plain")
    assert held(nn.Linear(2, 2), "weight") == ("", "weight")
    assert held(model, "fcc") is None and held(model, "fc.w") is None


class Half(nn.Module):
    """Computes a part of a linear, or with rows of the wrong shape nothing."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.weight, self.fails = nn.Parameter(torch.randn(4, 8)), fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("no")
        return F.linear(x, self.weight) * 0.5


def test_what_computes_a_linear_is_found_by_trying() -> None:
    assert is_own_linear(nn.Linear(8, 4), "linear") and not is_own_linear(nn.Linear(8, 4), "patch")
    assert is_own_linear(nn.Linear(8, 4, dtype=torch.bfloat16), "linear")
    assert not is_own_linear(Half(), "linear") and not is_own_linear(Half(fails=True), "linear")
    assert not is_own_linear(nn.LayerNorm(8), "linear") and not is_own_linear(nn.ReLU(), "linear")
    assert not is_own_linear(nn.Bilinear(2, 2, 2), "linear")
    half = Half()
    state = torch.random.get_rng_state()
    assert not is_own_linear(half, "linear")
    assert torch.equal(torch.random.get_rng_state(), state), "no random number of the caller's is used up"


def test_kinds() -> None:
    assert kind_of(nn.Linear(2, 2), "weight", "linear") == "linear"
    assert kind_of(nn.Linear(2, 2), "weight", "linear-read") == "linear"
    assert kind_of(nn.Embedding(2, 2), "weight", "embedding") == "table"
    assert kind_of(nn.Embedding(2, 2, max_norm=1.0), "weight", "embedding") == "parameter"
    assert kind_of(nn.Conv2d(1, 1, 2, stride=2), "weight", "patch") == "conv"
    assert kind_of(nn.Conv1d(1, 1, 2, padding="same"), "weight", "patch") == "parameter"
    assert kind_of(nn.Linear(2, 2), "other", "linear") == "parameter"


def plan_of(model: nn.Module, **fields: Any) -> Plan:
    made = Plan.of(model, Recipe.parse("w8a8"))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_what_is_refused() -> None:
    model = nn.Sequential(Half())
    with pytest.raises(UnsupportedError, match="the input of '0' has several formats"):
        find(model, plan_of(model, annotations={"0": {"w": "i8/ch", "x": ["i8/tok", "i4/tok"]}}))
    with pytest.raises(ValueError, match=r"does not fit the model(.|\n)*named 1, 2, 3 and 1 more"):
        find(model, plan_of(model, annotations={str(i): {"w": "i8/ch"} for i in range(1, 5)}))
    smooth = {"0/smooth": torch.ones(8)}
    with pytest.raises(UnsupportedError, match="divides the input of '0', which Half feeds by itself"):
        find(model, plan_of(model, annotations={"0": {"w": "i8/ch"}}, tensors=smooth))
    with pytest.raises(ValueError, match=r"no scale for the static format x=u8 of '0'"):
        find(model, plan_of(model, annotations={"0": {"w": "i8/ch", "x": "u8"}}))


def test_a_note_for_each_weight_that_its_module_reads() -> None:
    model = nn.Sequential(*[Half() for _ in range(5)], nn.Linear(8, 8))
    annotations = {str(i): {"w": "i8/ch", "x": "i8/tok"} for i in range(6)}
    places, notes = find(model, plan_of(model, annotations=annotations))
    assert len(places) == 6 and [p.x is None for p in places] == [True] * 5 + [False]
    assert [note.node for note in notes] == ["0", "1", "2", "3", "4"]
    assert {note.reason for note in notes} == {
        "Half's weight is read by a forward of its own: weight-only, not x=i8/tok"
    }
