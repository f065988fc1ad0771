"""Packed caches of fixed length: they read as the growing ones, and one compiled graph serves every step."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import qfx
from qfx.kv.packed_ops import FEW
from qfx.kv.static import StaticQuantizedLayer
from qfx.kv.static_packed import PackedStaticLayer
from tests.qfx.kv.test_cache import drift, ids, logits, small

tf = pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")
KINDS: tuple[Any, ...] = (
    "i4", "i3", {"k": "i4", "v": "i2"}, {"k": ["i8", "i3"], "v": ["i3", "i4"], "residual": 5, "sinks": 0},
    {"k": "i8/g32/f16", "v": "nf4/g8"},
)  # fmt: skip
SIZES = (50, 3, *(1,) * 36)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def fixed(model: Any, kv: Any = "i4", length: int = 96) -> Any:
    return qfx.QuantizedCache(model.config, kv, max_length=length)


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_it_reads_as_the_growing_cache(kv: Any) -> None:
    model, tokens = small(), ids(90)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, kv), SIZES)
    cache = fixed(model, kv)
    assert torch.equal(logits(model, tokens[:, :50], cache), expected[:, :50])
    kept = [t.data_ptr() for t in cache.layers[0].tensors()]
    assert torch.equal(logits(model, tokens[:, 50:], cache, (3, *(1,) * 36)), expected[:, 50:])
    assert [t.data_ptr() for t in cache.layers[0].tensors()] == kept
    assert int(cache.get_seq_length()) == 90 and cache.get_max_length() == 96 and cache.is_compileable
    cache.reset()
    assert torch.equal(logits(model, tokens, cache, SIZES), expected)


@pytest.mark.parametrize("sizes", [(3, 1, 60, 7), (FEW, FEW, FEW - 6), (FEW + 1, 2), (1,) * 12], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_split_of_the_tokens(sizes: tuple[int, ...], attention: str) -> None:
    model, tokens = small(attn_implementation=attention), ids(sum(sizes) + 1)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, "i4"), sizes)
    assert drift(logits(model, tokens, fixed(model), sizes), expected) < 1e-5


@pytest.mark.parametrize(
    ("backend", "kv"),
    [
        ("aot_eager", "i4"),
        *(pytest.param("aot_eager", kv, marks=pytest.mark.slow, id=str(kv)) for kv in KINDS[1:]),
        pytest.param("inductor", "i4", marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_every_step(backend: str, kv: Any) -> None:
    model, tokens = small(), ids(90)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, kv), SIZES)
    cache = fixed(model, kv)
    found = [logits(model, tokens[:, :53], cache, (50,))]
    counter = CompileCounterWithBackend(backend)
    step = torch.compile(model, backend=counter, fullgraph=True)
    found += [logits(step, tokens[:, at : at + 1], cache) for at in range(53, 90)]
    assert drift(torch.cat(found, 1), expected) < 1e-5
    assert counter.frame_count == 1
    calls = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op == "call_function"]
    for name in ("cache_append", "cache_attention"):
        assert sum(name in call for call in calls) == 2, "one for each layer"
    assert not any("cache_read" in call for call in calls), "no float copy of the history"


def test_generate_writes_the_text_of_the_growing_cache() -> None:
    model, prompt = small(), ids(20)
    prompt[0, :6] = 0
    how = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 40, "do_sample": False}
    caches = (qfx.QuantizedCache(model.config, "i4"), fixed(model))
    outs = [model.generate(prompt, past_key_values=cache, **how) for cache in caches]
    assert torch.equal(*outs) and outs[0].shape[1] == 60


@pytest.mark.parametrize("gone", [1, 20])
def test_cropped_tokens_leave_no_trace(gone: int) -> None:
    model, tokens, found = small(), ids(70), []
    for cropped in (True, False):
        cache = fixed(model)
        logits(model, tokens[:, : 60 if cropped else 60 - gone], cache, (40,) if cropped or gone < 20 else ())
        if cropped:
            cache.crop(-gone)
        found.append(logits(model, tokens[:, 60 - gone :], cache, (1,) * (gone + 9)))
    assert torch.equal(*found)


def test_tokens_of_a_cut_group_stay_as_they_come_back() -> None:
    model, tokens = small(), ids(80)
    cache = fixed(model)
    logits(model, tokens, cache, (70, *(1,) * 9))
    before = cache.layers[0].read(0)[:, :, :30].clone()
    cache.crop(-50)
    assert torch.equal(cache.layers[0].read(0)[:, :, :30], before) and int(cache.layers[0].memory[0]) == 0
    expected = logits(model, tokens, tf.DynamicCache(config=model.config))[:, 30:]
    assert drift(logits(model, tokens[:, 30:], cache, (1,) * 49), expected) < 0.15


def test_sequences_change_places() -> None:
    model, tokens = small(), ids(70)
    cache = fixed(model)
    logits(model, tokens[:, :60], cache, (50,))
    cache.reorder_cache(torch.tensor([1, 0]))
    found = logits(model, tokens[:, 60:].flip(0), cache, (1,) * 9).flip(0)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, "i4"), (50, 10, *(1,) * 9))
    assert drift(found, expected[:, 60:]) < 1e-5


def test_memory_is_that_of_the_format() -> None:
    model = small()
    cache = fixed(model, length=2048)
    logits(model, ids(40), cache)
    fmt = cache.formats[0]
    exact = 2 * fmt.nbytes(2, 16, 2048, batch=2, dtype=torch.float32)
    assert exact <= cache.nbytes() <= exact + 2 * 2 * 2 * 2 * 16 * 4 * (fmt.step + FEW) + 2 * 64


OTHERS: dict[str, Callable[[Any, Any, Tensor], Any]] = {
    "add": lambda k, v, q: k + 1,
    "softmax": lambda k, v, q: torch.softmax(v, -1),
    "einsum": lambda k, v, q: torch.einsum("bhsd,bhld->bhsl", q, k),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_are_refused(name: str) -> None:
    model = small()
    cache = fixed(model)
    keys, values = cache.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), 0)
    assert keys.shape == (2, 2, 96, 16), "by its looks"
    assert cache.layers[0].blank[0].untyped_storage().nbytes() == 4, "a handle holds nothing"
    with pytest.raises(qfx.UnsupportedError, match=r"(?s)cannot read a quantized cache of fixed length.*sdpa"):
        OTHERS[name](keys, values, torch.ones(2, 2, 1, 16))


def test_bad_input() -> None:
    model = small()
    cache = fixed(model, length=20)
    with pytest.raises(ValueError, match=r"(?s)layer 0 is full.*at most 20 tokens.*found: 21"):
        logits(model, ids(21), cache, (20,))
    bad: Tensor = torch.full((2, 2, 1, 16), float("nan"))
    cache.reset()
    with pytest.raises(ValueError, match="layer 0, keys.*not finite"):
        cache.update(bad, bad, 0)
    with pytest.raises(ValueError, match=r"(?s)formats for other heads.*2 heads.*found: 3"):
        logits(model, ids(5), fixed(model, {"k": ["i4"] * 3, "v": "i4"}), (5,))
    with pytest.raises(ValueError, match=r"(?s)crop\(-31\).*at most the 0"):
        cache.crop(-31)


def test_copies_read_their_own_memory() -> None:
    model, tokens = small(), ids(60)
    cache = fixed(model)
    logits(model, tokens[:, :50], cache, (40,))
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = logits(model, tokens[:, 50:], copy.deepcopy(cache), (1,) * 9)
    cache.reset()
    logits(model, ids(70, seed=5), cache, (40, *(1,) * 29))
    assert all(torch.equal(logits(model, tokens[:, 50:], other, (1,) * 9), expected) for other in copies)


def test_more_tokens_than_there_is_memory_for_raise_inside_of_a_graph() -> None:
    model, tokens = small(), ids(20)
    cache = fixed(model, length=18)
    step: Any = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    logits(model, tokens[:, :17], cache)
    with torch.no_grad():
        step(tokens[:, 17:18], past_key_values=cache)
        with pytest.raises(ValueError, match=r"(?s)is full.*at most 18 tokens.*found: 19"):
            step(tokens[:, 18:19], past_key_values=cache)


@pytest.mark.parametrize("kv", ["i8", "fp8"])
def test_caches_of_8_bits_are_packed_where_kernels_read_codes(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small(), ids(60)
    expected = logits(model, tokens, fixed(model, kv), (50, 3, 1, 1))
    monkeypatch.setattr("qfx.kv.cache._reads_codes", lambda _: True)
    cache = fixed(model, kv)
    assert drift(logits(model, tokens, cache, (50, 3, 1, 1)), expected) < 1e-5
    assert all(type(layer) is PackedStaticLayer for layer in cache.layers)
    plain = fixed(model, kv)
    monkeypatch.undo()
    logits(model, tokens, plain, (50, 3, 1, 1))
    assert all(type(layer) is StaticQuantizedLayer for layer in plain.layers)
