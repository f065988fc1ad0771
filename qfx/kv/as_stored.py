"""Keys and values of a whole sequence as a cache gives them back, for training: gradients go straight through.

    qfx::as_stored(x, formats, keys, sinks, step) -> Tensor

Token by token, a query reads what was stored before it came, and the rest as it came (see `qfx.kv.store`):

    before [S]    L - S + i tokens for query i of S; of cross-attention all L tokens, for every query but the first
    read [S, L]   sinks <= j < sinks + (before - sinks - residual) // step * step
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qfx.format import Format
from qfx.kv.codes import Codes
from qfx.kv.plans import Cached
from qfx.ops.attention import Stored
from qfx.ops.library import define


def as_stored(x: Tensor, formats: Sequence[str], keys: bool, sinks: int, step: int) -> Tensor:
    """Keys or values [B, G, L, D] as a cache gives back all whole steps of tokens behind its sinks; x.dtype.

    formats: one text, or one for each of n heads, of which x may repeat each G / n times.
    """
    count = max(x.shape[2] - sinks, 0) // step * step
    found = x.clone()
    repeats = max(1, x.shape[1] // len(formats))
    for text in dict.fromkeys(formats) if count else ():
        heads = [h for h in range(x.shape[1]) if formats[h // repeats if len(formats) > 1 else 0] == text]
        part = x[:, heads, sinks : sinks + count].detach()
        codes = Codes(Format.parse(text), part, by_tokens=keys)
        codes.write(part, 0)
        found[:, heads, sinks : sinks + count] = codes.values(0, count).to(x.dtype)
    return found


def stored(query: Tensor, key: Tensor, value: Tensor, cached: Cached) -> Stored:
    """What the queries [B, H, S, D] of a call of attention would read of a cache of this format, token by token."""
    fmt, (queries, tokens) = cached.format, (query.shape[2], key.shape[2])
    texts = [[str(one) for one in formats] for formats in (fmt.keys, fmt.values)]
    row = torch.arange(queries, device=query.device)
    before = (row > 0) * tokens if cached.layer.cross else row + (tokens - queries)
    last = (before - fmt.sinks - fmt.residual).clamp(min=0) // fmt.step * fmt.step + fmt.sinks
    column = torch.arange(tokens, device=query.device)
    read = (column >= fmt.sinks) & (column < last[:, None])
    both = [
        torch.ops.qfx.as_stored(x, text, role == 0, fmt.sinks, fmt.step)
        for role, (x, text) in enumerate(zip((key, value), texts, strict=True))
    ]
    return Stored(both[0], both[1], read)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None, None


define(
    "as_stored(Tensor x, str[] formats, bool keys, int sinks, int step) -> Tensor",
    torch.no_grad()(as_stored),
    lambda x, *_: torch.empty_like(x),
    gradient=(_save, _backward),
)
