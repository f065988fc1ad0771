"""Store: the keys and values of one layer, appended and never stored twice.

    | first `sinks` tokens | stored tokens, `CacheFormat.step` at a time | the rest: `residual` and what fills no step |
      model's dtype          codes                                         model's dtype

Heads of the same two formats share their memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import Format
from qfx.kv import native
from qfx.kv.attend import Part, Scratch, View
from qfx.kv.codes import Codes, encode
from qfx.kv.formats import CacheFormat
from qfx.kv.tail import SLACK, Pair, Tail, finite
from qfx.numerics import QParams, require_finite

_ROLES = ("keys", "values")
_FACTS = ("batch", "number of heads", "size of a head", "dtype")
_SLACK = 256  # tokens behind a window that are kept until they are dropped together


class Store:
    """See the module. Made for the heads, sizes, dtype and batch of the first keys and values that it gets.

    where: the layer's name in messages. scratch: memory for tiles that other layers use, too.
    """

    def __init__(
        self, fmt: CacheFormat, keys: Tensor, values: Tensor, *, where: str, scratch: Scratch | None = None
    ) -> None:
        self.fmt, self.where, self.scratch, self.step = fmt, where, scratch or Scratch(), fmt.step
        fmt.check_heads(keys.shape[1], where)
        self.empty: Pair = _kept((keys[:, :, :0], values[:, :, :0]))
        self.first, self.tail = self.empty, Tail(self.empty)
        self.stored = 0  # tokens in the codes
        self.dropped = 0  # tokens before the first in the codes, which the window has left behind
        self.parts = tuple(
            Part(heads, *(Codes(f, t, by_tokens=not role) for role, (f, t) in enumerate(zip(two, both, strict=True))))
            for two, heads in alike(fmt, keys)
            for both in [tuple(t if heads is None else t[:, heads] for t in (keys, values))]
        )

    @property
    def tokens(self) -> int:
        """Tokens seen, those that a window has left behind included."""
        return self.dropped + self.first[0].shape[2] + self.stored + self.tail.end - self.tail.start

    @property
    def rest(self) -> Pair:
        """The newest tokens, as they came."""
        return self.tail.pair

    def append(self, keys: Tensor, values: Tensor) -> View:
        """Take keys [B, G, n, D] and values [B, G, n, Dv]; returns what this call's attention reads.

        The new tokens are in it as they came; as codes they are read from the next call on. Raises ValueError for
        another batch, other heads, sizes or dtypes than before, and for values that are not finite.
        """
        self._check(keys, values)
        tracked = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
        few = keys.shape[2] <= SLACK and self.first[0].shape[2] >= self.fmt.sinks and not tracked
        if not (self.tail.push(keys, values) if few else finite(keys, values)):
            for role, new in zip(_ROLES, (keys, values), strict=True):
                require_finite(new, f"{self.where}, {role}")
        rest = self.rest if few else _joined(self.rest, (keys, values))
        seen = View(self.first, self.parts, 0, self.stored, rest, self.scratch)
        if few:
            self.tail.skip(self._store(rest))
        else:
            self._take(rest, own=rest[0] is not keys)
        return seen

    def view(self) -> View:
        """All tokens held, as the next call will read them."""
        return View(self.first, self.parts, 0, self.stored, self.rest, self.scratch)

    def remove(self, tokens: int) -> None:
        """Forget the newest tokens. Those of a group of keys that is cut stay, as they come back, with the rest.

        Raises ValueError where there are not so many.
        """
        held = self.tokens - self.dropped
        if tokens > held:
            raise ValueError(
                explain(
                    f"cannot crop the cache of {self.where}",
                    expected=f"at most {held} tokens to be removed",
                    found=str(tokens),
                    next_step="`reset()` forgets everything",
                )
            )
        left = len(self.view()) - tokens
        view = self.view().narrow(0, left)
        whole = view.end // self.fmt.step * self.fmt.step
        cut = View(_none(view.first), view.parts, whole, view.end, view.rest)
        self.tail = Tail((cut.dense(0), cut.dense(1)) if whole < view.end else _kept(view.rest))
        self.first, self.stored = _kept(view.first), whole

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor, such as by selecting sequences or moving memory; what reads them now is undisturbed."""
        self.empty, self.first = ((change(k), change(v)) for k, v in (self.empty, self.first))
        self.tail = self.tail.each(change)
        to = self.empty[0].device
        self.parts = tuple(
            Part(None if p.heads is None else p.heads.to(to), p.keys.each(change), p.values.each(change))
            for p in self.parts
        )

    def drop(self, *, keep: int) -> None:
        """Forget tokens before the newest `keep`, where that frees _SLACK stored tokens at least (and no sinks)."""
        step = self.fmt.step
        gone = min(max(len(self.view()) - keep, 0), self.stored) // step * step
        if gone < _SLACK:
            return
        self.parts = tuple(Part(p.heads, p.keys.without(gone), p.values.without(gone)) for p in self.parts)
        self.stored, self.dropped = self.stored - gone, self.dropped + gone

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        floats = sum(t.numel() * t.element_size() for t in self.first)
        return floats + self.tail.nbytes + sum(part.keys.nbytes + part.values.nbytes for part in self.parts)

    def _take(self, rest: Pair, *, own: bool) -> None:
        """Fill the sinks, then store whole steps of what is left. own: nobody else has `rest`."""
        missing = self.fmt.sinks - self.first[0].shape[2]
        if missing > 0 and not self.stored:
            self.first = _kept(_joined(self.first, cut(rest, 0, missing)))
            rest = cut(rest, missing, None)
        ready = self._store(rest)
        left = cut(rest, ready, None)
        if ready == rest[0].shape[2]:
            left = self.empty
        elif not own or 2 * left[0].shape[2] < rest[0].shape[2]:
            left = _kept(left)
        self.tail = Tail((left[0].detach(), left[1].detach()))

    def _store(self, rest: Pair) -> int:
        """Store whole steps of what is beyond the residual, and return how many tokens."""
        ready = max(rest[0].shape[2] - self.fmt.residual, 0) // self.step * self.step
        for part in self.parts if ready else ():
            keys, values = (t if part.heads is None else t[:, part.heads] for t in cut(rest, 0, ready))
            write(part, keys.detach(), values.detach(), self.stored)
        self.stored += ready
        return ready

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for role, new, old in zip(_ROLES, (keys, values), self.empty, strict=True):
            another(role, facts(new), facts(old), self.where)
        another("values", (values.shape[2],), (keys.shape[2],), self.where, ("number of tokens",))


