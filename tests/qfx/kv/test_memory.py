"""qfx.kv.memory: bytes are those of caches that hold so many tokens; the longest context is the last that fits."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import qfx
from qfx import Recipe, Rule
from qfx.allocation.model_costs import costs_of
from qfx.allocation.sizes import BATCH, CONTEXT
from qfx.kv import memory as memory_module
from qfx.kv.memory import Memory, parse_bytes
from qfx.kv.plans import CacheLayer
from tests import tiny
from tests.zoo import ZOO

transformers = pytest.importorskip("transformers", reason="caches are transformers caches: pip install qfx[hf]")
KV = ("i8", "i4", "fp8", "kv-k4v2", "i8:u2/g8/f16")


@cache
def memory() -> Memory:
    return Memory.of_config(tiny.config("llama"))


def by_hand(**changes: Any) -> Memory:
    """Two layers, of which the second has a window of 16 tokens; 1000 bytes of weights, one of activations a token."""
    layers = (CacheLayer("a", 0, 2, (8, 8)), CacheLayer("b", 1, 2, (8, 8), window=16))
    return dataclasses.replace(Memory(layers, 1000, CONTEXT * BATCH, torch.float16), **changes)


def tokens(count: int, batch: int = 2) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (batch, count), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kv", KV)
@torch.no_grad()
def test_a_cache_takes_what_is_said(kv: str) -> None:
    """With as many tokens as its memory, which grows by 256, has room for; with some more at most one such part."""
    model = tiny.build("llama")
    formats = memory().formats(kv)
    kept = formats[0].residual + formats[0].sinks
    for count, room in ((256 + kept, 0), (300 + kept, 256)):
        held = qfx.QuantizedCache(model.config, formats)
        model(input_ids=tokens(count), past_key_values=held)
        said = memory().cache_bytes(formats, batch=2, context=count)
        assert said <= held.nbytes() <= said + 2 * room * memory().token_bytes(formats)


@torch.no_grad()
def test_a_float_cache_takes_what_is_said() -> None:
    held = transformers.DynamicCache()
    tiny.build("llama")(input_ids=tokens(9), past_key_values=held)
    size = sum(t.nbytes for layer in held.layers for t in (layer.keys, layer.values))
    assert memory().cache_bytes(batch=2, context=9) == size
    assert memory().cache() == BATCH * CONTEXT * 128 and memory().token_bytes() == 128


@pytest.mark.parametrize("kv", KV)
@given(st.integers(0, 300), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_expressions_agree_with_numbers(kv: str, count: int, batch: int) -> None:
    held = by_hand()
    formats = held.formats(kv)
    put = {CONTEXT: count, BATCH: batch}
    assert held.cache(formats).subs(put) == held.cache_bytes(formats, batch=batch, context=count)
    assert held.expression(formats).subs(put) == held.total(formats, batch=batch, context=count)
    assert held.total(formats, batch=batch, context=count) >= 1000 + batch * count


@given(st.integers(1, 40_000), st.sampled_from([None, *KV]), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_longest_context_is_the_last_that_fits(room: int, kv: str | None, batch: int) -> None:
    held = by_hand()
    formats = None if kv is None else held.formats(kv)
    longest = held.longest(formats, room, batch=batch)
    assert longest is not None
    assert longest == 0 or held.total(formats, batch=batch, context=longest) <= room
    assert held.total(formats, batch=batch, context=longest + 1) > room


def test_windows_that_are_full_take_no_more() -> None:
    held = by_hand()
    assert held.token_bytes() == 64, "2 heads, 16 channels, 2 bytes, of the layer without a window"
    assert held.cache_bytes(context=1000) == 64 * (1000 + 16)
    keys, values = 32 * 4 + 8 * 3, 32 * (4 + 3)  # of 32 tokens of a head: codes, a scale and a zero for each group
    assert held.token_bytes(held.formats("i4")) == Fraction(2 * (keys + values), 32)
    only = by_hand(layers=held.layers[1:], activations=sympy.Integer(0))
    assert only.longest(None, 10_000) is None and only.longest(None, 1000) == 0


def test_formats_of_plans_and_recipes() -> None:
    held = by_hand()
    recipe = Recipe(name="r", rules=(Rule(target="cache:a", k="i8", v="i4"),))
    first, second = held.formats(recipe)
    assert (str(first.keys[0]), str(first.values[0]), str(second.keys[0])) == ("i8/tok/f16", "u4/g32/f16", "f16")
    model = tiny.build("llama")
    plan = qfx.plan(model, "kv4")
    assert [str(one.keys[0]) for one in memory().formats(plan)] == ["u4/g32/f16"]
    assert [str(one.keys[0]) for one in memory().formats("fp8")] == ["f8e4m3/tok/f16"], "the cache, not the preset"


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ("w8a8", "recipe 'w8a8' says nothing of caches"),
        ("i9", "i9"),
        ("i8:i4:i2", "i8:i4:i2"),
        ([{"k": "i8", "v": "i8"}] * 3, "expected: 2, one for each layer"),
    ],
)
def test_formats_that_are_none(kv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        by_hand().formats(kv)


def test_bad_sizes() -> None:
    held = by_hand()
    for room in (0, 2.5, True):
        with pytest.raises(ValueError, match="memory"):
            held.longest(None, room)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch is no size"):
        held.longest(None, 100, batch=0)
    with pytest.raises(ValueError, match="context is no size"):
        held.total(context=-1)
    with pytest.raises(ValueError, match="expected: 2, one for each layer"):
        held.cache(held.formats("i8")[:1])


def test_a_config_is_enough() -> None:
    """The same of a live model and of its configuration."""
    live = Memory.of(tiny.build("llama"))
    assert live == memory() and live.positions == 32 and live.notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_first_layers_tell_the_activations(name: str) -> None:
    model: Any = ZOO[name]()[0]
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 5, "layer_types": None})
    found, whole = Memory.of_config(config), Memory.of(type(model)(config).eval())
    assert len(found.layers) == 5 and dataclasses.replace(found, activations=0) == dataclasses.replace(
        whole, activations=0
    )
    for context in (0, 7, 5000):
        beside = (one.total(context=context, batch=2) for one in (whole, found))
        few, most = next(beside), next(beside)
        assert few <= most <= few + 2 * 3 * 256, "new keys and values of three layers"


@pytest.mark.slow
def test_in_half_precision() -> None:
    live = memory()
    half = Memory.of_config(tiny.config("llama"), dtype=torch.float16)
    assert 2 * half.weights == live.weights and 2 * half.token_bytes() == live.token_bytes()


@pytest.mark.slow
def test_weights_in_the_formats_of_a_recipe() -> None:
    model = tiny.build("llama")
    found = Memory.of_config(model.config, weights=Recipe.parse("w8a16"))
    quantized = qfx.quantize(model, "w8a16")
    held = {t.data_ptr(): t.nbytes for t in (*quantized.parameters(), *quantized.buffers())}
    assert found.weights < 0.4 * memory().weights and abs(found.weights / sum(held.values()) - 1) < 0.02


def test_a_recipe_that_needs_data_needs_a_plan() -> None:
    with pytest.raises(ValueError, match="recipe 'w4a16-gptq' chooses its formats by data"):
        Memory.of_config(tiny.config("llama"), weights=Recipe.parse("w4a16-gptq"))


def test_an_encoder_has_no_cache() -> None:
    with pytest.raises(ValueError, match="the memory of BertForMaskedLM: it keeps no keys and values"):
        Memory.of(tiny.build("bert"))


def test_experts_without_their_weights() -> None:
    """The graph of grouped products cannot be had without dense weights: the parameters count, and a note says so."""
    model: Any = ZOO["mixtral"]()[0]
    found = Memory.of_config(model.config)
    assert found.weights == sum(p.nbytes for p in model.parameters()) and len(found.layers) == 2
    assert "its activations are not counted: the graph cannot be had" in found.notes[0].reason
    with pytest.raises(qfx.UnsupportedError, match="formats of the weights of MixtralForCausalLM"):
        Memory.of_config(model.config, weights=Recipe.parse("w8a16"))


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GiB", 8 * 2**30), ("1.5 kb", 1500), ("4096", 4096), ("2e9", 2 * 10**9), ("16 MB", 16_000_000)],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "lots", "8 GG", "-1", "0", "1.2.3MB", "1e30"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB, 16GB or bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "recipe", ["w4a16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("w8a16", "kv8+w4a16"))]
)
def test_formats_of_weights_take_no_second_graph_with_a_cache(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are those of the live model in every layer, and activations are told by the first layers as without."""
    config = tiny.config("llama")
    config.num_hidden_layers = 4
    shown: list[int] = []

    def told(model: Any, *args: Any) -> Any:
        shown.append(model.config.num_hidden_layers)
        return costs_of(model, *args)

    live = Memory.of(type(tiny.build("llama"))(config).eval(), Recipe.parse(recipe))
    monkeypatch.setattr(memory_module, "costs_of", told)
    found, plain = Memory.of_config(config, weights=Recipe.parse(recipe)), Memory.of_config(config)
    assert shown == [2, 2]
    assert found.weights == live.weights < plain.weights
    assert found.activations == plain.activations
    assert found.layers == live.layers
