"""Very small models of transformers, one layer each, for tests of files and of loading."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo import randomize

VOCAB = 64
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config(kind: str) -> Any:
    """A config of `llama`, `tied` (a llama with one table), `bert` or `t5`."""
    if kind in ("llama", "tied"):
        return tf.LlamaConfig(**_SIZES, num_key_value_heads=1, tie_word_embeddings=kind == "tied")
    if kind == "bert":
        return tf.BertConfig(**{k: v for k, v in _SIZES.items() if k not in ("bos_token_id", "eos_token_id")})
    assert kind == "t5", kind
    return tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip


CLASSES = {
    "llama": tf.LlamaForCausalLM, "tied": tf.LlamaForCausalLM, "bert": tf.BertForMaskedLM,
    "t5": tf.T5ForConditionalGeneration,
}  # fmt: skip


def build(kind: str, seed: int = 0) -> Any:
    """The float model, with seeded weights, in eval mode."""
    model = CLASSES[kind](config(kind)).eval()
    randomize(model, seed)
    return model


def ids() -> Tensor:
    """Token ids [2, 6]."""
    return torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits (the last hidden state of a base model) on `ids`."""
    inputs = {"input_ids": ids()}
    if model.config.model_type == "t5":
        inputs["decoder_input_ids"] = ids()[:, :4]
    out = model(**inputs)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found
