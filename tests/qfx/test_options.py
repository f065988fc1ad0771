"""qfx.options: what torch.compile's options may hold, and how everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qfx.options import CacheAt, Options
from qfx.plan import Plan
from qfx.recipe import Recipe


def test_nothing_given_is_w8a8_on_the_best_backend() -> None:
    for options in (None, {}, {"recipe": None, "plan": None, "strict": None, "backend": None}):
        assert Options.parse(options) == Options(Recipe.parse("w8a8"), None, False, "auto")


def test_all_that_can_be_given() -> None:
    parsed = Options.parse({"recipe": "w4a16", "strict": True, "backend": "reference"})
    assert parsed.recipe.name == "w4a16" and parsed.strict and parsed.backend == "reference"
    own = {"rules": [{"target": "linear", "w": "nf4/g64"}]}
    assert Options.parse({"recipe": own}).recipe.rules[0].w == "nf4/g64"


KV: dict[str, tuple[Any, dict[str, str]]] = {
    "a type": ("i8", {"k": "i8/tok", "v": "i8/tok"}),
    "fp8": ("fp8", {"k": "f8e4m3/tok", "v": "f8e4m3/tok"}),
    "a format": ("i8/head/dyn", {"k": "i8/head/dyn", "v": "i8/head/dyn"}),
    "each": ({"k": "i8", "v": "bf16"}, {"k": "i8/tok", "v": "bf16"}),
    "one": ({"k": "u4/tok"}, {"k": "u4/tok"}),
}


@pytest.mark.parametrize("name", KV)
def test_keys_and_values_of_attention(name: str) -> None:
    given, texts = KV[name]
    parsed = Options.parse({"kv": given})
    assert parsed.kv is not None and (parsed.kv.target, parsed.kv.texts) == ("attention", texts)
    assert parsed.recipe.rules == (*Recipe.parse("w8a8").rules, parsed.kv) and parsed.default
    assert {r: str(f) for r, f in parsed.recipe.formats_for("attention", "x").items()} == texts


def test_kv_may_be_switched_off() -> None:
    assert Options.parse({"kv": None, "cache": None}) == Options.parse({"kv": False}) == Options.parse(None)


def test_where_sessions_are_kept() -> None:
    assert Options.parse(None).cache is True and Options.parse({"cache": False}).cache is False
    assert Options.parse({"cache": "~/x"}).cache == CacheAt(Path.home() / "x")
    assert Options.parse({"cache": {"max_bytes": 5}}).cache == CacheAt(None, 5)
    assert Options.parse({"cache": {"folder": Path("/a"), "max_bytes": None}}).cache == CacheAt(Path("/a"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "w8a8"}, r"unknown option 'recpie', did you mean 'recipe'\?"),
        ({"Strict": True}, r"unknown option 'Strict', did you mean 'strict'\?"),
        ({"zzz": 1}, r"unknown option 'zzz', valid: backend, cache, kv, plan, recipe, strict"),
        ({3: 1}, r"unknown option 3"),
        ("w4a16", r"options is a dictionary[\s\S]*found: 'w4a16'[\s\S]*options=\{\"recipe\": \"w4a16\"\}"),
        ({"strict": 1}, r"'strict' takes a bool\n  expected: True or False\n  found: 1"),
        ({"strict": "yes"}, r"found: 'yes'"),
        ({"backend": "onxx"}, r"unknown backend 'onxx', did you mean 'onnx'\?"),
        ({"backend": 1}, r"unknown backend 1"),
        ({"backend": ["onnx"]}, r"unknown backend \['onnx'\]"),
        ({"recipe": 8}, r"a recipe is a preset's name, .* found int"),
        ({"recipe": "w8a"}, r"unknown preset 'w8a', did you mean 'w8a8'\?"),
        (
            {"recipe": "w8a8-static"},
            r"needs calibration data.*\n  next step: model = qfx.quantize\(model, recipe, data=",
        ),
        ({"recipe": "w8a8-smooth"}, r"'w8a8-smooth' needs calibration data"),
        ({"kv": "i9"}, r"option 'kv': bad format 'i9'[\s\S]*"),
        (
            {"kv": "i4/g32/dyn"},
            r"k=i4/g32/dyn cannot be had: scales of groups stand[\s\S]*next step: write 'i4/tok'; qfx.Q",
        ),
        ({"kv": "i8/head"}, r"k=i8/head cannot be had: torch.compile has no data"),
        (
            {"kv": {"k": "i8", "q": "i8"}},
            r"'kv' gives keys and values[\s\S]*expected: \"i8\"[\s\S]*found: \{'k': 'i8', 'q'",
        ),
        ({"kv": {}}, r"'kv' gives keys and values"),
        ({"kv": True}, r"found: True"),
        ({"kv": {"v": 8}}, r"option 'kv': a format is a text"),
        ({"cache": 3}, r"option 'cache' says where[\s\S]*found: 3\n  next step"),
        ({"cache": ""}, r"option 'cache' says where"),
        ({"cache": {"path": "x"}}, r"expected: True, False, a folder, or \{'folder'"),
        ({"cache": {"max_bytes": 0}}, r"a positive int"),
        ({"cache": {"max_bytes": True}}, r"a positive int"),
        ({"plan": 3}, r"'plan' takes a plan or the folder of one\n  expected: a qfx.Plan or a path\n  found: int: 3"),
    ],
)
def test_refusals_say_what_to_do(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options.parse(options)


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_a_mode_that_nothing_would_heed_is_refused(backend: str) -> None:
    assert Options.parse(None, "reduce-overhead").mode == "reduce-overhead"
    with pytest.raises(
        ValueError, match=rf"'reduce-overhead' is for the backend 'triton'\n  found: backend '{backend}'"
    ):
        Options.parse({"backend": backend}, "reduce-overhead")


def test_a_plan_or_its_folder_brings_its_recipe(tmp_path: Path) -> None:
    plan = Plan(recipe=Recipe.parse("w8a8-static"), annotations={"fc": {"x": "u8", "w": "i8/ch"}})
    assert Options.parse({"plan": plan}).recipe.name == "w8a8-static"
    plan.save(tmp_path / "plan")
    for given in (tmp_path / "plan", str(tmp_path / "plan")):
        assert Options.parse({"plan": given}).plan == plan
    with pytest.raises(ValueError, match=r"both given\n  next step: leave 'recipe' out"):
        Options.parse({"plan": plan, "recipe": "w8a8"})
    with pytest.raises(ValueError, match=r"'plan' and 'kv' were both given[\s\S]*a rule for 'attention'"):
        Options.parse({"plan": plan, "kv": "i8"})
    with pytest.raises(FileNotFoundError, match="no plan here"):
        Options.parse({"plan": tmp_path / "nothing"})
