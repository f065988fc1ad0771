"""What the fused kernel of nn.TransformerEncoderLayer computes, spelled out, so that its weights can be packed.

Without gradients the module calls `aten._transformer_encoder_layer_fwd`, which reads all of its weights at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = {torch._transformer_encoder_layer_fwd, torch.ops.aten._transformer_encoder_layer_fwd.default}


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """src [B, L, E] -> [B, L, E]. mask: not zero is not attended to: [B, L] for mask_type 1, else [.., L, L]."""

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(x: Tensor) -> Tensor:
        parts = F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts)
        shown = None if mask is None else mask.to(torch.bool).logical_not()
        shown = shown[:, None, None] if shown is not None and mask_type == 1 else shown
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=shown)
        return F.linear(y.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed_forward(x: Tensor) -> Tensor:
        h = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(h) if use_gelu else F.relu(h), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(first(src))
        return src + feed_forward(second(src))
    src = first(src + attention(src))
    return second(src + feed_forward(src))
