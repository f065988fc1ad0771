"""The layers of a `QuantizedCache` of fixed length: memory that never moves, for compiled decoding.

Everything is written with operations that compilers trace and functionalize, and what attention gets is floats:

    codes, scales  <- index_copy_ of what the new tokens round to        [B, G, max_length, D] in 8 bits
    keys, values    = codes * scales, with the new tokens as they came    [B, G, max_length, D] in the model's dtype

So a call makes floats of one layer's history at a time, which a compiler may fuse into attention; stored are 8 bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qfx import numerics
from qfx.errors import explain
from qfx.format import Format
from qfx.kv.codes import encode, stored_dtype
from qfx.kv.formats import CacheFormat, planes_of, scales_of_token, zero_dtype
from qfx.kv.store import another, facts


@dataclass
class _Fixed:
    """Memory of some heads: data [B, G, max_length, D], scale and zero [B, G, max_length, scales of a token]."""

    fmt: Format
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @classmethod
    def of(cls, fmt: Format, like: Tensor, length: int) -> _Fixed:
        batch, heads, _, width = like.shape
        each, shape = scales_of_token(fmt, width), (batch, heads, length)
        return cls(
            fmt,
            like.new_zeros((*shape, width), dtype=stored_dtype(fmt)),
            None if fmt.is_plain else like.new_zeros((*shape, each), dtype=fmt.scale_dtype),
            like.new_zeros((*shape, each), dtype=zero_dtype(fmt)) if fmt.has_zero else None,
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.data, self.scale, self.zero) if t is not None]

    def write(self, x: Tensor, places: Tensor) -> None:
        data, params = encode(x, self.fmt, by_tokens=False)
        self.data.index_copy_(2, places, data)
        if params is not None and self.scale is not None:
            self.scale.index_copy_(2, places, params.scale)
            if self.zero is not None and params.zero is not None:
                self.zero.index_copy_(2, places, params.zero)

    def read(self, dtype: torch.dtype) -> Tensor:
        codes = self.data.view(self.fmt.code_dtype) if self.fmt.is_float else self.data
        return numerics.dequantize(codes, self.fmt, self.scale, self.zero, dtype)


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, of at most `max_length` tokens. Layers with a window keep all tokens, too."""

    is_compileable = True
    is_croppable = True
    is_sliding = False
    supports_early_init = True

    def __init__(self, fmt: CacheFormat, where: str, max_length: int) -> None:
        self.fmt, self.where, self.max_cache_len = fmt, where, max_length
        self.is_initialized = False
        self.cumulative_length = torch.tensor(0, dtype=torch.long)

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make the memory for keys [B, G, *, D] and values [B, G, *, Dv]."""
        raise NotImplementedError

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens, count them, and give what attention reads."""
        raise NotImplementedError

    def read(self, role: int) -> Tensor:
        """Floats [B, G, max_length, D] of keys (0) or values (1)."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """All memory."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values of these sizes. Raises ValueError for heads that lists do not fit."""
        self.fmt.check_heads(key_states.shape[1], self.where)
        self.facts = [facts(x) for x in (key_states, value_states)]
        self.batch_size, self.device = key_states.shape[0], key_states.device
        anywhere = nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False)
        with anywhere:  # it may be written to without inference mode later
            self.cumulative_length = torch.zeros_like(self.cumulative_length, device=self.device)
            self.allocate(key_states, value_states)
        if not torch.compiler.is_compiling():
            for tensor in [self.cumulative_length, *self.tensors()]:
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """Keys as they come back, [B, G, max_length, D]: a copy in float."""
        return self.read(0) if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Values as they come back, [B, G, max_length, Dv]: a copy in float."""
        return self.read(1) if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store keys [B, G, n, D] and values; returns both with max_length tokens, the new ones as they came.

        Raises ValueError, outside of compiled graphs, for another batch, other heads, sizes or dtypes than before, for
        values that are not finite and for more tokens than `max_length`; inside, memory that is full raises an error.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not torch.compiler.is_compiling():
            self._check(key_states, value_states)
        return self.put(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(max_length, 0): attention gets all places, of which the mask leaves out those without a token."""
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """Tokens seen so far: a tensor, so that compiled graphs need not be made anew for each."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """max_length."""
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, a negative number of them. Raises ValueError for any other, and for too many."""
        seen = int(self.get_seq_length())
        if tokens_to_remove > 0 or -tokens_to_remove > seen:
            raise ValueError(
                explain(
                    f"crop({tokens_to_remove}) of the cache of {self.where}",
                    expected=f"a negative number of tokens, at most the {seen} that there are",
                    found=tokens_to_remove,
                )
            )
        self.cumulative_length.add_(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.cumulative_length.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences in another order (beam search)."""
        for tensor in self.tensors():
            tensor.copy_(tensor[beam_idx.to(tensor.device)])

    def offload(self) -> None:
        """Nothing: memory that a compiled graph knows does not move."""

    def prefetch(self) -> None:
        """Nothing, see `offload`."""

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for role, x, old in zip(("keys", "values"), (keys, values), self.facts, strict=True):
            another(role, facts(x), old, self.where)
            numerics.require_finite(x, f"{self.where}, {role}")
        longer = int(self.cumulative_length) + keys.shape[2]
        if longer > self.max_cache_len:
            raise ValueError(full(self.max_cache_len, longer, f"the cache of {self.where}"))


def full(most: int, tokens: int, what: str = "a cache of fixed length") -> str:
    """That a cache has no memory for so many tokens."""
    return explain(
        f"{what} is full",
        expected=f"at most {most} tokens (max_length)",
        found=str(tokens),
        next_step="make the cache with a greater max_length, or without",
    )


def stores_alone(fmt: CacheFormat) -> bool:
    """Whether each token is stored by itself: no byte and no scale is shared."""
    return all(planes_of(one) == 1 for one in (*fmt.keys, *fmt.values)) and all((k.group or 1) == 1 for k in fmt.keys)


class StaticQuantizedLayer(StaticLayer):
    """Tokens in formats that store each alone (`stores_alone`), without residual and sinks.

    packed: the layer that takes its place on a device whose kernels read codes; made here, since no compiler that
    traces the first call can make it.
    """

    def __init__(self, fmt: CacheFormat, where: str, max_length: int, *, packed: StaticLayer) -> None:
        super().__init__(fmt, where, max_length)
        self.packed = packed

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Make the memory: heads of one format after the other."""
        self.parts: list[list[_Fixed]] = [[], []]
        for role, x in enumerate((keys, values)):
            formats = [self.fmt.of_head(head)[role] for head in range(x.shape[1])]
            runs = [formats[:1]]
            for fmt in formats[1:]:
                runs[-1].append(fmt) if fmt == runs[-1][0] else runs.append([fmt])
            self.parts[role] = [_Fixed.of(run[0], x[:, : len(run)], self.max_cache_len) for run in runs]

    def put(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store each token; floats of all places, the new ones as they came."""
        new = keys.shape[2]
        places = torch.arange(new, device=keys.device) + self.cumulative_length
        self.cumulative_length.add_(new)
        found = []
        for role, x in enumerate((keys, values)):
            at = 0
            for part in self.parts[role]:
                heads = part.data.shape[1]
                part.write(x[:, at : at + heads], places)
                at += heads
            found.append(self.read(role).index_copy(2, places, x))
        return found[0], found[1]

    def read(self, role: int) -> Tensor:
        """Floats of all places."""
        dtype: Any = self.facts[role][3]
        found = [part.read(dtype) for part in self.parts[role]]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def tensors(self) -> list[Tensor]:
        """Codes, scales and zero points."""
        return [t for parts in getattr(self, "parts", ()) for part in parts for t in part.tensors]
