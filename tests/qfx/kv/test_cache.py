"""`qfx.QuantizedCache` under unmodified models of transformers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.errors import QfxWarning
from qfx.kv.judge import judge
from tests.zoo import randomize

tf = pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")
KINDS: tuple[Any, ...] = ("i8", "i4", {"k": "u4/g8/f16", "v": "u4/g8/f16", "residual": 0, "sinks": 1})


def small(kind: str = "llama", **more: Any) -> Any:
    """A decoder of two layers, 4 heads of queries and 2 of keys, with seeded weights."""
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None, "attn_implementation": "sdpa", **more,
    }  # fmt: skip
    config = {"llama": tf.LlamaConfig, "mistral": tf.MistralConfig, "gemma3": tf.Gemma3TextConfig}[kind](**sizes)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=sizes["attn_implementation"]).eval()
    randomize(model, 0)
    return model


def latent(attention: str = "sdpa") -> Any:
    """A decoder of two layers with multi-head latent attention (DeepSeek-V3)."""
    config = tf.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=24, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    randomize(model, 0)
    return model


def ids(length: int = 40, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, tokens: Tensor, cache: Any, sizes: tuple[int, ...] = (), **how: Any) -> Tensor:
    """Of all tokens, in calls of `sizes` tokens, then of what is left."""
    found, at = [], 0
    for n in (*sizes, tokens.shape[1] - sum(sizes)):
        found.append(model(input_ids=tokens[:, at : at + n], past_key_values=cache, **how).logits)
        at += n
    return torch.cat(found, 1)


def drift(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kv", "most"), [("f32", 1e-5), ("i8", 0.02), ("fp8", 0.08), ("i4", 0.15)])
def test_logits_are_near_those_of_float(attention: str, kv: str, most: float) -> None:
    model, tokens = small(attn_implementation=attention), ids(80)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), (64, 3, 1, 1))
    found = logits(model, tokens, qfx.QuantizedCache(model.config, kv), (64, 3, 1, 1))
    assert torch.allclose(found[:, :64], expected[:, :64], atol=1e-5), "a prompt is read in float"
    assert (0 if kv == "f32" else 1e-6) <= drift(found[:, 64:], expected[:, 64:]) <= most


@pytest.mark.parametrize(("width", "heads"), [(80, 2), (96, 4), (72, 1)])
@pytest.mark.parametrize(("kv", "most"), [("f32", 1e-5), ("i8", 0.02), ("fp8", 0.08), ("i4", 0.15)])
def test_heads_that_groups_do_not_divide(width: int, heads: int, kv: str, most: float) -> None:
    """Groups of 32 channels in heads of 80 and 72; a single head of keys for all queries."""
    model, tokens = small(head_dim=width, num_key_value_heads=heads), ids(80)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), (64, 3, 1, 1))
    found = logits(model, tokens, qfx.QuantizedCache(model.config, kv), (64, 3, 1, 1))
    assert (0 if kv == "f32" else 1e-6) <= drift(found[:, 64:], expected[:, 64:]) <= most


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keys_and_values_of_other_widths(attention: str) -> None:
    """Multi-head latent attention: one head of 16 and of 8 channels is cached for all, which a linear then reads."""
    model = latent(attention)
    expected = logits(model, ids(60), tf.DynamicCache(config=model.config), (40, 7, 1, 1))
    cache = qfx.QuantizedCache(model.config, {"k": "u4/g8/f16", "v": "i8", "residual": 4})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = logits(model, ids(60), cache, (40, 7, 1, 1))
    assert any("'linear' does not read a quantized cache" in str(one.message) for one in said)
    assert [cache.layers[0].keys.shape[-1], cache.layers[0].values.shape[-1]] == [16, 8]
    assert 1e-6 < drift(found[:, 40:], expected[:, 40:]) < 0.15


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_sdpa_and_eager_agree(kv: Any) -> None:
    found = [
        logits(small(attn_implementation=a), ids(60), qfx.QuantizedCache(small().config, kv), (40, 7, 1, 1))
        for a in ("sdpa", "eager")
    ]
    assert drift(*found) < 1e-5


@pytest.mark.parametrize(
    "how", [{}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "early_stopping": True}], ids=str
)
def test_generate(how: dict[str, Any]) -> None:
    model = small()
    found = []
    for cache in (tf.DynamicCache(config=model.config), qfx.QuantizedCache(model.config, "f32")):
        torch.manual_seed(0)
        found.append(model.generate(ids(20), past_key_values=cache, max_new_tokens=24, **{"do_sample": False, **how}))
    assert torch.equal(*found)
    cache = qfx.QuantizedCache(model.config, "i8")
    out = model.generate(ids(20), past_key_values=cache, max_new_tokens=24, **{"do_sample": False, **how})
    assert out.shape == found[0].shape and cache.get_seq_length() == out.shape[1] - 1


def test_left_padding_changes_nothing() -> None:
    model, kv = small(), "i8"
    short, long = ids(21, 1), ids(40, 1, seed=1)
    padded = torch.cat([torch.cat([torch.zeros(1, 19, dtype=torch.long), short], 1), long])
    mask = (padded != 0).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    both, alone = qfx.QuantizedCache(model.config, kv), qfx.QuantizedCache(model.config, kv)
    with torch.no_grad():
        model(input_ids=padded, attention_mask=mask, position_ids=places, past_key_values=both)
        model(input_ids=short, past_key_values=alone)
        for n in range(30):
            new = ids(1, 1, seed=n)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            a = model(input_ids=new.expand(2, 1), attention_mask=mask, position_ids=mask.sum(1)[:, None] - 1,
                      past_key_values=both).logits[:1]  # fmt: skip
            b = model(input_ids=new, past_key_values=alone).logits
            assert drift(a, b) < 2e-4, n


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_sequences_selected_reordered_and_repeated(kv: Any) -> None:
    model, tokens = small(), ids(50, 3)
    order = torch.tensor([2, 0, 0])
    cache, other = qfx.QuantizedCache(model.config, kv), qfx.QuantizedCache(model.config, kv)
    logits(model, tokens, cache, (40,))
    logits(model, tokens[order], other, (40,))
    cache.reorder_cache(order)
    assert drift(logits(model, ids(3, 3), cache), logits(model, ids(3, 3), other)) < 1e-5
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    found = logits(model, ids(2, 1).expand(3, 2), cache)
    assert drift(found[0], found[2]) == 0


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_crop_and_go_on(kv: Any) -> None:
    model, tokens = small(), ids(60)
    cache = qfx.QuantizedCache(model.config, kv)
    logits(model, tokens, cache, (50,))
    before = cache.layers[1].values
    cache.crop(-13)
    assert cache.get_seq_length() == 47 and torch.equal(cache.layers[1].values, before[:, :, :47])
    assert cache.get_mask_sizes(3, 0) == (50, 0)
    again = logits(model, tokens[:, 47:], cache)
    assert drift(again, logits(model, tokens, tf.DynamicCache(config=model.config))[:, 47:]) < 0.2
    cache.crop(0)
    assert cache.get_seq_length() == 60


def test_crop_refuses() -> None:
    model = small()
    cache = qfx.QuantizedCache(model.config, "i8")
    cache.crop(-3)
    logits(model, ids(9), cache)
    with pytest.raises(ValueError, match=r"(?s)crop\(4\).*expected: a negative number.*crop\(length - 9\)"):
        cache.crop(4)
    with pytest.raises(ValueError, match=r"(?s)cannot crop the cache of layer 0.*at most 9 tokens.*found: 10"):
        cache.crop(-10)
    assert not cache.is_croppable
    assert qfx.QuantizedCache(model.config, {"k": "i8", "v": "i8", "residual": 0}).is_croppable


def test_a_prompt_is_used_again() -> None:
    model, prompt = small(), ids(40, 1)
    first = qfx.QuantizedCache(model.config, "i4")
    logits(model, prompt, first)
    outs = []
    for seed in (1, 2, 1):
        cache = copy.deepcopy(first)
        outs.append(model.generate(torch.cat([prompt, ids(5, 1, seed)], 1), past_key_values=cache, max_new_tokens=12,
                                   do_sample=False))  # fmt: skip
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0][:, 45:], outs[1][:, 45:])
    assert first.get_seq_length() == 40


def test_reset() -> None:
    model = small()
    cache = qfx.QuantizedCache(model.config, "i4")
    expected = logits(model, ids(50), cache, (40, 1))
    assert cache.nbytes() > 0 and cache.get_max_length() == -1 and not cache.is_compileable and len(cache) == 2
    cache.reset()
    assert (cache.nbytes(), cache.get_seq_length(), cache.layers[0].keys) == (0, 0, None)
    assert torch.equal(logits(model, ids(50), cache, (40, 1)), expected)
    cache.reset()
    logits(model, ids(9, 5), cache)
    assert cache.batch_size == 5


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
@pytest.mark.parametrize("sizes", [(1,) * 50, (30, 1, 4, 9), (3, 40)], ids=["single", "mixed", "long"])
def test_windows(kind: str, sizes: tuple[int, ...]) -> None:
    more = {"sliding_window": 16} | ({"sliding_window_pattern": 2} if kind == "gemma3" else {})
    model, tokens = small(kind, **more), ids(60)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), sizes)
    cache = qfx.QuantizedCache(model.config, "f32")
    assert drift(logits(model, tokens, cache, sizes), expected) < 1e-5
    assert drift(logits(model, tokens, qfx.QuantizedCache(model.config, "i8"), sizes), expected) < 0.05
    assert drift(logits(model, tokens, qfx.QuantizedCache(model.config, "i4"), sizes), expected) < 0.3
    assert cache.is_sliding[0] and cache.layers[0].get_max_length() == 16


def test_memory_of_a_window_is_bounded() -> None:
    model = small("mistral", sliding_window=16)
    cache = qfx.QuantizedCache(model.config, "i8")
    logits(model, ids(1200), cache, (200,) * 5)
    full = qfx.QuantizedCache(small().config, "i8")
    logits(small(), ids(1200), full, (200,) * 5)
    assert cache.nbytes() < 0.7 * full.nbytes() and cache.get_seq_length() == 1200


def test_a_window_is_cropped_where_its_past_was_recorded() -> None:
    model, tokens = small("mistral", sliding_window=16), ids(60)
    cache = qfx.QuantizedCache(model.config, "f32")
    logits(model, tokens[:, :40], cache)
    with pytest.raises(ValueError, match=r"(?s)cannot crop.*its window of 16.*activate_past_recording"):
        cache.crop(-2)
    cache.activate_past_recording()
    logits(model, tokens[:, 40:48], cache, (3,))
    cache.crop(-5)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), (40, 3))
    assert drift(logits(model, tokens[:, 43:], cache), expected[:, 43:]) < 1e-5


def test_heads_have_formats_of_their_own() -> None:
    model, tokens = small(), ids(60)
    layers = [{"k": ["i8", "i4"], "v": ["u2/g16/f16", "i8"]}, {"k": "i8", "v": ["i4", "f32"]}]
    cache = qfx.QuantizedCache(model.config, layers)
    found = logits(model, tokens, cache, (40, 3))
    assert drift(found, logits(model, tokens, tf.DynamicCache(config=model.config), (40, 3))) < 0.3
    with pytest.raises(ValueError, match=r"(?s)layer 0 has formats for other heads.*2 heads.*found: 3"):
        logits(model, tokens, qfx.QuantizedCache(model.config, {"k": ["i8"] * 3, "v": "i8"}))
    with pytest.raises(ValueError, match=r"(?s)expected: 2, one for each layer.*found: 3"):
        qfx.QuantizedCache(model.config, ["i8"] * 3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [None, 64])
def test_heads_that_the_config_does_not_tell(length: int | None, attention: str) -> None:
    """Falcon 7B has one head of keys, which num_kv_heads denies, and attends to it without repeating it."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.AutoModelForCausalLM.from_config(tf.FalconConfig(**sizes), attn_implementation=attention).eval()
    assert model.config.num_kv_heads == 4
    randomize(model, 0)
    tokens, float_cache = ids(40), tf.DynamicCache(config=model.config)
    found = logits(model, tokens, qfx.QuantizedCache(model.config, "f32", max_length=length), (20, 1))
    assert drift(found, logits(model, tokens, float_cache, (20, 1))) < 1e-5


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_layers_move_and_come_back(kv: Any) -> None:
    """What `offloading` does with each layer; what was handed out before stays readable."""
    model, tokens = small(), ids(60)
    cache, other = qfx.QuantizedCache(model.config, kv), qfx.QuantizedCache(model.config, kv)
    for one in (cache, other):
        logits(model, tokens, one, (50,))
    zeros = [torch.zeros(2, 2, 1, 16) for _ in "kv"]
    handed, *_ = (layer.update(*zeros)[0] for one in (cache, other) for layer in one.layers)
    before = torch.ones(2, 2, 1, 16) @ handed.transpose(2, 3)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(torch.ones(2, 2, 1, 16) @ handed.transpose(2, 3), before)
    assert torch.equal(logits(model, ids(3), cache), logits(model, ids(3), other))


