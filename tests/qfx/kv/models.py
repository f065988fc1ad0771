"""Small decoders of two layers with two KV heads, one of them with windows."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor

from tests.zoo import randomize

VOCAB, LAYERS, HEADS, WIDTH = 64, 2, 2, 32
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": HEADS, "head_dim": WIDTH, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "max_position_embeddings": 256,
}  # fmt: skip
NAMES = tuple(f"model.layers.{i}.self_attn" for i in range(LAYERS))


def build(kind: str = "llama", seed: int = 0) -> Any:
    """A float model with seeded weights in eval mode: `llama`, `gemma2` (every other layer has a window of 16)."""
    made: Any
    if kind == "llama":
        made = tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES))
    else:
        assert kind == "gemma2", kind
        made = tf.Gemma2ForCausalLM(tf.Gemma2Config(**_SIZES, sliding_window=16))
    randomize(made, seed)
    return made.eval()


def ids(tokens: int = 40, rows: int = 2, seed: int = 1) -> Tensor:
    """Token ids [rows, tokens]."""
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, tokens: int = 8, **how: Any) -> Any:
    """What greedy generation gives, with its cache."""
    prompt = ids()
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
        return_dict_in_generate=True, **how,
    )  # fmt: skip
