"""Calibration data that a language model writes itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import qfx
from qfx import generated_batches


def _llama(**changed: Any) -> LlamaForCausalLM:
    config = LlamaConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": None, **changed,
    })  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _ids(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


def test_batches_have_the_shapes_that_are_asked_for() -> None:
    made = generated_batches(_llama(), seq_len=9, batch_size=4, samples=10)
    assert [tuple(batch["input_ids"].shape) for batch in made] == [(4, 9), (4, 9), (2, 9)]
    ids = _ids(made)
    assert ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < 61
    assert len(torch.unique(ids, dim=0)) == 10, "each text is drawn on its own"


def test_each_text_begins_with_the_token_of_beginnings_and_none_ends() -> None:
    ids = _ids(generated_batches(_llama(), seq_len=40, samples=40))
    assert bool((ids[:, 0] == 1).all())
    assert not bool((ids == 2).any()), "an end would be drawn about once in 61 tokens"


def test_without_such_a_token_texts_begin_anywhere() -> None:
    ids = _ids(generated_batches(_llama(bos_token_id=None, eos_token_id=None), seq_len=2, samples=40))
    assert len(ids[:, 0].unique()) > 15


def test_one_token_needs_no_model_call() -> None:
    assert _ids(generated_batches(_llama(), seq_len=1, samples=3)).tolist() == [[1], [1], [1]]


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = _llama()
    first, again, other = (_ids(generated_batches(model, seq_len=8, samples=34, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:2], first[32:]), "texts that are written later are not those of the first turn"


def test_neither_the_model_nor_the_random_generator_changes() -> None:
    model = _llama(attention_dropout=0.5).train()
    before, state = model.generation_config.to_dict(), torch.get_rng_state()
    first, again = (_ids(generated_batches(model, seq_len=8, samples=4)) for _ in range(2))
    assert model.training and model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == before
    assert torch.equal(first, again), "without dropout"


def _entropy(ids: torch.Tensor) -> float:
    share = torch.bincount(ids.flatten(), minlength=61) / ids.numel()
    return float(-(share * (share + 1e-12).log()).sum())


def test_tokens_are_drawn_from_the_models_own_distribution() -> None:
    model = _llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        wanted = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
        wanted[2] = 0  # ends are not drawn
        wanted /= wanted.sum()
    drawn = _ids(generated_batches(model, seq_len=2, samples=4000, batch_size=4000))[:, 1]
    share = torch.bincount(drawn, minlength=61) / len(drawn)
    assert float((share - wanted).abs().max()) < 5 * 0.5 / math.sqrt(4000)
    cold, hot = (_ids(generated_batches(model, seq_len=8, samples=64, temperature=t)) for t in (0.2, 3.0))
    assert _entropy(cold[:, 1:]) < _entropy(hot[:, 1:]) - 0.5


def test_options_of_the_models_own_generation_are_left_aside() -> None:
    model = _llama()
    model.generation_config.update(top_k=1, temperature=0.01, repetition_penalty=9.0, do_sample=True)
    assert len(_ids(generated_batches(model, seq_len=2, samples=60))[:, 1].unique()) > 10


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_other_models_write_too(kind: str) -> None:
    torch.manual_seed(0)
    own = {"vocab_size": 40, "bos_token_id": 39, "eos_token_id": 39, "pad_token_id": 39}
    model = (
        GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2, **own))
        if kind == "gpt2"
        else MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, **own))
    )
    ids = _ids(generated_batches(model.eval(), seq_len=12, samples=3))
    assert ids.shape == (3, 12)
    assert not bool((ids[:, 1:] == ids[0, 0]).any()), (
        "where one token begins and ends, it stands at the beginning alone"
    )


def test_a_recipe_that_needs_data_takes_it() -> None:
    model = _llama()
    ids = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
        data = generated_batches(model, seq_len=16, samples=8)
        found = qfx.quantize(model, "w4a16-gptq", data=data)(ids).logits
    assert 10 < 10 * math.log10(float(wanted.square().mean() / (wanted - found).square().mean())) < 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "seq_len must be 1 or more, found 0"),
        ({"samples": 0}, "samples must be 1 or more, found 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more, found -1"),
        ({"temperature": 0.0}, "temperature must be above 0, found 0.0"),
        ({"temperature": float("nan")}, "temperature must be above 0, found nan"),
        ({"seq_len": 65}, "the model takes 64 tokens, found seq_len=65"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generated_batches(_llama(), **options)


def test_models_that_write_nothing_are_refused() -> None:
    bert = BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    for model in (bert, t5, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="does not write text of its own\n  expected: a language model"):
            generated_batches(model)


def test_a_model_that_computes_nan_is_refused() -> None:
    model = _llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="the model cannot write text: probability tensor"):
        generated_batches(model, seq_len=4, samples=2)


def test_weights_on_disk_are_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(_llama().config)
    with pytest.raises(ValueError, match="weights are on disk"):
        generated_batches(model, seq_len=4)
