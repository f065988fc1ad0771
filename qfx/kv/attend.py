"""Attention over a cache as it is stored: tile by tile, so that no float copy of the history is ever made.

    s = q k^T * scale + mask      of all tokens, for as many queries at a time as SCORES allows
    p = softmax(s)                a row without any token gives 0, as torch's attention does
    y = p v

A tile of codes is cast to f32 and multiplied at once. The scale c and the zero point z of a token are folded in:
q (c (k - z))^T = c (q k^T - z sum(q)), and p (c (v - z)) = (p c) v - sum(p c z). The heads of queries that share a head
of keys are rows of one product, so that nothing is repeated. Scores of a whole row are small beside its keys, which
makes one softmax over all of them better than the online one (Milakov and Gimelshein 2018), which corrects its sums for
every tile. Everything is computed in f32; the result has the type of q.

Few queries on a CPU go to the kernels of `qfx.kv.native` where there are any, which do the same in one pass.

Part of a long prompt (MANY queries or more) reads floats of one head of keys and values at a time instead, with torch's
fused attention, which makes no scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.kv import native
from qfx.kv.codes import Codes

TILE = 1 << 19  # elements of a tile, of all heads and sequences
SCORES = 1 << 22  # scores that exist at a time
FEW = 64  # rows of a product that waits for its tile
MANY = 64  # queries from which torch's attention is faster, over floats of one head of keys at a time


class Scratch:
    """Memory for tiles, at most about TILE floats, used again by each tile of every layer that shares it.

    Memory that is asked for anew comes as pages that the system clears, which takes longer than what is written there.
    """

    def __init__(self) -> None:
        self.room = torch.empty(0, dtype=torch.float32)

    def floats(self, count: int, device: torch.device) -> Tensor:
        """f32 of at least `count` elements; it is what was given out last."""
        if self.room.numel() < count or self.room.device != device:
            with torch.inference_mode(False):  # it may be written to without inference mode later
                self.room = torch.empty(count, dtype=torch.float32, device=device)
        return self.room


@dataclass(frozen=True)
class Part:
    """Heads of one format: their numbers (None: all heads), and their stored keys and values."""

    heads: Tensor | None
    keys: Codes
    values: Codes


@dataclass(frozen=True)
class View:
    """What attention reads of one layer, in the order of the tokens: sinks, stored tokens, the rest.

    first [B, G, n, D] and rest: (keys, values) in the model's dtype. parts: stored tokens `start` to `end` - 1 of each.
    """

    first: tuple[Tensor, Tensor]
    parts: tuple[Part, ...]
    start: int
    end: int
    rest: tuple[Tensor, Tensor]
    scratch: Scratch = field(default_factory=Scratch)

    def __len__(self) -> int:
        return self.first[0].shape[2] + self.end - self.start + self.rest[0].shape[2]

    def shape(self, role: int) -> tuple[int, int, int, int]:
        """[B, G, tokens, D] of keys (0) or values (1)."""
        batch, heads, _, width = self.rest[role].shape
        return batch, heads, len(self), width

    def narrow(self, start: int, end: int) -> View:
        """Tokens start to end - 1 of these."""
        a, b = self.first[0].shape[2], self.first[0].shape[2] + self.end - self.start

        def cut(pair: tuple[Tensor, Tensor], at: int) -> tuple[Tensor, Tensor]:
            low, high = max(start - at, 0), max(end - at, 0)
            return pair[0][:, :, low:high], pair[1][:, :, low:high]

        low = self.start + min(max(start - a, 0), b - a)
        high = self.start + min(max(end - a, 0), b - a)
        return replace(self, first=cut(self.first, 0), start=low, end=max(low, high), rest=cut(self.rest, b))

    def of_head(self, part: Part, at: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one head, [B, 1, tokens, D]: the `at`-th of a part, number `head` of the layer."""
        found = []
        for role, codes in enumerate((part.keys, part.values)):
            one = codes.each(lambda t: t[:, at : at + 1]).values(self.start, self.end)
            ends = (self.first[role][:, head : head + 1], self.rest[role][:, head : head + 1])
            found.append(torch.cat((ends[0], one.to(ends[0].dtype), ends[1]), 2))
        return found[0], found[1]

    def dense(self, role: int) -> Tensor:
        """Keys (0) or values (1) as they come back, [B, G, tokens, D] in the model's dtype."""
        out = self.rest[role].new_empty(self.shape(role))
        a, b = self.first[role].shape[2], self.first[role].shape[2] + self.end - self.start
        out[:, :, :a], out[:, :, b:] = self.first[role], self.rest[role]
        for part in self.parts if b > a else ():
            codes = part.values if role else part.keys
            heads = slice(None) if part.heads is None else part.heads
            out[:, heads, a:b] = codes.values(self.start, self.end).to(out.dtype)
        return out


