"""An exported decoder under transformers' `generate()`: one graph, one memory for the cache, no copies per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qfx.backends.onnx.genai import read_config
from qfx.backends.onnx.runner import Runner
from qfx.errors import explain

_STEP = 256  # tokens by which a cache's memory grows at least


class SharedCache(Cache):  # type: ignore[misc]
    """Keys and values [B, H, room, D] of every layer, of which the first `length` tokens are used.

    sizes: (heads, elements of a head) of each layer; dtypes: of each layer, float32 where not given. Quantized caches
    hold int8, or two codes of 4 bits in each uint8.
    """

    def __init__(
        self, sizes: list[tuple[int, int]], room: int = 0, dtypes: Sequence[torch.dtype] | None = None
    ) -> None:
        super().__init__(layers=[])
        self._sizes, self._room = sizes, room
        self._dtypes = [torch.float32] * len(sizes) if dtypes is None else list(dtypes)
        self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def reserve(self, batch: int, length: int) -> None:
        """Have room for `length` tokens of `batch` sequences; what is there is kept."""
        if self.keys and self.keys[0].shape[0] != batch:
            raise ValueError(
                explain(
                    "the cache is of another batch",
                    expected=f"{self.keys[0].shape[0]} sequences",
                    found=str(batch),
                    next_step="start with a new cache",
                )
            )
        if self.keys and self.keys[0].shape[2] >= length:
            return
        room = max(length, self._room, 2 * self.keys[0].shape[2] if self.keys else 0)
        room = -(-room // _STEP) * _STEP
        old = (self.keys, self.values)
        kinds = list(zip(self._sizes, self._dtypes, strict=True))
        self.keys, self.values = (
            [torch.zeros(batch, h, room, d, dtype=dtype) for (h, d), dtype in kinds] for _ in range(2)
        )
        for grown, before in zip((self.keys, self.values), old, strict=True):
            for new, past in zip(grown, before, strict=False):
                new[:, :, : self.length] = past[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self, *_: Any) -> int:
        """-1: it grows."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Never: it grows."""
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        self.keys = [k.index_select(0, indices) for k in self.keys]
        self.values = [v.index_select(0, indices) for v in self.values]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self.keys = [k.repeat_interleave(repeats, 0) for k in self.keys]
        self.values = [v.repeat_interleave(repeats, 0) for v in self.values]

    def crop(self, max_length: int) -> None:
        """Forget what comes after the first `max_length` tokens; a negative number counts from the end."""
        self.length = min(self.length, max_length if max_length >= 0 else self.length + max_length)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    def __len__(self) -> int:
        return len(self._sizes)


class OnnxCausalLM(GenerationMixin):  # type: ignore[misc]
    """A decoder's folder. `generate()` is that of transformers; calling it takes and gives what its models do."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    input_modalities = ("text",)

    def __init__(
        self, folder: Path, *, threads: int | None = None, session_options: Mapping[str, str] | None = None
    ) -> None:
        document = read_config(folder)
        self.config = AutoConfig.from_pretrained(folder)
        file = folder / "generation_config.json"
        self.generation_config = (
            GenerationConfig.from_pretrained(folder)
            if file.exists()
            else GenerationConfig.from_model_config(self.config)
        )
        self._runner = Runner(folder / document["model"]["decoder"]["filename"], threads, session_options)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        shapes = {i.name: i.shape for i in self._runner.session.get_inputs()}
        layers = sum(name.startswith("past_key_values.") for name in shapes) // 2
        names = [f"past_key_values.{i}.key" for i in range(layers)]
        self._sizes = [(int(shapes[n][1]), int(shapes[n][3])) for n in names]
        self._dtypes = [self._runner.inputs[name] for name in names]
        self._grows_in_place = self._runner.metadata.get("qfx.cache") == "shared"

    def can_generate(self) -> bool:
        """Yes."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """No."""
        return False

    def eval(self) -> OnnxCausalLM:
        """Itself: a file does not train."""
        return self

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: SharedCache | None = None, use_cache: bool | None = None, **_: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits [B, 1 or S, V] for new tokens [B, S], and the grown cache.

        attention_mask [B, P + S] (all ones where left out), position_ids [B, S] (counted along the mask).
        """
        cache = SharedCache(self._sizes, dtypes=self._dtypes) if past_key_values is None else past_key_values
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
        return CausalLMOutputWithPast(logits=self._step(input_ids, mask, places, cache), past_key_values=cache)

    forward = __call__

    def _step(self, ids: Tensor, mask: Tensor, places: Tensor, cache: SharedCache) -> Tensor:
        batch, total = mask.shape
        cache.reserve(batch, total)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self._runner.inputs:
            feeds["position_ids"] = places
        into = {}
        for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for what, memory in (("key", keys), ("value", values)):
                used = memory if self._grows_in_place else memory[:, :, : cache.length]
                feeds[f"past_key_values.{i}.{what}"] = used
                if self._grows_in_place:
                    into[f"present.{i}.{what}"] = memory
        found = self._runner.run(feeds, into)
        if not self._grows_in_place:
            for i in range(len(cache.keys)):
                cache.keys[i][:, :, :total] = found[f"present.{i}.key"]
                cache.values[i][:, :, :total] = found[f"present.{i}.value"]
        cache.length = total
        return found["logits"]

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        """There is nothing to set: the file decides how it runs."""
        return nullcontext()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *_: Any,
    ) -> None:  # fmt: skip
        """The cache of a call of generate(), with room for all that may come."""
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = SharedCache(self._sizes, max_cache_length, self._dtypes)
