"""Operators over the packed memory of a cache of fixed length: reference semantics in plain torch, and kernels.

    qfx::cache_append(memory!, k, v, length, spec) -> ()          store tokens behind the first `length` ones
    qfx::cache_attention(q, memory, length, mask?, scale, causal, spec) -> y
    qfx::cache_read(memory, length, spec) -> (keys, values)        floats of all places; those without a token are 0

memory, of one layer (S sinks, R float tokens, the codes of its parts as `Codes` holds them):

    stored i64 [1] | first keys, values [B, G, S, D] | newest keys, values [B, G, R, D] | data, scale, zero? of keys and
    values of each part

length i64 []: tokens before the append, and with the new ones for attention. spec: `spec_of` the layer. Tokens are
rounded by the append after the one that brought them, so that attention reads those of its own call as they came.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfx.kv.attend import Part, View, attend
from qfx.kv.codes import Codes
from qfx.kv.formats import CacheFormat
from qfx.kv.static import full
from qfx.kv.store import alike, cut, write
from qfx.ops.library import UNSAFE, define

FEW = 32  # new tokens for which the newest have room; more are read as floats of all places


@dataclass
class Memory:
    """The memory of one layer, made of its tensors; see the module."""

    fmt: CacheFormat
    length: int
    stored: Tensor
    first: tuple[Tensor, Tensor]
    newest: tuple[Tensor, Tensor]
    parts: tuple[Part, ...]

    def view(self, tokens: int) -> View:
        """The first `tokens` tokens."""
        sinks, stored = min(tokens, self.fmt.sinks), int(self.stored)
        rest = max(tokens - sinks - stored, 0)
        return View(cut(self.first, 0, sinks), self.parts, 0, stored, cut(self.newest, 0, rest))

    def append(self, k: Tensor, v: Tensor, length: int) -> None:
        """Store whole steps of what came before, then take new tokens behind the first `length`.

        Raises ValueError where there is no memory for them.
        """
        if length + k.shape[2] > self.length:
            raise ValueError(full(self.length, length + k.shape[2]))
        fmt, stored, new = self.fmt, int(self.stored), (k.detach(), v.detach())
        missing = min(max(fmt.sinks - length, 0), k.shape[2])
        for to, x in zip(self.first, new, strict=True):
            to[:, :, length : length + missing] = x[:, :, :missing]
        new = cut(new, missing, None)
        held = max(length - fmt.sinks - stored, 0)
        before, ready = cut(self.newest, 0, held), self._ready(held)
        if held - ready + new[0].shape[2] > self.newest[0].shape[2]:
            before = (torch.cat((before[0], new[0]), 2), torch.cat((before[1], new[1]), 2))
            held, new = before[0].shape[2], cut(new, 0, 0)
            ready = self._ready(held)
        for part in self.parts if ready else ():
            keys, values = (t if part.heads is None else t[:, part.heads] for t in cut(before, 0, ready))
            write(part, keys, values, stored)
        if ready:
            self.stored.fill_(stored + ready)
        for to, old, x in zip(self.newest, before, new, strict=True):
            if ready or old.data_ptr() != to.data_ptr():
                to[:, :, : held - ready] = old[:, :, ready:].clone()
            to[:, :, held - ready : held - ready + x.shape[2]] = x

    def remove(self, tokens: int, length: int) -> None:
        """Forget the newest tokens of `length`; those of a group that is cut stay, as they come back."""
        left = length - tokens - self.fmt.sinks
        if left >= int(self.stored):
            return
        whole = max(left, 0) // self.fmt.step * self.fmt.step
        view = View(cut(self.first, 0, 0), self.parts, whole, max(left, 0), cut(self.newest, 0, 0))
        for role, to in enumerate(self.newest):
            to[:, :, : len(view)] = view.dense(role)
        self.stored.fill_(whole)

    def _ready(self, held: int) -> int:
        return max(held - self.fmt.residual, 0) // self.fmt.step * self.fmt.step


def allocate(fmt: CacheFormat, keys: Tensor, values: Tensor, length: int) -> list[Tensor]:
    """The memory for at most `length` tokens like keys [B, G, *, D] and values [B, G, *, Dv]."""
    room = -(-length // fmt.step) * fmt.step
    found = [torch.zeros(1, dtype=torch.long, device=keys.device)]
    for tokens in (fmt.sinks, fmt.residual + fmt.step + FEW):
        found += [x.new_zeros((*x.shape[:2], tokens, x.shape[3])) for x in (keys, values)]
    for two, heads in alike(fmt, keys):
        for role, (one, x) in enumerate(zip(two, (keys, values), strict=True)):
            codes = Codes(one, x if heads is None else x[:, heads], by_tokens=not role)
            found += codes.fixed(room)
    return found


def spec_of(fmt: CacheFormat, keys: Tensor, values: Tensor, length: int) -> str:
    """What `memory_of` needs beside the tensors, as text."""
    sizes = {"heads": keys.shape[1], "widths": [keys.shape[3], values.shape[3]], "length": length}
    return _json({**fmt.to_json(), **sizes})


def _json(value: Any) -> str:
    """Numbers and plain texts as JSON. Compilers trace this, and not the module json."""
    if isinstance(value, dict):
        return "{" + ", ".join([f'"{key}": {_json(value[key])}' for key in sorted(value)]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_json(one) for one in value]) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@functools.lru_cache(maxsize=1024)
def layout(spec: str) -> tuple[CacheFormat, int, tuple[Part, ...]]:
    """Format, length and empty parts."""
    facts = json.loads(spec)
    heads, widths, length = facts.pop("heads"), facts.pop("widths"), facts.pop("length")
    fmt = CacheFormat.from_json(facts)
    like = [torch.empty(1, heads, 0, width) for width in widths]
    parts = []
    for two, of in alike(fmt, like[0]):
        keys, values = (Codes(two[r], x if of is None else x[:, of], by_tokens=not r) for r, x in enumerate(like))
        parts.append(Part(of, keys, values))
    return fmt, length, tuple(parts)


def memory_of(tensors: Sequence[Tensor], spec: str) -> Memory:
    """The memory that these tensors are."""
    fmt, length, empty = layout(spec)
    stored, *floats = tensors[:5]
    left = iter(tensors[5:])
    parts = []
    for part in empty:
        keys, values = (
            codes.of(next(left), next(left), None if codes.zero is None else next(left))
            for codes in (part.keys, part.values)
        )
        heads = None if part.heads is None else part.heads.to(stored.device)
        parts.append(Part(heads, keys, values))
    return Memory(fmt, length, stored, (floats[0], floats[1]), (floats[2], floats[3]), tuple(parts))


def cache_append(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> None:
    """qfx::cache_append, see the module."""
    memory_of(memory, spec).append(k, v, int(length))


def cache_attention(
    q: Tensor, memory: list[Tensor], length: Tensor, mask: Tensor | None, scale: float, causal: bool, spec: str
) -> Tensor:
    """qfx::cache_attention: y [B, H, S, Dv] of q [B, H, S, D]; mask over all places, of which those held are read."""
    tokens = int(length)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :tokens]
    return attend(q, memory_of(memory, spec).view(tokens), mask, scale, causal=causal).contiguous()


def cache_read(memory: list[Tensor], length: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """qfx::cache_read: floats [B, G, places, D] of keys and values."""
    own, tokens = memory_of(memory, spec), int(length)
    view, found = own.view(tokens), []
    for role, x in enumerate(own.newest):
        out = x.new_zeros((*x.shape[:2], own.length, x.shape[3]))
        out[:, :, :tokens] = view.dense(role)
        found.append(out)
    return found[0], found[1]


def _fake_append(memory: list[Tensor], k: Tensor, v: Tensor, length: Tensor, spec: str) -> None:
    return None


def _fake_attention(q: Tensor, memory: list[Tensor], *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:3], memory[4].shape[3]))


def _fake_read(memory: list[Tensor], length: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    places = json.loads(spec)["length"]
    k, v = (x.new_empty((*x.shape[:2], places, x.shape[3])) for x in memory[3:5])
    return k, v


define(
    "cache_append(Tensor(a!)[] memory, Tensor k, Tensor v, Tensor length, str spec) -> ()",
    cache_append,
    _fake_append,
    tags=UNSAFE,
)
define(
    "cache_attention(Tensor q, Tensor[] memory, Tensor length, Tensor? mask, float scale, bool causal, str spec) "
    "-> Tensor",
    cache_attention,
    _fake_attention,
    tags=UNSAFE,
)
define("cache_read(Tensor[] memory, Tensor length, str spec) -> (Tensor, Tensor)", cache_read, _fake_read, tags=UNSAFE)
