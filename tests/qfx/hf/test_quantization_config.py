"""What config.json says of a quantized model: short, complete, and refused where it is not understood."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qfx.hf.quantization_config import recipe_of, unwrap, wrap
from qfx.plan import versions
from qfx.recipe import Recipe
from qfx.storage.checkpoint import digests
from qfx.storage.describe import describe, grouped, spread, state
from tests.quantized import quantized


def made(name: str = "gpt2", recipe: str = "w8a8") -> tuple[Recipe, dict[str, Any]]:
    model = quantized(name, recipe).model
    tensors, tied = state(model)
    return Recipe.parse(recipe), {**describe(model, tied), "tensors": digests(tensors)}


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("mixtral", "w8a8"),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("gpt2", "w8a8"), ("bert", "w8a8-smooth"))),
    ],
)
def test_there_and_back(name: str, recipe: str) -> None:
    asked, record = made(name, recipe)
    fields = json.loads(json.dumps(wrap(asked, record)))
    assert unwrap(fields, "here") == (asked, json.loads(json.dumps(record)))
    assert fields["qfx"] == versions()["qfx"] and fields["quant_method"] == "qfx"


def test_equal_modules_are_told_once() -> None:
    _, record = made()
    groups = grouped(record["modules"])
    assert sum(len(group["names"]) for group in groups) == len(record["modules"])
    assert len(groups) == len(record["modules"]) - 4, "the four linears of both blocks are told once"
    assert not any("sqnr_db" in group for group in groups)
    assert spread(groups, sqnr=True) == record["modules"]


def test_errors_of_modules_are_kept() -> None:
    _, record = made("bert", "w8a8-smooth")
    found = spread(grouped(record["modules"]), sqnr=True)
    assert found == record["modules"] and all(
        isinstance(r["sqnr_db"], float) for r in found.values() if "same" not in r
    )


def test_without_a_record_or_recipe() -> None:
    assert unwrap(wrap(None, None), "here") == (None, None)
    assert unwrap(wrap(Recipe.parse("w8a8"), None), "here") == (Recipe.parse("w8a8"), None)
    assert recipe_of(quantized("gpt2").model) == Recipe.parse("w8a8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": 7, "qfx": "9.9"},
            r"another version of qfx\n  expected: version 6 or earlier\n  found: version 7, written by qfx 9\.9",
        ),
        ({"quant_method": "gptq"}, r"no quantization_config of qfx, found 'gptq'"),
        ({"recipes": {}}, r"unknown key 'recipes' in here, did you mean 'recipe'\?"),
        ({"recipe": "w4a61"}, r"unknown preset 'w4a61'"),
        ({"model": {}}, r"'model' in here was altered\n  next step: copy config.json again"),
        ({"model": []}, r"'model' in here was altered"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unwrap({**wrap(*made()), **change}, "here")


def test_any_change_of_the_model_is_seen() -> None:
    """Not of versions that had no digest."""
    fields = json.loads(json.dumps(wrap(*made())))
    fields["model"]["modules"][0]["w"] = "i8/g32"
    with pytest.raises(ValueError, match="'model' in here was altered"):
        unwrap(fields, "here")
    with pytest.raises(ValueError, match="'model' in here was altered"):
        unwrap({key: value for key, value in wrap(*made()).items() if key != "sha256"}, "here")
    del fields["sha256"]
    assert unwrap({**fields, "version": 3}, "here")[1] is not None


def test_a_recipe_of_a_later_version_says_so() -> None:
    fields = wrap(*made())
    fields["recipe"]["magic"] = 1
    with pytest.raises(ValueError, match="the recipe in here cannot be read: unknown key 'magic'"):
        unwrap(fields, "here")
    message = (
        r"the recipe in here cannot be read: unknown key 'magic'(.|\n)*written by qfx 99\.0, this is qfx .*: install"
    )
    with pytest.raises(ValueError, match=message):
        unwrap({**fields, "qfx": "99.0"}, "here")


@pytest.mark.parametrize("key", ["modules", "parameters", "tied", "tensors"])
def test_a_record_without_a_part_is_refused(key: str) -> None:
    fields = wrap(*made())
    del fields["model"][key]
    with pytest.raises(ValueError, match="'model' in here was altered"):
        unwrap(fields, "here")
