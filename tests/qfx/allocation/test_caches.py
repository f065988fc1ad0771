from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.allocation.caches import CANDIDATES, TOLD
from qfx.kv.formats import CacheFormat
from qfx.kv.judge import judge_each
from qfx.kv.plans import read
from qfx.recipe import Recipe
from tests.qfx.kv import models

EXTRA = {"residual": 0, "sinks": 2}
RULES = [{"target": "cache", "k": "i3", "v": "i3", **EXTRA}]


def data(count: int = 2) -> list[Any]:
    return [{"input_ids": models.ids(96, 2, seed=seed)} for seed in range(count)]


@functools.cache
def planned(bits: float = 3.0) -> qfx.Plan:
    recipe = Recipe.parse({"name": "t", "rules": RULES, "cache_bits": bits})
    return qfx.plan(loud(), recipe, data(), progress=False)


def loud() -> Any:
    """A model one of whose heads has keys that weigh more."""
    model = models.build()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[: models.WIDTH] *= 4
        model.model.layers[0].self_attn.q_proj.weight[: 2 * models.WIDTH] *= 4
    return model


def nbytes(plan: qfx.Plan, tokens: int = 4096) -> int:
    return sum(int(one.nbytes(tokens)) for one in read(plan.caches))


def uniform(bits: int, tokens: int = 4096) -> int:
    fmt = CacheFormat.from_json({"k": f"u{bits}/g32/f16", "v": f"u{bits}/g32/f16", **EXTRA})
    return models.LAYERS * int(fmt.nbytes(models.HEADS, models.WIDTH, tokens))


def bits_of(plan: qfx.Plan) -> dict[str, list[int]]:
    found = {}
    for one in read(plan.caches):
        pairs = [one.format.of_head(head) for head in range(models.HEADS)]
        found[one.layer.fqn] = [fmt.bits for pair in pairs for fmt in pair]
    return found


def test_as_many_bits_on_average_are_as_many_bytes() -> None:
    told = planned().sensitivities[TOLD]
    assert told["bytes"] <= told["budget"]
    assert nbytes(planned()) <= uniform(3)
    assert nbytes(planned()) > uniform(2)
    assert sum(sum(bits) for bits in bits_of(planned()).values()) <= 3 * 8


def test_what_was_measured_is_no_worse_than_the_uniform_cache() -> None:
    told = planned().sensitivities[TOLD]
    assert 0 < told["measured"] <= told["uniform"] and told["what"] == "KL divergence, nats per position"
    assert 0.3 < told["predicted"] / told["measured"] < 3


def test_a_head_that_weighs_more_gets_more_bits() -> None:
    first = bits_of(planned())[models.NAMES[0]]
    assert first[0] == max(first) > 3  # keys of head 0
    units = planned().sensitivities[TOLD]["units"]
    assert len(units) == 2 * models.LAYERS * models.HEADS
    assert all(one["format"] in CANDIDATES and one["score"] >= 0 for one in units.values())


def test_the_plan_runs_and_keeps_the_rest_of_its_formats() -> None:
    assert {(one.format.residual, one.format.sinks) for one in read(planned().caches)} == {(0, 2)}
    model = qfx.quantize(loud(), planned())
    found = models.generated(model)
    assert found.past_key_values.formats == [one.format for one in read(planned().caches)]


def test_the_loss_that_was_measured_is_that_of_the_cache() -> None:
    """The graph's attention over stored and new tokens is what the real cache does, one token at a time."""
    ids: Tensor = torch.cat([batch["input_ids"] for batch in data()])
    found = judge_each(loud(), ids, {"own": qfx.QuantizedCache(loud().config, planned())}, step=1)["own"]
    assert found.kld == pytest.approx(planned().sensitivities[TOLD]["measured"], rel=0.05)


@pytest.mark.slow
def test_a_cache_that_a_rule_names_keeps_its_format() -> None:
    rule = {"target": f"cache:{models.NAMES[1]}", "k": "i8", "v": "i8"}
    recipe = Recipe.parse({"name": "t", "rules": [*RULES, rule], "cache_bits": 2.5})
    found = bits_of(qfx.plan(loud(), recipe, data(1), progress=False))
    assert found[models.NAMES[1]] == [8] * 4 and max(found[models.NAMES[0]]) < 8


@pytest.mark.parametrize("bits", [3.0, 2.5])
def test_texts_too_short_to_be_stored_keep_the_cache_uniform(bits: float) -> None:
    """Nothing is lost in any format then, which is no reason for the one of fewest bits."""
    short: list[Any] = [{"input_ids": models.ids(2 + 32, 2)}]  # the sinks, and a group that no query comes after
    recipe = Recipe.parse({"name": "t", "rules": RULES, "cache_bits": bits})
    with pytest.warns(qfx.QfxWarning, match="give texts of more than 34 tokens") as warned:
        plan = qfx.plan(loud(), recipe, short, progress=False)
    assert len(warned) == 1
    assert bits_of(plan) == dict.fromkeys(models.NAMES, [int(bits)] * 4)
    assert TOLD not in plan.sensitivities
    with pytest.raises(qfx.UnsupportedError, match="no query of the data comes so late"):
        qfx.plan(loud(), recipe, short, strict=True, progress=False)


def test_it_needs_data() -> None:
    with pytest.raises(ValueError, match="recipe 'kv-heads' needs calibration data"):
        qfx.plan(models.build(), "kv-heads")


@pytest.mark.slow
def test_it_needs_caches_that_are_free() -> None:
    fixed = [{"target": f"cache:{name}", "k": "i8", "v": "i8"} for name in models.NAMES]
    recipe = Recipe.parse({"name": "t", "rules": [*RULES, *fixed], "cache_bits": 3.0})
    with pytest.raises(qfx.UnsupportedError, match="no cache can have bits by heads"):
        qfx.plan(models.build(), recipe, data(1), progress=False)
