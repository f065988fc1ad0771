from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import qfx
from qfx.kv.cache import QuantizedCache
from qfx.kv.held import caches_of, is_quantized
from qfx.kv.live import new_cache, with_caches
from tests import tiny
from tests.qfx.kv import models


def said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, qfx.QfxWarning)]


def test_generate_starts_with_a_cache_of_the_plans_formats() -> None:
    model = models.build()
    wanted = models.generated(model, past_key_values=QuantizedCache(model.config, "i4"))
    kind = type(model)
    model = qfx.quantize(model, "kv4")
    found = models.generated(model)
    assert isinstance(found.past_key_values, QuantizedCache)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.past_key_values.nbytes() == wanted.past_key_values.nbytes()
    assert isinstance(model, kind) and type(model).__name__ == kind.__name__ and model.can_generate()
    assert is_quantized(model)


def test_each_call_has_a_cache_of_its_own_and_one_may_go_on() -> None:
    model: Any = qfx.quantize(models.build(), "kv8")
    one, other = models.generated(model), models.generated(model)
    assert one.past_key_values is not other.past_key_values
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(one.sequences)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = model.generate(one.sequences, past_key_values=one.past_key_values, **how)
    assert said(caught) == []
    assert torch.equal(again, models.generated(model, tokens=11).sequences)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'"),
        ({"past_key_values": None}, "a DynamicCache was given"),
    ],
    ids=["off", "named", "given"],
)
def test_what_the_caller_says_holds_and_is_said_once(how: dict[str, Any], why: str) -> None:
    model: Any = qfx.quantize(models.build(), "kv4")
    plain = models.generated(models.build())
    found = []
    for _ in range(2):
        given = {"past_key_values": tf.DynamicCache()} if "past_key_values" in how else how
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = models.generated(model, **given)
        assert torch.equal(result.sequences, plain.sequences) and not isinstance(result.past_key_values, QuantizedCache)
        found.append(said(caught))
    assert len(found[0]) == 1 and why in found[0][0] and found[1] == []
    assert "set aside" in found[0][0] and "next step" in found[0][0]


def test_continuous_batching_is_told_to_have_its_own() -> None:
    model: Any = qfx.quantize(models.build(), "kv8")
    how = tf.GenerationConfig(max_new_tokens=2, do_sample=False, eos_token_id=-1, pad_token_id=0)
    with pytest.warns(qfx.QfxWarning, match="set aside: continuous batching .* call generate"):
        model.init_continuous_batching(how)


def test_a_cache_of_other_formats_is_told() -> None:
    model: Any = qfx.quantize(models.build(), "kv4")
    with pytest.warns(qfx.QfxWarning, match=r"a QuantizedCache of other formats was given, layer 0 in k=i8.* of k=u4"):
        found = models.generated(model, past_key_values=QuantizedCache(model.config, "i8"))
    assert found.past_key_values.formats[0].keys == (qfx.Format.parse("i8/tok/f16"),)
    models.generated(model, past_key_values=QuantizedCache(model.config, "i4"))  # those of the plan: nothing to say
    model.__dict__["qfx_caches"].pop(models.NAMES[0])  # as where a layer has no keys and values
    models.generated(model, past_key_values=QuantizedCache(model.config, "i4"))


def test_beams_sampling_and_lookup_run_over_it() -> None:
    model: Any = qfx.quantize(models.build(), "kv8")
    greedy = models.generated(model).sequences
    assert models.generated(model, num_beams=2).sequences.shape == greedy.shape
    one = model.generate(
        models.ids(rows=1), attention_mask=torch.ones(1, 40, dtype=torch.int64), max_new_tokens=8, do_sample=False,
        prompt_lookup_num_tokens=2,
    )  # fmt: skip
    assert one.shape == (1, 48)


def test_copies_keep_it_and_do_not_share() -> None:
    model: Any = qfx.quantize(models.build(), "kv8")
    other = copy.deepcopy(model)
    assert caches_of(other) == caches_of(model) and caches_of(other) is not caches_of(model)
    assert torch.equal(models.generated(other).sequences, models.generated(model).sequences)
    with_caches(other, qfx.plan(models.build(), "kv4").caches)
    assert type(other) is type(model)  # a subclass once, whatever is asked how often
    assert str(new_cache(other).formats[0]) != str(new_cache(model).formats[0])


