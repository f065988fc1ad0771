"""An exported decoder under transformers' `generate()`: one graph, one memory for the cache, no copies per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from qfx.backends.onnx.genai import read_config
from qfx.backends.onnx.runner import Runner
from qfx.decoding.decoder import IDS, MASK, POSITIONS
from qfx.decoding.generator import Generator
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import explain


class OnnxCausalLM(Generator):
    """A decoder's folder. `generate()` is that of transformers; calling it takes and gives what its models do."""

    input_modalities = ("text",)

    def __init__(
        self, folder: Path, *, threads: int | None = None, session_options: Mapping[str, str] | None = None
    ) -> None:
        file = folder / read_config(folder)["model"]["decoder"]["filename"]
        self._open(folder, AutoConfig.from_pretrained(folder), Runner(file, threads, session_options))
        self.generation_config.use_cache = True  # whatever the configuration says (MPT's: no): the file has one

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: SharedCache | None = None, use_cache: bool | None = None, **_: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits [B, 1 or S, V] for new tokens [B, S], and the grown cache unless use_cache is False.

        attention_mask [B, P + S] (all ones where left out), position_ids [B, S] (counted along the mask).
        """
        cache = self._new_cache() if past_key_values is None else past_key_values
        batch, new = input_ids.shape
        total = cache.length + new
        mask = torch.ones(batch, total, dtype=torch.int64) if attention_mask is None else attention_mask.long()
        if mask.shape != (batch, total):
            raise ValueError(
                explain(
                    "the attention mask does not fit",
                    expected=f"[{batch}, {total}]: cached and new tokens",
                    found=str(list(mask.shape)),
                )
            )
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:] if position_ids is None else position_ids
        places = places.expand(batch, -1)
        if batch > 1 and new > 1 and cache.length:  # GroupQueryAttention takes one token of each there
            steps = [
                self._step(input_ids[:, [i]], mask[:, : total - new + i + 1], places[:, [i]], cache) for i in range(new)
            ]
            return CausalLMOutputWithPast(logits=torch.cat(steps, 1), past_key_values=cache)
        logits = self._step(input_ids, mask, places, cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)

    forward = __call__

    def _step(self, ids: Tensor, mask: Tensor, places: Tensor, cache: SharedCache) -> Tensor:
        feeds = {IDS: ids, MASK: mask}
        if POSITIONS in self._runner.inputs:
            feeds[POSITIONS] = places
        return self._run(feeds, cache, *mask.shape)
