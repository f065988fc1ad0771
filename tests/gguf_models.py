"""Small random models of the architectures that GGUF files hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="the models are transformers models: pip install qfx[hf]")
ROPE3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 80,
    "max_position_embeddings": 128,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "llama tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 rope": ("Llama", {"rope_parameters": ROPE3, "head_dim": 32}),
    "linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "yarn": ("Llama", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
}  # fmt: skip


def random_model(kind: str, **more: Any) -> Any:
    """A model of random weights, norms and biases."""
    name, options = KINDS[kind]
    torch.manual_seed(3)
    made = getattr(transformers, f"{name}Config")(**{**SIZES, **options, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(made).eval()
    return randomized(model)


def randomized(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (0 if name.endswith("bias") else 1))
    return model


def ids() -> Tensor:
    return torch.arange(24).reshape(2, 12) * 3 % 80


@torch.no_grad()
def run(model: Any) -> Tensor:
    out = model(input_ids=ids())
    found: Tensor = out.logits if hasattr(out, "logits") else out.last_hidden_state
    return found