def facts(x: Tensor) -> tuple[object, ...]:
    """Batch, heads, channels and dtype of states [B, G, n, D]."""
    return x.shape[0], x.shape[1], x.shape[3], x.dtype


def another(
    role: str, found: tuple[object, ...], expected: tuple[object, ...], where: str, names: tuple[str, ...] = _FACTS
) -> None:
    """Raises ValueError, naming the layer, for the first fact that is another."""
    if found == expected:
        return
    what, new, old = next(three for three in zip(names, found, expected, strict=True) if three[1] != three[2])
    raise ValueError(
        explain(
            f"{role} of another {what} for the cache of {where}",
            expected=old,
            found=new,
            next_step="start with a new cache",
        )
    )


def write(part: Part, keys: Tensor, values: Tensor, at: int) -> None:
    """Store keys and values of the part's heads; where both are rounded alike, at once."""
    k, v = part.keys, part.values
    if native.encode(keys, k, at) and native.encode(values, v, at):
        return
    if k.by_tokens or k.fmt != v.fmt or k.width != v.width or k.fmt.is_plain:
        k.write(keys, at)
        v.write(values, at)
        return
    data, params = encode(torch.cat((keys, values), 1), k.fmt, by_tokens=False)
    assert params is not None
    heads = keys.shape[1]
    for codes, where in ((k, slice(heads)), (v, slice(heads, None))):
        zero = None if params.zero is None else params.zero[:, where]
        codes.put(data[:, where], QParams(params.scale[:, where], zero), at)


def alike(fmt: CacheFormat, keys: Tensor) -> list[tuple[tuple[Format, Format], Tensor | None]]:
    """The pairs of formats and the numbers of their heads; None where one pair serves all."""
    found: dict[tuple[Format, Format], list[int]] = {}
    for head in range(keys.shape[1]):
        found.setdefault(fmt.of_head(head), []).append(head)
    if len(found) == 1:
        return [(two, None) for two in found]
    return [(two, torch.tensor(heads, device=keys.device)) for two, heads in found.items()]


def _joined(a: Pair, b: Pair) -> Pair:
    if a[0].shape[2] == 0:
        return b
    return torch.cat((a[0], b[0]), 2), torch.cat((a[1], b[1]), 2)


def cut(pair: Pair, start: int, end: int | None) -> Pair:
    """Tokens `start` to `end` of keys and values."""
    return pair[0][:, :, start:end], pair[1][:, :, start:end]


def _none(pair: Pair) -> Pair:
    return cut(pair, 0, 0)


def _kept(pair: Pair) -> Pair:
    """In memory of their own, that what they were part of can be freed."""
    return pair[0].detach().clone(), pair[1].detach().clone()
