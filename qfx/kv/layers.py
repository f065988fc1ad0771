"""The layers of a `QuantizedCache` as transformers calls them: one store each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qfx.errors import explain
from qfx.kv.attend import Scratch
from qfx.kv.formats import CacheFormat
from qfx.kv.states import packed
from qfx.kv.store import Store


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, in the formats of `fmt`.

    window: tokens that a new one sees, itself included (sliding and chunked attention), of which only those are kept.
    """

    def __init__(self, fmt: CacheFormat, where: str, *, window: int | None = None) -> None:
        self.fmt, self.where, self.window = fmt, where, window
        self.store: Store | None = None
        self.scratch = Scratch()
        self.record_past = False
        self.device: torch.device | None = None
        if window is not None:
            self.is_sliding = True

    is_sliding = False
    supports_early_init = False  # the first keys and values say what is to be made

    @property
    def is_initialized(self) -> bool:
        """Something was stored."""
        return self.store is not None

    @property
    def is_croppable(self) -> bool:
        """A crop leaves no trace: each token is stored alone and at once."""
        return self.fmt.step == 1 and self.fmt.residual == 0 and self.window is None

    @property
    def keys(self) -> Tensor | None:
        """Keys as they come back, [B, G, L, D]: a copy in float of all that is held."""
        return None if self.store is None else self.store.view().dense(0)

    @property
    def values(self) -> Tensor | None:
        """Values as they come back, [B, G, L, Dv]: a copy in float of all that is held."""
        return None if self.store is None else self.store.view().dense(1)

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return 0 if self.store is None else self.store.nbytes

    def __getattr__(self, name: str) -> Any:
        if name == "batch_size" and self.__dict__.get("store") is not None:
            return self.__dict__["store"].rest[0].shape[0]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the store for keys and values of these sizes. Raises ValueError for heads that lists do not fit."""
        self.device = key_states.device
        self.store = Store(self.fmt, key_states, value_states, where=self.where, scratch=self.scratch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # no graph stands for memory that grows
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys [B, G, n, D] and values [B, G, n, Dv]; returns what this call's attention reads.

        That is the history as it is stored, and the new tokens as they came (where nothing is cached yet: just these).
        """
        before = self.get_seq_length()
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        seen = self.store.append(key_states, value_states)
        if self.window is not None and not self.record_past:
            self.store.drop(keep=self.window - 1)
        if before == 0:
            return key_states, value_states
        length, _offset = self._sizes(before, key_states.shape[2])
        return packed(seen.narrow(len(seen) - length, len(seen)) if length < len(seen) else seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that attention will get with `query_length` new ones, position of the first)."""
        return self._sizes(self.get_seq_length(), query_length)

    def _sizes(self, before: int, new: int) -> tuple[int, int]:
        offset = 0 if self.window is None else max(before - self.window + 1, 0)
        return before - offset + new, offset

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return 0 if self.store is None else self.store.tokens

    def get_max_length(self) -> int:
        """The window, or -1: it grows."""
        return -1 if self.window is None else self.window

    def activate_past_recording(self) -> None:
        """Keep what a window has left behind until the next `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; their number is given as a negative one, as transformers does.

        Tokens stored alone are cut exactly. Where a group of keys (/gN) is cut, its tokens that stay become part of the
        rest, as they come back, and are rounded once more when a group is complete again. Raises ValueError for a
        positive number, for more tokens than there are, and behind a window that has closed without past recording.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                explain(
                    f"crop({tokens_to_remove}) of the cache of {self.where}",
                    expected="a negative number of tokens, those to be removed",
                    found=tokens_to_remove,
                    next_step=f"crop(length - {self.get_seq_length()}) keeps `length` tokens",
                )
            )
        if self.store is None:
            return
        full = self.window is not None and self.get_seq_length() >= self.window
        if full and tokens_to_remove and not self.record_past:
            raise ValueError(
                explain(
                    f"cannot crop the cache of {self.where}",
                    expected=f"fewer tokens than its window of {self.window}, or past recording",
                    found=f"{self.get_seq_length()} tokens, of which the first are gone",
                    next_step="call activate_past_recording() before the tokens to be cropped come",
                )
            )
        if tokens_to_remove:
            self.store.remove(-tokens_to_remove)
        if self.window is not None:
            self.store.drop(keep=self.window - 1)

    def reset(self) -> None:
        """Forget everything, batch and sizes included."""
        self.store = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self.store is not None:
            self.store.each(lambda t: t[indices.to(t.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        if self.store is not None:
            self.store.each(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move the memory to the CPU; what was handed out stays where it is."""
        if self.store is not None:
            self.store.each(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the memory back to the device of the keys."""
        if self.store is not None:
            self.store.each(lambda t: t.to(self.device, non_blocking=True))