@pytest.mark.parametrize("recipe", ["kv-k4v2", pytest.param("w8a16+kv8", marks=pytest.mark.slow)])
def test_saved_and_loaded_in_every_way(tmp_path: Path, recipe: str) -> None:
    model: Any = qfx.quantize(models.build(), recipe)
    wanted = models.generated(model)
    qfx.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    found = [qfx.load(tmp_path / "a"), qfx.load(tmp_path / "b")]
    found += [tf.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in "ab"]
    for other in found:
        assert caches_of(other) == caches_of(model)
        result = models.generated(other)
        assert isinstance(result.past_key_values, QuantizedCache)
        assert torch.equal(result.sequences, wanted.sequences)
    assert '"LlamaForCausalLM"' in (tmp_path / "b" / "config.json").read_text()


@pytest.mark.parametrize("recipe", ["kv8", pytest.param("w8a16+kv8", marks=pytest.mark.slow)])
def test_from_pretrained_quantizes_it(tmp_path: Path, recipe: str) -> None:
    models.build().save_pretrained(tmp_path)
    found = tf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=qfx.QfxConfig(recipe))
    assert caches_of(found) == caches_of(qfx.quantize(models.build(), "kv8"))
    assert isinstance(models.generated(found).past_key_values, QuantizedCache)


def test_a_base_model_keeps_the_formats_and_says_what_to_do(tmp_path: Path) -> None:
    made: Any = qfx.quantize(models.build(), "kv8")
    made.save_pretrained(tmp_path)
    with pytest.warns(qfx.QfxWarning, match=r"LlamaModel: its forward makes its own cache.*qfx.QuantizedCache"):
        base = tf.AutoModel.from_pretrained(tmp_path)
    assert list(caches_of(base)) == ["layers.0.self_attn", "layers.1.self_attn"]
    with pytest.raises(qfx.UnsupportedError, match="makes its own cache"):
        with_caches(models.build().model, dict(caches_of(base)), strict=True)


@pytest.mark.slow
def test_models_without_a_cache_are_told_and_refused_under_strict() -> None:
    with pytest.warns(qfx.QfxWarning, match=r"BertForMaskedLM: it keeps no keys and values.*leave rules for 'cache'"):
        made = qfx.quantize(tiny.build("bert"), "w8a16+kv8")
    assert caches_of(made) == {}
    with pytest.raises(qfx.UnsupportedError, match="keeps no keys and values"):
        qfx.quantize(tiny.build("bert"), "w8a16+kv8", strict=True)


def test_a_recipe_for_caches_alone_needs_one() -> None:
    with pytest.raises(ValueError, match="recipe 'kv8' gives no format to anything in BertForMaskedLM"):
        qfx.quantize(tiny.build("bert"), "kv8")


@pytest.mark.slow
def test_a_compiled_model_generates_with_it(fresh_dynamo: None) -> None:
    model: Any = qfx.quantize(models.build(), "w8a8+kv8")
    wanted = models.generated(model).sequences
    model.compile(backend="qfx")
    found = models.generated(model)
    assert isinstance(found.past_key_values, QuantizedCache)
    assert (found.sequences == wanted).float().mean() >= 0.9


def test_a_compiled_model_leaves_the_cache_to_its_caller(fresh_dynamo: None) -> None:
    model = models.build()
    rule = {"rules": [{"target": "cache", "k": "i8", "v": "i8"}, {"target": "lm_head", "x": "i8/tok", "w": "i8/ch"}]}
    model.compile(backend="qfx", options={"recipe": rule})
    with torch.no_grad(), pytest.warns(qfx.QfxWarning, match=r"formats of a cache have no effect here.*QuantizedCache"):
        model(models.ids(), use_cache=False)


def test_a_plan_of_other_heads_is_refused_before_anything_changes() -> None:
    made = qfx.plan(models.build(), "kv8")
    made.fingerprint = ""
    made.caches = {name.replace("model.", "other."): one for name, one in made.caches.items()}
    model = models.build()
    with pytest.raises(ValueError, match="which LlamaForCausalLM lacks"):
        qfx.quantize(model, made)
    assert not is_quantized(model) and "qfx_caching" not in dir(type(model))