def test_offloading_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"(?s)offloading moves.*a CUDA device.*no GPU.*leave offloading"):
            qfx.QuantizedCache(model.config, "i8", offloading=True)
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch, "Stream", object)
        with pytest.raises(ValueError, match=r"(?s)offloading moves.*a CUDA device.*keys on cpu.*leave offloading"):
            logits(model, ids(9), qfx.QuantizedCache(model.config, "i8", offloading=True))
    with pytest.raises(ValueError, match=r"(?s)max_length=30\) cannot be offloaded"):
        qfx.QuantizedCache(model.config, "i8", max_length=30, offloading=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is from a GPU")
def test_offloaded_layers_give_what_others_give() -> None:
    model = small().cuda()
    found = [
        model.generate(ids(40).cuda(), past_key_values=cache, max_new_tokens=24, do_sample=False)
        for cache in (qfx.QuantizedCache(model.config, "i8", offloading=off) for off in (False, True))
    ]
    assert torch.equal(*found)


def test_other_attention_gets_floats_and_a_warning() -> None:
    model = small(attn_implementation="sdpa")
    cache = qfx.QuantizedCache(model.config, "i8")
    logits(model, ids(40), cache)
    keys, _ = cache.update(torch.ones(2, 2, 1, 16), torch.ones(2, 2, 1, 16), 0)
    with pytest.warns(QfxWarning, match="'softmax' does not read a quantized cache"):
        assert torch.softmax(keys, -1).shape == (2, 2, 41, 16)


def test_another_model_is_refused() -> None:
    cache = qfx.QuantizedCache(small().config, "i8")
    with pytest.raises(ValueError, match=r"(?s)keys of layer 2 for a cache of 2 layers"):
        logits(small(num_hidden_layers=3), ids(), cache)
    with pytest.raises(ValueError, match=r"(?s)another number of heads.*layer 0.*expected: 2.*found: 4"):
        logits(small(num_key_value_heads=4), ids(), cache)
    cache.reset()
    logits(small(), ids(), cache)
    with pytest.raises(ValueError, match=r"(?s)keys of another dtype.*layer 0.*float32.*float16"):
        cache.update(*(torch.ones(2, 2, 1, 16, dtype=torch.float16),) * 2, 0)
    with pytest.raises(ValueError, match=r"(?s)keys of another batch.*expected: 2.*found: 3"):
        cache.update(*(torch.ones(3, 2, 1, 16),) * 2, 1)


def test_keys_that_are_not_finite_name_the_layer() -> None:
    model = small()
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 1, keys.*not finite"):
        logits(model, ids(), qfx.QuantizedCache(model.config, "i4"))


@pytest.mark.parametrize("kv", ["i8", "i4"])
def test_inference_mode_for_some_calls_alone(kv: str) -> None:
    model, tokens = small(), ids(60)
    expected = logits(model, tokens, qfx.QuantizedCache(model.config, kv), (40, 5, 5))
    cache = qfx.QuantizedCache(model.config, kv)
    with torch.inference_mode():
        found = [logits(model, tokens[:, :45], cache, (40,))]
        cache.reorder_cache(torch.tensor([0, 1]))
    found.append(logits(model, tokens[:, 45:], cache, (5,)))
    assert torch.equal(torch.cat(found, 1), expected)


def linear(kind: str = "qwen3_next") -> Any:
    """A decoder of two layers: linear attention (LFM2: a convolution), then attention."""
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if kind == "lfm2":
        config = tf.Lfm2Config(**sizes, layer_types=["conv", "full_attention"])
    else:
        config = tf.Qwen3NextConfig(
            **sizes, head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    randomize(model, 0)
    return model


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("length", [None, 64])
@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2"])
def test_layers_of_linear_attention_keep_their_states(kind: str, length: int | None, how: dict[str, Any]) -> None:
    model, asked = linear(kind), {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    caches = tf.DynamicCache(config=model.config), qfx.QuantizedCache(model.config, "f32", max_length=length)
    given = {"attention_mask": torch.ones(2, 20, dtype=torch.long), "return_dict_in_generate": True, **asked, **how}
    expected, found = (model.generate(ids(20), past_key_values=cache, **given) for cache in caches)
    assert torch.equal(found.sequences, expected.sequences)
    assert drift(torch.stack(found.logits), torch.stack(expected.logits)) < 1e-5


def test_only_attention_is_quantized_beside_linear_attention() -> None:
    model = linear()
    cache = qfx.QuantizedCache(model.config, {"k": "u8/g4/f16", "v": "i8", "residual": 0})
    expected = logits(model, ids(), tf.DynamicCache(config=model.config), (30, 1))
    assert 0 < drift(logits(model, ids(), cache, (30, 1)), expected) < 0.01
    states = cache.layers[0].conv_states[0].nbytes + cache.layers[0].recurrent_states[0].nbytes
    assert cache.nbytes() == cache.layers[1].nbytes + states and states > 0
    assert judge(model, ids(), qfx.QuantizedCache(model.config, "f32"), step=8).kld < 1e-6


def test_layers_with_other_states_are_refused() -> None:
    with pytest.raises(qfx.UnsupportedError, match=r"(?s)layer 0 is of kind 'hybrid'.*DynamicCache"):
        qfx.QuantizedCache(tf.FalconH1Config(num_hidden_layers=2))
    with pytest.raises(qfx.UnsupportedError, match=r"(?s)no layer of the model keeps keys and values.*DynamicCache"):
        qfx.QuantizedCache(tf.MambaConfig(num_hidden_layers=2))


def test_half_precision_models() -> None:
    model, tokens = small().to(torch.bfloat16), ids(60)
    expected = logits(model, tokens, tf.DynamicCache(config=model.config), (50, 3)).float()
    found = logits(model, tokens, qfx.QuantizedCache(model.config, "i8"), (50, 3))
    assert found.dtype == torch.bfloat16 and drift(found.float(), expected) < 0.05
