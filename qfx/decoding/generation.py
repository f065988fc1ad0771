"""An exported decoder under transformers' `generate()`: one graph, one memory for the cache, no copies per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from qfx.backends.onnx.genai import read_config
from qfx.backends.onnx.runner import Runner
from qfx.decoding.decoder import IDS, MASK, POSITIONS
from qfx.decoding.generator import Generator, fitting_mask, refuse_unknown
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import explain
from qfx.storage.skeleton import config_of


class OnnxCausalLM(Generator):
    """A decoder's folder. `generate()` is that of transformers; calling it takes and gives what its models do."""

    input_modalities = ("text",)

    def __init__(
        self, folder: Path, *, threads: int | None = None, session_options: Mapping[str, str] | None = None
    ) -> None:
        file = folder / read_config(folder)["model"]["decoder"]["filename"]
        self._open(folder, config_of(folder), Runner(file, threads, session_options))
        self.generation_config.use_cache = True  # whatever the configuration says (MPT's: no): the file has one
        logits = next(o for o in self._runner.session.get_outputs() if o.name == "logits")
        self._last_only = logits.shape[1] == 1

    def __call__(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: SharedCache | None = None, use_cache: bool | None = None,
        logits_to_keep: int | None = None, **others: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits [B, 1 or S, V] for new tokens [B, S], and the grown cache unless use_cache is False.

        attention_mask [B, P + S] (all ones where left out), position_ids [B, S] (counted along the mask).
        logits_to_keep: those of so many last tokens; None for all that the file gives. Raises ValueError for more than
        it gives, and for other inputs.
        """
        if input_ids is None:
            found = ", ".join(others) or "none"
            raise ValueError(explain("input_ids are needed", found=found, next_step="give them, or call generate()"))
        if not input_ids.numel() or int(input_ids.min()) < 0:  # a file reads -1 as the last row of the table
            found = str(list(input_ids.shape)) if not input_ids.numel() else str(int(input_ids.min()))
            raise ValueError(explain("input_ids are no tokens", expected="[B, S] of 0 or more", found=found))
        refuse_unknown({name: given for name, given in others.items() if not _says_nothing(name, given)})
        cache = self._cache(past_key_values)
        logits = self._logits(input_ids.long(), attention_mask, position_ids, cache, logits_to_keep)
        return CausalLMOutputWithPast(logits=logits, past_key_values=None if use_cache is False else cache)

    forward = __call__

    def _logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: SharedCache,
        keep: int | None,
    ) -> Tensor:  # fmt: skip
        batch, new = input_ids.shape
        total = cache.length + new
        mask = fitting_mask(attention_mask, batch, total, "the attention mask")
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:] if position_ids is None else position_ids
        places = places.expand(batch, -1)
        if batch > 1 and new > 1 and cache.length:  # GroupQueryAttention takes one token of each there
            steps = [
                self._step(input_ids[:, [i]], mask[:, : total - new + i + 1], places[:, [i]], cache) for i in range(new)
            ]
            logits = torch.cat(steps, 1)
        elif self._last_only and keep is not None and keep > 1 and new > 1:
            raise ValueError(
                explain(
                    "the file gives the logits of the last token alone, which assisted decoding cannot use",
                    expected=f"logits_to_keep=1, or a file with all of {new} tokens",
                    found=f"logits_to_keep={keep}",
                    next_step="export it with qfx.export_onnx(..., all_logits=True)",
                )
            )
        else:
            logits = self._step(input_ids, mask, places, cache)
        return logits[:, -keep:] if keep else logits

    def _step(self, ids: Tensor, mask: Tensor, places: Tensor, cache: SharedCache) -> Tensor:
        feeds = {IDS: ids, MASK: mask}
        if POSITIONS in self._runner.inputs:
            feeds[POSITIONS] = places
        return self._run(feeds, cache, *mask.shape)


def _says_nothing(name: str, given: Any) -> bool:
    """Is an input one that tokenizers and older programs give beside the tokens, and without a meaning here?"""
    return name == "cache_position" or (name == "token_type_ids" and (given is None or not bool(given.any())))
