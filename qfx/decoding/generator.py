"""What exported models under transformers' `generate()` share: the file's session, the step that grows a cache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from qfx.backends.onnx.runner import Runner
from qfx.decoding.decoder import PAST, PRESENT
from qfx.decoding.shared_cache import SharedCache
from qfx.errors import Note, UnsupportedError, explain, warn
from qfx.storage.skeleton import set_generation


class Generator(GenerationMixin):  # type: ignore[misc]
    """A decoder's file with its cache. Subclasses call `_open`, and take and give what transformers' models do."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    _CACHE: ClassVar[type[SharedCache]] = SharedCache

    def _open(self, folder: Path, config: Any, runner: Runner) -> None:
        self.config, self._runner = config, runner
        self.generation_config = GenerationConfig.from_model_config(config)
        set_generation(self, folder)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        shapes = {i.name: i.shape for i in runner.session.get_inputs()}
        keys = [name for i in range(len(shapes)) if (name := PAST.format(i, "key")) in shapes]
        values = [PAST.format(i, "value") for i in range(len(keys))]
        self._sizes = [
            (*(int(shapes[k][at]) for at in (1, 3)), int(shapes[v][3])) for k, v in zip(keys, values, strict=True)
        ]
        self._dtypes = [runner.inputs[name] for name in keys]
        self._grows_in_place = runner.metadata.get("qfx.cache") == "shared"

    def can_generate(self) -> bool:
        """Yes."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """No."""
        return False

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UnsupportedError: continuous batching (`generate_batch`) has pages of its own for keys and values."""
        what = f"continuous batching (generate_batch) needs a cache in pages, which {type(self).__name__} has not"
        raise UnsupportedError(explain(what, next_step="call generate() on a padded batch"))

    def eval(self) -> Self:
        """Itself: a file does not train."""
        return self

    def _run(self, feeds: dict[str, Tensor], cache: SharedCache, batch: int, total: int) -> Tensor:
        """One call of the file, which brings the cache to `total` tokens of `batch` sequences; the logits."""
        cache.reserve(batch, total)
        into = {}
        for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            for what, memory in (("key", keys), ("value", values)):
                feeds[PAST.format(i, what)] = memory if self._grows_in_place else memory[:, :, : cache.length]
                if self._grows_in_place:
                    into[PRESENT.format(i, what)] = memory
        found = self._runner.run(feeds, into)
        if not self._grows_in_place:
            for i, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
                keys[:, :, :total] = found[PRESENT.format(i, "key")]
                values[:, :, :total] = found[PRESENT.format(i, "value")]
        cache.length = total
        return found["logits"]

    def _new_cache(self, room: int = 0) -> Any:
        return self._CACHE(self._sizes, room, self._dtypes)

    def _cache(self, given: Any) -> Any:
        """The cache of a call, an empty one where none is given. Raises ValueError for one of another kind."""
        if given is not None and not isinstance(given, self._CACHE):
            raise ValueError(
                explain(
                    "past_key_values are of a cache that a file cannot fill",
                    expected=f"the {self._CACHE.__name__} of an earlier call",
                    found=type(given).__name__,
                    next_step="leave past_key_values out; qfx.export_onnx(..., kv='i8') stores the cache in 8 bits",
                )
            )
        return self._new_cache() if given is None else given

    def _optimize_model_for_decode(self) -> AbstractContextManager[None]:
        """There is nothing to set: the file decides how it runs."""
        return nullcontext()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int,
        max_cache_length: int, *_: Any,
    ) -> None:  # fmt: skip
        """The cache of a call of generate(), with room for all that may come; none where use_cache=False."""
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return
        asked = generation_config.cache_implementation
        if asked == "quantized" or "offloaded" in (asked or ""):
            what = Note(
                "cache",
                f"cache_implementation={asked!r} has no effect: a file has the cache that it was exported with",
                "leave it out; qfx.export_onnx(..., kv='i8') stores the cache in 8 bits",
            )
            warn(str(what))
        model_kwargs["past_key_values"] = self._new_cache(max_cache_length)


def fitting_mask(mask: Tensor | None, batch: int, total: int, name: str) -> Tensor:
    """A mask of cached and new tokens, int64 [batch, total]; all ones for None. Raises ValueError for other shapes."""
    if mask is None:
        return torch.ones(batch, total, dtype=torch.int64)
    if mask.shape != (batch, total):
        raise ValueError(
            explain(
                f"{name} does not fit",
                expected=f"[{batch}, {total}]: cached and new tokens",
                found=str(list(mask.shape)),
            )
        )
    return mask.long()


def refuse_unknown(given: dict[str, Any]) -> None:
    """Raises ValueError for a tensor that no file takes and for results that none gives."""
    asked = [n for n, v in given.items() if isinstance(v, Tensor) or (n.startswith("output_") and v)]
    if asked:
        raise ValueError(
            explain(
                f"the exported model has no {', '.join(asked)}",
                expected="the inputs that it was exported with, and no attentions or hidden states",
                found=", ".join(given),
                next_step="leave them out",
            )
        )
