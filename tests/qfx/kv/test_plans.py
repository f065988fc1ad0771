from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import nn

import qfx
from qfx.kv.formats import RESIDUAL, RESIDUAL_8, SINKS, CacheFormat, cache_formats
from qfx.kv.planning import check_model, plan_caches
from qfx.kv.plans import Cached, CacheLayer, layer_formats, read
from qfx.recipe import Recipe, Rule
from tests.qfx.kv import models

LOW = f"residual={RESIDUAL} sinks={SINKS}"  # below 8 bits


def asked(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(name="t", rules=rules, **fields)


def formats(caches: dict[str, Any]) -> list[str]:
    return [str(one.format) for one in read(caches)]


def test_every_layer_is_in_the_plan_and_those_without_a_rule_stay_as_they_are() -> None:
    found, notes = plan_caches(models.build(), asked(Rule(target=f"cache:{models.NAMES[1]}", k="i8", v="i4")))
    assert notes == []
    assert formats(found) == ["k=f32 v=f32", f"k=i8/tok/f16 v=u4/g32/f16 {LOW}"]


def test_without_rules_there_is_nothing() -> None:
    assert plan_caches(models.build(), Recipe.parse("w8a8")) == ({}, [])
    none = asked(Rule(target="cache", k="none", v="none"))
    assert plan_caches(models.build(), none) == ({}, [])


def test_one_role_may_stay_as_it_is() -> None:
    found, _ = plan_caches(models.build().to(torch.bfloat16), asked(Rule(target="cache", k="i8")))
    assert formats(found) == [f"k=i8/tok/f16 v=bf16 residual={RESIDUAL_8}"] * 2


def test_lists_are_those_of_the_models_heads() -> None:
    found, _ = plan_caches(models.build(), asked(Rule(target="cache", k=["i8", "i4"], v="i2")))
    assert formats(found)[0] == f"k=[i8/tok/f16,u4/g32/f16] v=u2/g32/f16 {LOW}"
    with pytest.raises(ValueError, match=r"the cache of model.layers.0.self_attn has formats for other heads"):
        plan_caches(models.build(), asked(Rule(target="cache", k=["i8", "i4", "i4"], v="i2")))


def test_a_target_that_matches_nothing_is_told() -> None:
    rules = (Rule(target="cache", k="i8", v="i8"), Rule(target="cache:*.layers.7.*", k="i4"))
    _, notes = plan_caches(models.build(), asked(*rules, ignore=("cache:lm_head",)))
    assert [note.node for note in notes] == ["'cache:*.layers.7.*'", "'cache:lm_head'"]
    assert "model.layers.1.self_attn" in notes[0].next_step


def test_a_plan_is_saved_with_its_caches_and_old_ones_have_none(tmp_path: Path) -> None:
    made = qfx.plan(models.build(), "kv-k4v2")
    assert list(made.caches) == list(models.NAMES) and "caches=2" in repr(made)
    made.save(tmp_path)
    assert qfx.Plan.load(tmp_path) == made
    other = qfx.plan(models.build(), "kv8")
    assert any(line.startswith("caches['model.layers.0.self_attn']") for line in made.diff(other))
    file = tmp_path / "plan.json"
    fields = json.loads(file.read_text())
    for version, expected in ((2, {}), (3, None)):
        without = {name: value for name, value in fields.items() if name != "caches"} | {"version": version}
        file.write_text(json.dumps(without))
        if expected is None:
            with pytest.raises(ValueError, match="'caches' in .*: expected a dict, found NoneType"):
                qfx.Plan.load(tmp_path)
        else:
            assert qfx.Plan.load(tmp_path).caches == expected


def test_altered_caches_of_a_plan_are_refused(tmp_path: Path) -> None:
    made = qfx.plan(models.build(), "kv8")
    one = made.caches[models.NAMES[0]]
    for wrong in (3, {**one, "format": {"k": "i8"}}, {**one, "heads": 3, "format": {"k": ["i8", "i8"], "v": "i8"}}):
        made.caches[models.NAMES[0]] = wrong  # type: ignore[assignment]
        with pytest.raises(ValueError, match="cache"):
            made.save(tmp_path)
    made.caches = {"a": one, "b": one}
    with pytest.raises(ValueError, match="two caches in the plan are of one layer"):
        made.save(tmp_path)


def test_a_plan_of_another_model_is_refused() -> None:
    caches, _ = plan_caches(models.build(), Recipe.parse("kv8"))
    check_model(models.build(), caches)
    with pytest.raises(ValueError, match=r"cache for 'model.layers.0.self_attn', which Linear lacks"):
        check_model(nn.Linear(2, 2), caches)
    far = {models.NAMES[0]: {**caches[models.NAMES[0]], "index": 9}}
    with pytest.raises(ValueError, match="a cache for layer 9"):
        check_model(models.build(), far)


def test_a_plan_is_what_a_cache_takes_its_formats_from() -> None:
    made = qfx.plan(models.build(), "kv4")
    assert cache_formats(made, 2) == cache_formats("i4", 2)
    assert [str(f) for f in layer_formats({}, 2)] == ["k=f32 v=f32"] * 2
    with pytest.raises(ValueError, match="layer by layer"):
        cache_formats(cache_formats(made, 2), 3)


@pytest.mark.parametrize("tokens", [1, 15, 16, 100])
def test_a_window_keeps_its_newest_tokens(tokens: int) -> None:
    layer = CacheLayer("a", 0, 2, (32, 16), window=16)
    one = Cached(layer, CacheFormat.from_json({"k": "i8", "v": "i4", "residual": 0, "sinks": 0}))
    assert one.nbytes(tokens) == one.format.nbytes(2, (32, 16), min(tokens, 16))
    assert one.float_token_bytes == 2 * 48 * 2
    symbol = sympy.Symbol("T", integer=True, positive=True)
    assert one.nbytes(symbol).subs(symbol, tokens) == one.nbytes(tokens)
