from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import qfx
import qfx.onnx
from qfx.kv.files import asked_caches, for_file, left_out
from qfx.kv.planning import plan_caches
from qfx.kv.plans import Caches
from qfx.recipe import Recipe
from tests.qfx.kv import models


def caches(recipe: Any) -> Caches:
    return plan_caches(models.build(), Recipe.parse(recipe))[0]


def rules(**fields: Any) -> dict[str, Any]:
    return {"rules": [{"target": "cache", **fields}]}


@pytest.mark.parametrize(
    ("recipe", "kv", "told"),
    [
        ("kv8", "i8", "its cache is i8/ch: a file has fixed scales for each channel, not k=i8/tok/f16 v=i8/tok/f16"),
        ("kv4", "i4", "its cache is i4/ch"),
        (rules(k="i8", v="u8/tok"), "i8", "i8/ch"),
        (rules(k="i4/tok/f16", v="i4/tok/f16"), "i4", "its cache is i4/ch"),
        (rules(k="i2", v="i2"), None, "alike, not k=u2/g32/f16"),
        (rules(k="i3", v="i3"), None, "alike, not k=u3/g32/f16"),
        ("kv-k4v2", None, "stays in float: a file stores i8 or i4 for keys and values alike"),
        (rules(k="fp8", v="fp8"), None, "stays in float"),
        (rules(k="i8"), None, "stays in float"),
        (rules(k=["i8", "i4"], v="i4"), None, "stays in float"),
    ],
)
def test_a_file_comes_as_near_as_it_can_and_says_so(recipe: Any, kv: str | None, told: str) -> None:
    found, (note,) = for_file(caches(recipe), None, has_cache=True, data=True)
    assert found == kv and told in note.reason and not note.minor
    assert note.node == "model.layers.0.self_attn and 1 more"


def test_what_the_caller_asks_holds() -> None:
    found, (note,) = for_file(caches("kv4"), "i8", has_cache=True, data=True)
    assert found is None and note.minor and "kv='i8' is stored in the place of k=u4/g32/f16" in note.reason


def test_without_data_or_a_cache_in_the_file_it_stays_in_float() -> None:
    found, (note,) = for_file(caches("kv8"), None, has_cache=True, data=False)
    assert found is None and not note.minor and "take calibration data" in note.reason and "data=" in note.next_step
    found, (note,) = for_file(caches("kv8"), None, has_cache=False, data=True)
    assert found is None and note.minor and "the file has no cache" in note.reason


def test_a_live_cache_is_no_input_of_a_file(tmp_path: Path) -> None:
    model = models.build()
    given = {"input_ids": models.ids(4), "past_key_values": qfx.QuantizedCache(model.config, "i4")}
    with pytest.raises(qfx.UnsupportedError, match=r"(?s)QuantizedCache is no input of a file.*kv='i8'"):
        qfx.export_onnx(model, given, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_layers_that_differ_are_told_as_such() -> None:
    _, (note,) = for_file(caches(rules(k="i8", v="i8") | {"ignore": ["cache:*.0.*"]}), None, has_cache=True, data=True)
    assert note.node == models.NAMES[1]
    mixed = {"rules": [{"target": "cache", "k": "i8", "v": "i8"}, {"target": "cache:*.0.*", "v": "i4"}]}
    _, (note,) = for_file(caches(mixed), None, has_cache=True, data=True)
    assert "not formats by heads or layers" in note.reason


def test_without_a_quantized_cache_there_is_nothing_to_say() -> None:
    assert for_file({}, None, has_cache=True, data=False) == (None, [])


def test_files_of_weights_alone_say_what_they_leave_out() -> None:
    assert left_out(models.build()) == []
    (note,) = left_out(qfx.quantize(models.build(), "kv8"))
    assert note.minor and "the formats of its cache are not written" in note.reason


def test_whose_caches_are_asked_for() -> None:
    model = qfx.quantize(models.build(), "kv8")
    assert asked_caches(model, None, None) == caches("kv8")
    assert asked_caches(model, Recipe.parse("w8a16+kv4"), None) == caches("kv4")
    assert asked_caches(model, Recipe.parse("w8a16"), None) == caches("kv8")
    assert asked_caches(model, None, qfx.plan(models.build(), "kv-k4v2")) == caches("kv-k4v2")


@functools.cache
def data() -> list[Any]:
    return [{"input_ids": models.ids(16)}]


@pytest.mark.slow
def test_a_model_with_a_quantized_cache_is_exported_with_one(tmp_path: Path) -> None:
    model = qfx.quantize(models.build(), "kv8")
    with pytest.warns(qfx.QfxWarning, match=r"its cache is i8/ch: a file has fixed scales"):
        written = qfx.export_onnx(model, None, tmp_path / "m", data=data())
    assert sum("i8/ch" in note.reason for note in written.notes) == 1
    loaded: Any = qfx.onnx.load(tmp_path / "m")
    assert loaded(torch.tensor([[3, 4, 5]])).past_key_values.keys[0].dtype == torch.int8
    with pytest.raises(qfx.UnsupportedError, match="its cache is i8/ch"):
        qfx.export_onnx(model, None, tmp_path / "n", data=data(), strict=True)
