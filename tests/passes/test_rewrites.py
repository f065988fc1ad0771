"""qfx.passes.rewrites: records of exact rewrites, applied by name to graphs and live models."""

from __future__ import annotations

import copy
import importlib
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qfx import graph
from qfx.errors import UnsupportedError
from qfx.passes.rewrites import MODULES, apply_record, check_record
from qfx.recipe import REWRITES
from tests.graphs import capture, error, text


class Block(nn.Module):
    """One layer that every rewrite finds something in: tied table, norms, attention, gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.ln = nn.Embedding(11, 16), nn.RMSNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        for norm in (self.norm, self.ln):
            nn.init.uniform_(norm.weight, 0.5, 2.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = self.norm(x)
        q, k, v = (p(h).unflatten(-1, (4, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.ln(x)
        out: Tensor = self.lm_head(x + self.down(F.silu(self.gate(h)) * self.up(h)))
        return out


# Those that need nothing of another rewrite, and keep the function; the others have tests of their own.
ALONE = ("untie", "norm-fold", "smooth", "smooth-k", "v-o", "up-down")
IDS = torch.tensor([[0, 8, 3], [1, 1, 7]])
FACTORS = {"smooth-k": (16,), "v-o": (4, 4), "up-down": (24,)}


def records(name: str, gm: fx.GraphModule) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What a plan would hold: JSON-able records, and random factors where the rewrite takes some."""
    torch.manual_seed(1)
    found, tensors = [], {}
    for i, site in enumerate(importlib.import_module(MODULES[name]).find(gm)[0]):
        record = site.to_record()
        if name in ("smooth", *FACTORS):
            shape = FACTORS.get(name) or (site.channels,)
            record["factor"] = f"rewrite/{i}/factor"
            tensors[record["factor"]] = torch.rand(shape) + 0.5
        found.append(record)
    loaded: list[dict[str, Any]] = json.loads(json.dumps(found))
    return loaded, tensors


def check_all(model: nn.Module, found: list[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
    for record in found:
        check_record(model, record, tensors)


def captured(model: nn.Module) -> fx.GraphModule:
    from qfx.passes.normalize import normalize

    gm = capture(model, IDS)
    normalize(gm)
    graph.rename(gm)
    return gm


def test_every_rewrite_of_recipes_is_here() -> None:
    assert {*REWRITES} - {*MODULES} == {"awq"}, "its records are those of smooth, v-o and up-down"
    for name, module in MODULES.items():
        found = importlib.import_module(module)
        assert name == found.Site.NAME and callable(found.apply)
    assert all(callable(importlib.import_module(MODULES[name]).find) for name in ALONE)


@pytest.mark.parametrize("name", ALONE)
@torch.no_grad()
def test_a_record_keeps_the_function_of_a_graph(name: str) -> None:
    model = Block()
    gm = captured(model)
    before, code = {n: p.clone() for n, p in model.named_parameters()}, text(gm)
    found, tensors = records(name, gm)
    assert found and all(record["name"] == name for record in found)
    for record in found:
        apply_record(gm, record, tensors)
    gm.recompile()
    assert error(model(IDS), gm(IDS)[0]) < 1e-5
    changed = [n for n, p in gm.named_parameters() if n not in before or not torch.equal(p, before[n])]
    assert changed or text(gm) != code
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "the user's tensors stay"


@pytest.mark.parametrize("name", [name for name in ALONE if name != "smooth"])
@torch.no_grad()
def test_a_record_keeps_the_function_of_a_live_model(name: str) -> None:
    model = Block()
    found, tensors = records(name, captured(model))
    live = copy.deepcopy(model)
    for record in found:
        apply_record(live, record, tensors)
    assert error(model(IDS), live(IDS)) < 1e-5
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), live.parameters(), strict=False)) or (
        live.lm_head.weight is not live.embed.weight
    )


@pytest.mark.parametrize("name", [name for name in ALONE if name != "untie"])
def test_a_graph_of_another_part_is_left_alone(name: str) -> None:
    found, tensors = records(name, captured(Block()))
    other = capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    before = text(other)
    for record in found:
        apply_record(other, record, tensors)
    assert text(other) == before and sorted(dict(other.named_parameters())) == ["0.bias", "0.weight"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("norm-flod", "did you mean 'norm-fold'"),
        ("SMOOTH", "did you mean 'smooth'"),
        ("", "valid: bias-correction"),
        (None, "None"),
    ],
)
def test_unknown_rewrites_are_refused(name: str | None, message: str) -> None:
    record = {} if name is None else {"name": name}
    with pytest.raises(ValueError, match=f"unknown rewrite .*{message}"):
        apply_record(nn.Linear(2, 2), record, {})


def test_a_factor_that_the_plan_does_not_hold_is_refused() -> None:
    model = Block()
    found, tensors = records("up-down", captured(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"'up-down' names the tensor 'rewrite/0/factor', which the plan does not hold"
    ):
        apply_record(model, found[0], {"another": tensors["rewrite/0/factor"]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_factor_of_another_shape_is_refused() -> None:
    model = Block()
    found, tensors = records("smooth", captured(model))
    with pytest.raises(ValueError, match="positive factors"):
        apply_record(model, found[0], {key: value[:-1] for key, value in tensors.items()})


@pytest.mark.parametrize("name", ALONE)
def test_a_check_changes_nothing(name: str) -> None:
    model = Block()
    found, tensors = records(name, captured(model))
    before = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    check_all(model, found, tensors)
    for key, value in model.state_dict().items():
        assert value.data_ptr() == before[key][0] and torch.equal(value, before[key][1])


@pytest.mark.parametrize("name", ALONE)
def test_a_check_finds_names_that_the_model_does_not_have(name: str) -> None:
    found, tensors = records(name, captured(Block()))
    lacking = Block()
    for missing in ("embed", "up", "k", "v", "norm", "ln"):
        delattr(lacking, missing)
    with pytest.raises((ValueError, UnsupportedError), match=f"the plan's rewrite '{name}'"):
        check_all(lacking, found, tensors)
    with pytest.raises(ValueError, match="unknown rewrite"):
        check_record(lacking, {**found[0], "name": "other"}, tensors)
    if tensors:
        with pytest.raises(ValueError, match="which the plan does not hold"):
            check_record(lacking, found[0], {})
