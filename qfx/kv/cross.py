"""The cache of cross-attention: filled once with what an encoder gave, read by every token after that; and both caches
of an encoder-decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from qfx.kv.cache import QuantizedCache
from qfx.kv.layers import QuantizedLayer
from qfx.kv.states import packed


class CrossLayer(QuantizedLayer):
    """A layer whose keys and values a model reads as attributes: they stay in their codes, too (`qfx.kv.states`)."""

    @property
    def keys(self) -> Tensor | None:
        """Keys [B, G, L, D] that attention reads from the codes."""
        return None if self.store is None else packed(self.store.view())[0]

    @property
    def values(self) -> Tensor | None:
        """Values [B, G, L, Dv] that attention reads from the codes."""
        return None if self.store is None else packed(self.store.view())[1]


class BothCaches(EncoderDecoderCache):  # type: ignore[misc]
    """The caches of self-attention and of cross-attention."""

    def check_dynamic_cache(self, method: str) -> None:
        """Both can do what transformers' dynamic ones can: lose tokens (assisted decoding), repeat and select."""


def cross_cache(config: Any, formats: list[Any]) -> QuantizedCache:
    """An empty cache for the cross-attention of a decoder with this config, in one format for each layer."""
    made = QuantizedCache(config, formats)
    for layer in made.layers:
        if isinstance(layer, QuantizedLayer):
            layer.__class__ = CrossLayer  # the same memory, read otherwise
    return made
