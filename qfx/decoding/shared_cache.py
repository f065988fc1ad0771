"""`SharedCache`: the keys and values of an exported decoder, in memory that the file reads and writes in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from qfx.errors import explain

_STEP = 256  # tokens by which a cache's memory grows at least


class SharedCache(Cache):  # type: ignore[misc]
    """Keys and values [B, H, room, D] of every layer, of which the first `length` tokens are used.

    sizes: (heads, elements of a head) of each layer, or (heads, those of keys, those of values); dtypes: of each layer,
    float32 where not given. Quantized caches hold int8, or two codes of 4 bits in each uint8.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, ...]], room: int = 0, dtypes: Sequence[torch.dtype] | None = None
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
            [torch.zeros(batch, size[0], room, size[at], dtype=dtype) for size, dtype in kinds] for at in (1, -1)
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
        """Forget the newest tokens, a negative number of them, as transformers does: 0 are none.

        A positive number is how many of the first tokens stay. Raises ValueError for more tokens than there are.
        """
        if -max_length > self.length:
            raise ValueError(
                explain(f"crop({max_length}) of a cache", expected=f"at most the {self.length} tokens that there are")
            )
        self.length = min(self.length, max_length if max_length > 0 else self.length + max_length)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.length = 0

    def __len__(self) -> int:
        return len(self._sizes)
