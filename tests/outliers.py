"""Activation outliers as large models have them, made exactly: the fp32 function stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scale_channels(producer: Sequence[Tensor], consumers: Sequence[Tensor], channels: Tensor, factor: float) -> None:
    """Multiply rows `channels` of each producer (weights [N, K], vectors [N]) and divide columns of each consumer."""
    with torch.no_grad():
        for tensor in producer:
            tensor[channels] *= factor
        for weight in consumers:
            weight[:, channels] /= factor


def value_outliers(bert: Any, factor: float = 100.0, count: int = 8, seed: int = 0) -> None:
    """In every layer of a BERT: `count` value channels `factor` times as large, undone by the output projection."""
    generator = torch.Generator().manual_seed(seed)
    for layer in bert.encoder.layer:
        value, output = layer.attention.self.value, layer.attention.output.dense
        channels = torch.randperm(value.out_features, generator=generator)[:count]
        scale_channels([value.weight, value.bias], [output.weight], channels, factor)


def norm_outliers(llama: Any, factor: float = 100.0, count: int = 8, seed: int = 0) -> None:
    """At every norm of a Llama: `count` channels `factor` times as large, undone by the linears that read the norm."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randperm(llama.config.hidden_size, generator=generator)[:count]
    model = llama.model
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        scale_channels([layer.input_layernorm.weight], readers, channels, factor)
        scale_channels(
            [layer.post_attention_layernorm.weight], [mlp.gate_proj.weight, mlp.up_proj.weight], channels, factor
        )  # fmt: skip
    scale_channels([model.norm.weight], [llama.lm_head.weight], channels, factor)


def key_outliers(llama: Any, factor: float = 30.0, channel: int = 3) -> None:
    """In every attention of a Llama: a RoPE pair of each key head `factor` times as large, undone by its queries."""
    config = llama.config
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    pair = torch.tensor([channel, channel + size // 2])
    keys = (torch.arange(config.num_key_value_heads)[:, None] * size + pair).flatten()
    queries = (torch.arange(config.num_attention_heads)[:, None] * size + pair).flatten()
    assert len(queries) == group * len(keys)
    for layer in llama.model.layers:
        scale_channels([layer.self_attn.k_proj.weight], [], keys, factor)
        scale_channels([layer.self_attn.q_proj.weight], [], queries, 1 / factor)
