"""What a model's cache takes, layer by layer, and how much context goes into a memory, in numbers or in symbols.

bytes(T) <= held + rate * T        rate: of the stored tokens; held: what the first and the newest have above it
T = floor((memory / batch - held) / rate)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qfx.errors import explain, listed
from qfx.kv.held import caches_of
from qfx.kv.planning import dtype_of
from qfx.kv.plans import Cached, read


@dataclass(frozen=True)
class CacheRow:
    """A layer's cache in the report. node: its attention. asked: formats of keys and values. bytes_per_token: of a
    stored token, scales and zero points counted; half: of one in 16 bits."""

    node: str
    asked: str
    heads: int
    bytes_per_token: float
    half: float
    window: int | None = None
    cross: bool = False

    @property
    def ratio(self) -> float:
        """To 16 bits."""
        return self.bytes_per_token / self.half


@dataclass(frozen=True)
class CacheSummary:
    """The caches of one model whose floats are of `dtype`."""

    caches: tuple[Cached, ...]
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> tuple[CacheRow, ...]:
        """One for each layer, those of self-attention first."""
        return tuple(
            CacheRow(
                one.layer.fqn, str(one.format), one.layer.heads, float(one.token_bytes), one.float_token_bytes,
                one.layer.window, one.layer.cross,
            )
            for one in self.caches
        )  # fmt: skip

    @property
    def bytes_per_token(self) -> float:
        """Of all layers that grow; those with a window, and those of cross-attention, do not."""
        return sum(float(one.token_bytes) for one in self._grown)

    @property
    def ratio(self) -> float:
        """Bytes of a stored token of all layers to 16 bits."""
        rows = [row for row in self.rows if not row.cross]
        return sum(row.bytes_per_token for row in rows) / sum(row.half for row in rows)

    def nbytes(self, context: Any, batch: Any = 1) -> Any:
        """Bytes after `context` tokens of `batch` sequences; ints, or symbols of sympy. Cross-attention is not counted:
        it keeps what an encoder read."""
        own = [one for one in self.caches if not one.layer.cross]
        return sum(one.nbytes(context, batch=batch, dtype=self.dtype) for one in own)

    def max_context(self, memory: Any, batch: Any = 1) -> Any:
        """Tokens of each of `batch` sequences whose cache takes at most `memory` bytes, at every length up to there.

        Of ints an int, of symbols an expression. Raises ValueError where not one token has room, and for a model all
        of whose layers have a window: any context does.
        """
        if not self._grown:
            raise ValueError("every layer of the cache has a window: its bytes do not grow with the context")
        held, slope = self._held(), self.bytes_per_token
        if isinstance(memory, int | float) and isinstance(batch, int):
            found = math.floor((memory / batch - held) / slope)
            if found < 1:
                raise ValueError(
                    explain(
                        f"{memory:,} bytes are too few for a cache of {batch} sequences",
                        expected=f"at least {math.ceil(batch * (held + slope)):,}",
                        next_step="give more memory, or a smaller batch",
                    )
                )
            return found
        import sympy

        return sympy.floor((memory / batch - sympy.nsimplify(held)) / sympy.nsimplify(slope))

    @property
    def _grown(self) -> list[Cached]:
        return [one for one in self.caches if one.layer.window is None and not one.layer.cross]

    def _held(self) -> float:
        """The most by which the bytes of a sequence are above the stored rate of its tokens."""
        total = 0.0
        for one in (one for one in self.caches if not one.layer.cross):
            most = one.format.sinks + one.format.residual + one.format.step - 1
            if one.layer.window is not None:
                most = one.layer.window
                total += max(one.nbytes(n, dtype=self.dtype) for n in range(max(1, most - one.format.step), most + 1))
            else:
                total += max(0.0, one.nbytes(most, dtype=self.dtype) - most * float(one.token_bytes))
        return total


def summary(model: nn.Module) -> CacheSummary | None:
    """Of a live model; None where it has no quantized cache."""
    caches = caches_of(model)
    return CacheSummary(tuple(read(caches)), dtype_of(model)) if caches else None


def named(rows: Sequence[CacheRow]) -> list[tuple[str, Sequence[CacheRow]]]:
    """Rows of one format together: ("layers.0.self_attn and 5 more", rows)."""
    groups: dict[tuple[Any, ...], list[CacheRow]] = {}
    for row in rows:
        groups.setdefault((row.asked, row.bytes_per_token, row.window, row.cross), []).append(row)
    return [(listed([row.node for row in own], 1), own) for own in groups.values()]
