"""What smooth-k does for the cache of the tiny language model, plain and with an exact outlier pair in its keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx import Plan, Recipe, Rule
from qfx.kv.judge import judge_each
from tests import tiny
from tests.outliers import key_outliers
from tests.qfx.test_accuracy import ASSETS, ids_of, rows

transformers = pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")
FOLDER = ASSETS / "tiny_lm"
FORMATS = ("i8/tok/f16", "u4/tok/f16")


@cache
def text() -> Tensor:
    return rows(ids_of(FOLDER), 256)


def load(outliers: bool) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    if outliers:
        key_outliers(model)
    return model


def recipe(keys: str = "i8/tok/f16", **options: Any) -> Recipe:
    return Recipe(name="r", rules=(Rule(target="cache", k=keys, v="none"),), rewrites=("smooth-k",), **options)


def smoothed(model: Any, **options: Any) -> Any:
    data = [{"input_ids": text()[i : i + 2]} for i in (0, 2)]
    return qfx.quantize(model, recipe(**options), data)


def losses(model: Any) -> dict[str, float]:
    """KLD in nats per token of caches that round keys token by token, by format."""
    caches = {
        fmt: qfx.QuantizedCache(model.config, {"k": fmt, "v": "f32", "residual": 0, "sinks": 0}) for fmt in FORMATS
    }
    return {fmt: one.kld for fmt, one in judge_each(model, text()[64:65], caches, step=64).items()}


@pytest.mark.slow
def test_an_outlier_pair_is_undone() -> None:
    """Keys with a pair 30 times as large lose more than 20 times what they lose once it is smoothed."""
    hurt, mended = losses(load(True)), losses(smoothed(load(True), smooth_alpha="search"))
    print(f"outlier pair {hurt}, smoothed {mended}")
    assert all(mended[fmt] < hurt[fmt] / 20 for fmt in FORMATS)


@pytest.mark.slow
def test_the_plain_model_gains_too() -> None:
    """The float function stays, and keys in 4 bits lose less than without."""
    plain, made = load(False), smoothed(load(False), smooth_alpha="search")
    with torch.no_grad():
        wanted, found = (model(input_ids=text()[64:66]).logits for model in (plain, made))
    assert float((wanted - found).norm() / wanted.norm()) < 1e-5
    before, after = losses(plain), losses(made)
    print(f"plain {before}, smoothed {after}")
    assert all(after[fmt] < before[fmt] for fmt in FORMATS)


@pytest.mark.slow
def test_the_plan_holds_the_factors(tmp_path: Any) -> None:
    data = [{"input_ids": text()[:2]}]
    plan = qfx.plan(load(True), recipe(), data)
    assert [record["name"] for record in plan.rewrites] == ["smooth-k"] * 6
    assert all(plan.tensors[record["factor"]].shape == (32,) for record in plan.rewrites)
    plan.save(tmp_path / "plan")
    live = qfx.quantize(load(True), Plan.load(tmp_path / "plan"))
    qfx.save(live, tmp_path / "model")
    loaded = qfx.load(tmp_path / "model")
    with torch.no_grad():
        wanted, found, again = (m(input_ids=text()[64:65], use_cache=False).logits for m in (load(True), live, loaded))
    assert float((wanted - found).norm() / wanted.norm()) < 1e-5 and torch.equal(found, again)


def test_keys_that_gain_nothing_are_told() -> None:
    """KIVI's layout has a scale for each key channel."""
    with pytest.warns(qfx.QfxWarning, match="with scales for each channel: scaling the channels changes nothing"):
        plan = qfx.plan(tiny.build("llama"), recipe("u4/g32/f16"), [{"input_ids": torch.arange(3, 19).reshape(2, 8)}])
    assert plan.rewrites == []
