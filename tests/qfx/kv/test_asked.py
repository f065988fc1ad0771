from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qfx.kv.asked import cache_texts, is_cache, names_of
from qfx.presets import presets
from qfx.recipe import Recipe, Rule


def test_a_target_of_caches_is_told_from_a_name() -> None:
    assert is_cache("cache") and is_cache("cache:*.layers.0.*") and is_cache("cache:re:.*")
    assert not is_cache("cached") and not is_cache("model.cache") and not is_cache("attention")
    assert names_of("cache:re:.*attn$") == "re:.*attn$"


def test_short_names_are_those_of_caches() -> None:
    assert cache_texts("k", "i4") == "u4/g32/f16" and cache_texts("v", "fp8") == "f8e4m3/tok/f16"
    assert cache_texts("k", ["i4", "i2"]) == ("u4/g32/f16", "u2/g32/f16")
    assert cache_texts("v", "none") == "none" and cache_texts("v", None) is None


@pytest.mark.parametrize("text", ["i8/ch", "u4/b2x2", "u4/g32/dyn", "nf4/g64/dq"])
def test_formats_that_no_cache_can_have_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"a cache cannot store keys as '{text}'"):
        Rule(target="cache", k=text)
    with pytest.raises(ValueError, match=f"a cache cannot store values as '{text}'"):
        Rule(target="cache:*.attn", v=["i8", text])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "cache"}, "names no format; give one of k, v"),
        ({"target": "cache", "w": "i8"}, "has no role 'w', only k, v"),
        ({"target": "cache:x", "q": "i8/tok"}, "has no role 'q', only k, v"),
        ({"target": "cache", "k": []}, "a list of formats is empty"),
        ({"target": "cache", "k": "i8", "residual": -1}, "residual"),
        ({"target": "cache", "k": "i8", "sink": 4}, "unknown key 'sink' in Rule, did you mean 'sinks'"),
        ({"target": "linear", "w": "i8", "sinks": 4}, "sinks is a number of tokens of 'cache'"),
        ({"target": "attention", "k": []}, "a list of formats is empty"),
        ({"target": "cache:", "k": "i8"}, "a target is an op kind"),
        ({"target": "cache:re:(", "k": "i8"}, "bad regular expression"),
        ({"target": "cache", "k": "i5x"}, "i5x"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


def recipe(*rules: Rule, **fields: Any) -> Recipe:
    return Recipe(name="t", rules=rules, **fields)


def test_the_later_rule_wins_role_by_role_and_names_are_those_of_attentions() -> None:
    found = recipe(
        Rule(target="cache", k="i4", v="i2", residual=16),
        Rule(target="cache:*.0.*", v="i8"),
        Rule(target="cache:re:.*\\.1\\.", k="none", v="none"),
        Rule(target="cache:*.2.*", sinks=0),
    )
    assert found.cache_for("layers.0.attn") == {"k": "u4/g32/f16", "v": "i8/tok/f16", "residual": 16}
    assert found.cache_for("layers.1.attn") == {}
    assert found.cache_for("layers.2.attn") == {"k": "u4/g32/f16", "v": "u2/g32/f16", "residual": 16, "sinks": 0}
    assert found.names_cache("layers.0.attn") and not found.names_cache("layers.3.attn")


def test_rules_for_caches_and_for_nodes_never_meet() -> None:
    found = recipe(Rule(target="*", k="i8/tok"), Rule(target="cache:*", v="i4"))
    assert found.cache_for("layers.0.attn") == {"v": "u4/g32/f16"}
    assert {role: str(fmt) for role, fmt in found.formats_for("attention", "layers.0.attn").items()} == {"k": "i8/tok"}
    assert found.unmatched([("attention", "layers.0.attn")]) == []


def test_ignored_caches_stay_as_they_are() -> None:
    found = recipe(Rule(target="cache", k="i8", v="i8"), ignore=("cache:*.0.*",))
    assert found.cache_for("layers.0.attn") == {} and found.cache_for("layers.1.attn") != {}
    assert recipe(Rule(target="cache", k="i8", v="i8"), ignore=("cache",)).cache_for("x") == {}


def test_caches_need_no_data_unless_bits_are_to_be_chosen() -> None:
    assert not Recipe.parse("kv8").needs_data and not Recipe.parse("w4a16+kv-k4v2").needs_data
    assert Recipe.parse("kv-heads").needs_data and Recipe.parse("w4a16-gptq+kv8").needs_data


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [("kv8", "i8/tok/f16", "i8/tok/f16"), ("kv4", "u4/g32/f16", "u4/g32/f16"), ("kv-k4v2", "u4/g32/f16", "u2/g32/f16")],
)
def test_presets_combine_with_those_of_weights(name: str, keys: str, values: str) -> None:
    both = Recipe.parse(f"w4a16-gptq+{name}")
    assert both.rounding == "gptq" and both.name == f"w4a16-gptq+{name}"
    assert both.cache_for("any") == {"k": keys, "v": values}
    for text in ("linear", "embedding"):
        assert both.formats_for(text, "fc") == presets()["w4a16-gptq"].formats_for(text, "fc")
    assert Recipe.parse("kv-heads+w8a8").cache_bits == 3.0
    with pytest.raises(ValueError, match=r"unknown preset 'kv9', did you mean 'kv\d'"):
        Recipe.parse("w4a16+kv9")


@pytest.mark.parametrize("bits", [1.5, 7])
def test_cache_bits_are_for_a_rule_and_within_reach(bits: float) -> None:
    with pytest.raises(ValueError, match="cache_bits"):
        Recipe.parse("kv-heads").override(cache_bits=bits)
    with pytest.raises(ValueError, match="cache_bits=3 is for a rule with the target 'cache', found none"):
        Recipe.parse("w8a8").override(cache_bits=3.0)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files_bring_everything_back(tmp_path: Path, suffix: str) -> None:
    whole = recipe(
        Rule(target="cache", k=["i4", "i2"], v="i8", residual=0, sinks=7),
        Rule(target="cache:*.0.*", residual=5),
        cache_bits=2.5,
    )
    file = tmp_path / f"r.{suffix}"
    file.write_text(whole.to_yaml() if suffix == "yaml" else whole.to_json())
    assert Recipe.parse(file) == whole
    assert whole.to_dict()["rules"][0] == {
        "target": "cache", "k": ["u4/g32/f16", "u2/g32/f16"], "v": "i8/tok/f16", "residual": 0, "sinks": 7,
    }  # fmt: skip
