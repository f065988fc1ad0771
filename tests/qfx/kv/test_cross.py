from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as tf

import qfx
from qfx.kv.cache import QuantizedCache
from qfx.kv.cross import CrossLayer, cross_cache
from qfx.kv.states import PackedStates
from tests import tiny
from tests.zoo import randomize


def bart() -> Any:
    sizes = {f"{side}_{name}": count for side in ("encoder", "decoder") for name, count in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    made = tf.BartForConditionalGeneration(
        tf.BartConfig(vocab_size=tiny.VOCAB, d_model=32, forced_eos_token_id=None, **sizes, **special)
    )
    randomize(made, 0)
    return made.eval()


def generated(model: Any) -> Any:
    return model.generate(tiny.ids(), max_new_tokens=8, do_sample=False, return_dict_in_generate=True)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_both_caches_of_an_encoder_decoder_are_quantized(kind: str) -> None:
    def build() -> Any:
        return bart() if kind == "bart" else tiny.build("t5")

    wanted = generated(build())
    model = qfx.quantize(build(), "kv8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", qfx.QfxWarning)  # nothing is dequantized as a whole
        found = generated(model)
    caches = found.past_key_values
    assert isinstance(caches.self_attention_cache, QuantizedCache)
    assert isinstance(caches.cross_attention_cache, QuantizedCache)
    assert caches.cross_attention_cache.get_seq_length() == tiny.ids().shape[1]
    first = [torch.stack(one.scores) if one.scores else one.sequences for one in (found, wanted)]
    assert (first[0] == first[1]).float().mean() >= 0.9


def test_a_compiler_leaves_its_states_to_the_codes(fresh_dynamo: None) -> None:
    layer = generated(qfx.quantize(bart(), "kv8")).past_key_values.cross_attention_cache.layers[0]
    queries = torch.randn(2, 2, 3, 16)

    def attention(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, layer.keys, layer.values)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Dynamo's, that it cannot trace how they are made
        found = torch.compile(attention, backend="eager")(queries)
    assert torch.equal(found, attention(queries))


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "itself"}], ids=str)
def test_assisted_decoding_crops_it(how: dict[str, Any]) -> None:
    model: Any = qfx.quantize(bart(), "kv8")
    how = {name: bart() if value == "itself" else value for name, value in how.items()}
    given = {"input_ids": tiny.ids()[:1], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**given, **how), bart().generate(**given, **how))


def test_both_caches_repeat_and_select_sequences() -> None:
    cache = generated(qfx.quantize(bart(), "kv8")).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    for one in (cache.self_attention_cache, cache.cross_attention_cache):
        assert one.layers[0].keys.shape[0] == 2


def test_rules_may_leave_cross_attention_out() -> None:
    recipe = {"rules": [{"target": "cache:*SelfAttention", "k": "i8", "v": "i8"}]}
    found = generated(qfx.quantize(tiny.build("t5"), recipe)).past_key_values
    assert isinstance(found.self_attention_cache, QuantizedCache)
    assert isinstance(found.cross_attention_cache, tf.DynamicCache)


def test_what_is_read_as_an_attribute_stays_in_its_codes() -> None:
    cache = cross_cache(bart().config, ["i8", "i8"])
    layer = cache.layers[1]
    assert isinstance(layer, CrossLayer) and layer.keys is None and layer.values is None
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 2, 7, 16, generator=random) for _ in range(2))
    cache.update(keys, values, 1)
    assert isinstance(layer.keys, PackedStates) and layer.values is not None and layer.values.shape == values.shape
    query = torch.randn(2, 2, 3, 16, generator=random)
    attend = torch.nn.functional.scaled_dot_product_attention
    found = attend(query, layer.keys, layer.values)
    assert (found - attend(query, keys, values)).abs().max() < 0.05
    cache.reorder_cache(torch.tensor([1, 0]))
    assert layer.keys is not None
    assert torch.allclose(attend(query.flip(0), layer.keys, layer.values), found.flip(0), atol=1e-5)
