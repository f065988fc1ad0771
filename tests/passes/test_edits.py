"""Edits of parameters: under every name, in f64, in parts, and never in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfx.passes import _edits as edits
from qfx.passes._sites import Norm


class Tied(nn.Module):
    """A linear that has an embedding's table, between a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(4, dtype=torch.float16))


def test_every_name_gets_the_new_one_and_the_old_stays() -> None:
    model = Tied()
    old, order = model.embed.weight, [name for name, _ in model.named_parameters(remove_duplicate=False)]
    before = old.detach().clone()
    edits.edit(model, "head.weight", lambda w: 2 * w)
    assert model.head.weight is model.embed.weight and isinstance(model.head.weight, nn.Parameter)
    assert torch.equal(model.head.weight, 2 * before) and torch.equal(old, before)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == order


def test_a_buffer_stays_a_buffer_and_a_frozen_parameter_frozen() -> None:
    model = Tied()
    model.norm.weight.requires_grad_(False)
    edits.edit(model, "shift", lambda x: x / 3)
    edits.edit(model, "norm.weight", lambda w: w + 1)
    shift: Tensor = model.get_buffer("shift")
    assert not isinstance(shift, nn.Parameter) and torch.equal(shift, (torch.ones(4).double() / 3).half())
    assert not model.norm.weight.requires_grad and model.embed.weight.requires_grad


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scale_in_parts_is_that_of_the_whole(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, factor = nn.Linear(5, 7), torch.linspace(0.5, 2, 7 if axis == 0 else 5, dtype=torch.float64)
    old = model.weight.detach().clone()
    monkeypatch.setattr(edits, "_PART", 11)  # two rows
    assert [len(old[rows]) for rows in edits.parts(old)] == [2, 2, 2, 1]
    edits.scale(model, "weight", factor, axis)
    wanted = old.double() * (factor[:, None] if axis == 0 else factor)
    assert torch.equal(model.weight, wanted.float())


def test_a_norm_whose_weight_lacks_one() -> None:
    model, factor = nn.LayerNorm(4), torch.tensor([2.0, 0.5, 1.0, 4.0])
    with torch.no_grad():
        model.bias.fill_(3.0)
    edits.scale_norm(model, Norm("weight", "bias", plus_one=True), factor)
    assert torch.equal(model.weight + 1, 2 * factor) and torch.equal(model.bias, 3 * factor)