def attend(q: Tensor, view: View, mask: Tensor | None, scale: float, *, causal: bool = False) -> Tensor:
    """Attention of q [B, H, S, D] to the tokens of `view`, [B, H, S, Dv] in the dtype of q.

    H is a multiple of the heads of keys. mask: boolean or additive, broadcast to [B, H, S, L]. causal: query i sees
    tokens up to i.
    """
    batch, heads, queries, _ = q.shape
    groups, length = view.rest[0].shape[1], len(view)
    q5 = q.reshape(batch, groups, heads // groups, queries, -1)
    mask = _five(mask, groups, heads)
    if queries >= MANY and view.end > view.start:
        return _head_by_head(q5, view, mask, scale, causal=causal).reshape(batch, heads, queries, -1)
    rows = max(SCORES // (batch * heads * max(length, 1)), 1)
    found = []
    for at in range(0, queries, rows):
        block = slice(at, at + rows)
        seen = mask if mask is None or mask.shape[3] == 1 else mask[..., block, :]
        if causal:
            places = torch.arange(max(queries, length), device=q.device)
            early = places[:length] <= places[:queries, None][block]
            seen = early if seen is None else _both(seen, early)
        found.append(_block(q5[..., block, :], view, seen, scale))
    out = found[0] if len(found) == 1 else torch.cat(found, 3)
    return out.reshape(batch, heads, queries, -1).to(q.dtype)


def _head_by_head(q: Tensor, view: View, mask: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    """Attention of q [B, G, n, S, D] by torch's own, [B, G, n, S, Dv] in the dtype of q."""
    if causal and mask is not None:
        places = torch.arange(max(q.shape[3], len(view)), device=q.device)
        mask, causal = _both(mask, places[: len(view)] <= places[: q.shape[3], None]), False
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = q.new_empty((*q.shape[:-1], view.rest[1].shape[-1]))
    for part in view.parts:
        numbers = range(q.shape[1]) if part.heads is None else part.heads.tolist()
        for at, head in enumerate(numbers):
            keys, values = (x.to(q.dtype).expand(-1, q.shape[2], -1, -1) for x in view.of_head(part, at, head))
            seen = mask if mask is None else mask[:, head if mask.shape[1] > 1 else 0]
            out[:, head] = F.scaled_dot_product_attention(
                q[:, head], keys, values, seen, is_causal=causal, scale=scale
            )  # fmt: skip
    return out


def _block(q: Tensor, view: View, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of some queries [B, G, n, S, D], f32 [B, G, n, S, Dv]."""
    out = native.attend(q, view, mask, scale)
    if out is not None:
        return out
    for part, of in _of_parts(view):
        s = _scores(q if of is None else q[:, of], view, part, of, scale)
        if mask is not None:
            _masked(s, mask if of is None or mask.dim() < 5 or mask.shape[1] == 1 else mask[:, of])
        y = _weighted(torch.softmax(s, -1) if mask is None else torch._safe_softmax(s, -1), view, part, of)
        if of is None:
            return y
        out = q.new_empty((*q.shape[:-1], y.shape[-1]), dtype=torch.float32) if out is None else out
        out[:, of] = y
    assert out is not None
    return out


def scores(q: Tensor, view: View) -> Tensor:
    """q k^T, [B, H, S, L] in the dtype of q [B, H, S, D]."""
    groups = view.rest[0].shape[1]
    q5 = q.reshape(q.shape[0], groups, -1, *q.shape[2:])
    out = q.new_empty((*q5.shape[:-1], len(view)))
    for part, of in _of_parts(view):
        found = _scores(q5 if of is None else q5[:, of], view, part, of, 1.0)
        out[:, slice(None) if of is None else of] = found.to(out.dtype)
    return out.reshape(*q.shape[:-1], len(view))


def weighted(p: Tensor, view: View) -> Tensor:
    """p v, [B, H, S, Dv] in the dtype of p [B, H, S, L]."""
    groups = view.rest[1].shape[1]
    p5 = p.reshape(p.shape[0], groups, p.shape[1] // groups, *p.shape[2:])
    out = p.new_empty((*p5.shape[:-1], view.rest[1].shape[-1]))
    for part, of in _of_parts(view):
        found = _weighted(p5.float() if of is None else p5[:, of].float(), view, part, of)
        out[:, slice(None) if of is None else of] = found.to(out.dtype)
    return out.reshape(*p.shape[:-1], -1)


def _of_parts(view: View) -> Iterator[tuple[Part | None, Tensor | None]]:
    """Each part with the numbers of its heads; one without codes where nothing is stored."""
    if view.end == view.start:
        yield None, None
        return
    for part in view.parts:
        yield part, part.heads


def _scores(q: Tensor, view: View, part: Part | None, of: Tensor | None, scale: float) -> Tensor:
    """f32 [B, G, n, S, L] of q [B, G, n, S, D], the heads `of` the view."""
    batch, groups, _, _, width = shape = q.shape
    rows = (q.float() * scale).reshape(batch * groups, -1, width)
    out = rows.new_empty((*rows.shape[:2], len(view)))
    a, b = view.first[0].shape[2], view.first[0].shape[2] + view.end - view.start
    for keys, where in ((view.first[0], slice(0, a)), (view.rest[0], slice(b, None))):
        if keys.shape[2]:
            torch.bmm(rows, _flat(keys, of).transpose(1, 2), out=out[:, :, where])
    if part is not None:
        _stored_scores(rows, part.keys, view, out[:, :, a:b])
    return out.view(*shape[:-1], len(view))


def _stored_scores(rows: Tensor, codes: Codes, view: View, out: Tensor) -> None:
    """Scores of the stored tokens, [B * G, rows, tokens], written to `out`."""
    for first, last, tile in _tiles(codes, view, scaled=True):
        low, high = max(first, view.start), min(last, view.end)
        where = out[:, :, low - view.start : high - view.start]
        if codes.planes == 1 and (low, high) == (first, last):
            torch.bmm(rows, tile.transpose(1, 2), out=where)
        else:
            s = torch.bmm(rows, tile.transpose(1, 2)).unflatten(-1, (codes.planes, -1))
            where.copy_(s.transpose(2, 3).flatten(2)[:, :, low - first : high - first])
    zeros = codes.zeros(view.start, view.end)
    if zeros is not None:
        zeros = zeros.flatten(0, 1).transpose(1, 2)
        if codes.by_tokens:
            skipped = view.start % codes.group
            off = torch.bmm(rows, zeros).repeat_interleave(codes.group, -1)
            out -= off[:, :, skipped : skipped + out.shape[2]]
        else:
            out -= torch.bmm(_sums(rows, codes), zeros)
    if codes.one_scale:
        out *= codes.scales(view.start, view.end).flatten(0, 1)


def _weighted(p: Tensor, view: View, part: Part | None, of: Tensor | None) -> Tensor:
    """f32 [B, G, n, S, Dv] of p f32 [B, G, n, S, L], the heads `of` the view."""
    batch, groups, many, queries, length = p.shape
    rows = p.reshape(batch * groups, many * queries, length)
    a, b = view.first[1].shape[2], view.first[1].shape[2] + view.end - view.start
    out = None if part is None else _stored_sums(rows[:, :, a:b], part.values, view)
    for values, where in ((view.first[1], slice(0, a)), (view.rest[1], slice(b, None))):
        if values.shape[2]:
            flat = _flat(values, of)
            out = torch.bmm(rows[:, :, where], flat) if out is None else out.baddbmm_(rows[:, :, where], flat)
    if out is None:
        out = rows.new_zeros((*rows.shape[:2], view.rest[1].shape[-1]))
    return out.view(batch, groups, many, queries, -1)


def _stored_sums(rows: Tensor, codes: Codes, view: View) -> Tensor:
    """Values of the stored tokens weighted by rows [B * G, rows, tokens]: f32 [B * G, rows, Dv].

    Where a token has several scales and rows are few, there are as many rows for each scale, of which each is right
    for the channels of one: the product takes hardly longer, for it waits for the tile.
    """
    count, groups = rows.shape[1], codes.scale.shape[-1]
    apart = groups > 1 and groups * (codes.fmt.group or 0) == codes.width and count * groups <= FEW
    p = rows
    if codes.one_scale or apart:
        factor = codes.scales(view.start, view.end).flatten(0, 1)
        p = (rows.unsqueeze(1) * factor.unsqueeze(2)).flatten(1, 2)
    out: Tensor | None = None
    for first, last, tile in _tiles(codes, view, scaled=not apart):
        low, high = max(first, view.start), min(last, view.end)
        weights = p[:, :, low - view.start : high - view.start]
        if (low, high) != (first, last):
            weights = F.pad(weights, (low - first, last - high))
        if codes.planes > 1:
            weights = weights.unflatten(-1, (-1, codes.planes)).transpose(2, 3).flatten(2)
        out = torch.bmm(weights, tile) if out is None else out.baddbmm_(weights, tile)
    assert out is not None
    if apart:
        blocks = out.view(-1, groups, count, groups, codes.width // groups)
        out = blocks.diagonal(dim1=1, dim2=3).transpose(2, 3).flatten(2)
    zeros = codes.zeros(view.start, view.end)
    if zeros is not None:
        off = torch.bmm(p if codes.one_scale else rows, zeros.flatten(0, 1))
        out = out - _each_channel(off, codes)
    return out


def _each_channel(x: Tensor, codes: Codes) -> Tensor:
    """One number for each group of channels, as one for each channel."""
    if x.shape[-1] == 1:
        return x
    each: Tensor = x.repeat_interleave(codes.fmt.group or 1, -1)
    return each[..., : codes.width]


def _sums(rows: Tensor, codes: Codes) -> Tensor:
    """Sums over the channels that share a scale."""
    group = min(codes.fmt.group or codes.width, codes.width)
    whole: Tensor = F.pad(rows, (0, -codes.width % group)).unflatten(-1, (-1, group))
    return whole.sum(-1)


def _tiles(codes: Codes, view: View, *, scaled: bool) -> Iterator[tuple[int, int, Tensor]]:
    """(first, last + 1, f32 [B * G, tokens, D]) of whole units that hold the view; the next one overwrites it."""
    batch, groups = codes.data.shape[:2]
    each = batch * groups * codes.width
    begin, end = codes.around(view.start, view.end)
    tokens = max(TILE // each // codes.unit, 1) * codes.unit
    room = view.scratch.floats(each * min(tokens, end - begin), codes.data.device)
    for at in range(begin, end, tokens):
        last = min(at + tokens, end)
        yield at, last, codes.tile(at, last, room, scaled=scaled).view(batch * groups, last - at, codes.width)


def _flat(x: Tensor, of: Tensor | None) -> Tensor:
    """[B, G, n, D] as f32 [B * G, n, D], of the heads `of`."""
    return (x if of is None else x[:, of]).float().flatten(0, 1)


def _five(mask: Tensor | None, groups: int, heads: int) -> Tensor | None:
    """A mask of up to four dimensions as [B, G, n, S, L], sizes of 1 left as they are."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    shaped: Tensor = mask.unflatten(1, (groups, heads // groups))
    return shaped


def _both(mask: Tensor, early: Tensor) -> Tensor:
    return mask & early if mask.dtype == torch.bool else mask.masked_fill(~early, -math.inf)


def _masked(s: Tensor, mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        s.masked_fill_(~mask, -math.inf)
    else:
        s += mask
