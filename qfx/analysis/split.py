"""Attention as a cache makes it, one token at a time: stored tokens from their codes, the first and the newest as they
came.

    softmax(q [k' k]^T + [far near]) [v' v]        k', v': what the cache gives back

Query i reads key j from the codes where far[i, j] is 0 and near[i, j] is -inf, else the other way round. All queries
are computed together, over keys and values of twice the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qfx.kv.formats import CacheFormat

_NAMES = {"q": "query", "k": "key", "v": "value", "mask": "attn_mask", "causal": "is_causal"}


def is_stored(fmt: CacheFormat, tokens: int, device: torch.device) -> Tensor:
    """bool [T, T]: whether query i reads key j from the codes, where each token came alone."""
    key = torch.arange(tokens, device=device)
    end = torch.tensor([fmt.sinks + fmt.stored(before) for before in range(tokens)], device=device)
    return (key >= fmt.sinks) & (key < end[:, None])


def split(given: Mapping[str, Any], far: tuple[Tensor, Tensor], fmt: CacheFormat) -> dict[str, Any] | None:
    """Arguments by name of an attention over its own tokens that reads `far` keys and values [B, G, T, D] where the
    cache of this format does; None for one over other tokens.

    given: arguments by name of aten.scaled_dot_product_attention, or of qfx.attention.
    """
    names = _NAMES if "query" in given else {name: name for name in _NAMES}
    q, k, v = (given[names[role]] for role in "qkv")
    tokens = k.shape[-2]
    if q.shape[-2] != tokens:
        return None
    stored, mask = is_stored(fmt, tokens, k.device), given.get(names["mask"])
    if given.get(names["causal"]):
        before = torch.ones(tokens, tokens, dtype=torch.bool, device=k.device).tril()
        mask = before if mask is None else mask & before if mask.dtype == torch.bool else _hidden(mask, before)
    elif mask is None:
        mask = torch.ones_like(stored)
    parts = [_only(mask, stored), _only(mask, ~stored)]
    return {
        **given, names["mask"]: torch.cat(parts, -1), names["causal"]: False,
        names["k"]: torch.cat([far[0], k], -2), names["v"]: torch.cat([far[1], v], -2),
    }  # fmt: skip


def _only(mask: Tensor, kept: Tensor) -> Tensor:
    return mask & kept if mask.dtype == torch.bool else _hidden(mask, kept)


def _hidden(mask: Tensor, kept: Tensor) -> Tensor:
    return mask.masked_fill(~kept, -torch.inf)
