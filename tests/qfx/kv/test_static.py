"""Caches of fixed length: what they store, and decoding in one compiled graph."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import qfx
from tests.qfx.kv.test_cache import drift, ids, logits, small

tf = pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")
KINDS: tuple[Any, ...] = ("i8", "fp8", {"k": "u8/tok/f16", "v": "i8/g8/f16"}, {"k": ["i8", "f16"], "v": ["fp8", "i8"]})


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def fixed(model: Any, kv: Any = "i8", length: int = 96) -> Any:
    return qfx.QuantizedCache(model.config, kv, max_length=length)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv", ["f32", *KINDS], ids=str)
def test_it_reads_as_the_growing_cache_without_a_residual(kv: Any, attention: str) -> None:
    model, tokens = small(attn_implementation=attention), ids(70)
    grows = {"k": kv, "v": kv} if isinstance(kv, str) else kv
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, {**grows, "residual": 0}), (50, 3, 1, 1))
    cache = fixed(model, kv)
    found = logits(model, tokens, cache, (50, 3, 1, 1))
    assert drift(found, expected) < 1e-5
    assert int(cache.get_seq_length()) == 70 and cache.get_max_length() == 96 and cache.is_compileable
    assert cache.get_mask_sizes(1, 0) == (96, 0)


def test_memory_is_made_once() -> None:
    model = small()
    cache = fixed(model)
    logits(model, ids(10), cache)
    kept = [t.data_ptr() for t in cache.layers[0].tensors()]
    logits(model, ids(30), cache, (1,) * 20)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.reset()
    assert [t.data_ptr() for t in cache.layers[0].tensors()] == kept
    assert cache.nbytes() == 2 * 2 * 2 * 2 * 96 * (16 + 2), "two layers, keys and values, two sequences, two heads"
    assert drift(logits(model, ids(40), cache, (30,)), logits(model, ids(40), fixed(model), (30,))) == 0


@pytest.mark.parametrize(
    ("backend", "kv"),
    [("aot_eager", "i8"), *(pytest.param("aot_eager", kv, marks=pytest.mark.slow, id=str(kv)) for kv in KINDS[1:])],
)
def test_one_graph_serves_every_step(backend: str, kv: Any) -> None:
    model, tokens = small(), ids(60)
    expected = logits(model, tokens, fixed(model, kv), (50, *(1,) * 9))
    cache = fixed(model, kv)
    found = [logits(model, tokens[:, :50], cache)]
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model, backend=counter, fullgraph=True)
    found += [logits(step, tokens[:, at : at + 1], cache) for at in range(50, 60)]
    assert drift(torch.cat(found, 1), expected) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("kv", "told"),
    [
        ("i8", "attention multiplies k=i8/tok v=i8/tok; a cache that is handed in.*stays as it is"),
        pytest.param("i4", "asked, but attention reads the codes.*own formats hold", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")
def test_the_qfx_backend_decodes_with_it(kv: str, told: str) -> None:
    model, tokens = small(), ids(60, 1)
    expected = logits(model, tokens, fixed(model, kv), (50, *(1,) * 9))
    cache = fixed(model, kv)
    found = [logits(model, tokens[:, :50], cache)]
    asked: dict[str, Any] = {"recipe": "w8a16", "backend": "reference", "kv": "i8"}
    step = torch.compile(model, backend="qfx", options=asked, fullgraph=True)
    found += [logits(step, tokens[:, at : at + 1], cache) for at in range(50, 60)]
    assert int(cache.get_seq_length()) == 60
    assert drift(torch.cat(found, 1), expected) < 0.05
    codes = [t for t in cache.layers[0].tensors() if t.dtype in (torch.int8, torch.uint8)]
    assert any(t.any() for t in codes), "it holds codes"
    assert any(re.search(told, str(note)) for note in qfx.report(step).notes)


def test_generate_and_crop() -> None:
    model, prompt = small(), ids(20)
    outs = [
        model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False)
        for cache in (tf.DynamicCache(config=model.config), fixed(model, "f32"))
    ]
    assert torch.equal(*outs)
    cache = fixed(model)
    whole = logits(model, ids(30), cache, (25,))
    cache.crop(-5)
    assert torch.equal(logits(model, ids(30)[:, 25:], cache), whole[:, 25:])
    for wrong in (3, -31):
        with pytest.raises(ValueError, match=r"(?s)crop\(-?\d+\) of the cache of layer 0.*at most the 30"):
            cache.crop(wrong)


def test_windows() -> None:
    model, tokens = small("mistral", sliding_window=16), ids(60)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), (30, 1, 4))
    assert drift(logits(model, tokens, fixed(model, "f32"), (30, 1, 4)), expected) < 1e-5


def test_queries_placed_by_the_number_of_keys_are_refused() -> None:
    config = tf.GPTNeoConfig(num_layers=2, attention_types=[[["global", "local"], 1]])
    assert qfx.QuantizedCache(config).get_seq_length() == 0
    with pytest.raises(qfx.UnsupportedError, match=r"(?s)gpt_neo places its queries.*leave max_length out"):
        qfx.QuantizedCache(config, max_length=20)


def test_bad_input() -> None:
    model = small()
    cache = fixed(model, length=20)
    with pytest.raises(ValueError, match=r"(?s)layer 0 is full.*at most 20 tokens.*found: 21"):
        logits(model, ids(21), cache, (20,))
    bad: Tensor = torch.full((2, 2, 1, 16), float("nan"))
    cache.reset()
    with pytest.raises(ValueError, match="layer 0, keys.*not finite"):
        cache.update(bad, bad, 0)
    with pytest.raises(ValueError, match=r"(?s)keys of another batch.*expected: 2.*found: 1"):
        cache.update(bad[:1], bad[:1], 0)


@pytest.mark.parametrize("kv", ["i8", "i4"])
def test_memory_made_in_inference_mode_is_written_to_without_it(kv: str) -> None:
    model, tokens = small(), ids(50)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, kv, max_length=64), (40, 5))
    with torch.inference_mode():
        cache = qfx.QuantizedCache(model.config, kv, max_length=64)
        logits(model, tokens[:, :45], cache, (40,))
    assert torch.equal(logits(model, tokens[:, 45:], cache), expected[:, 45:])
