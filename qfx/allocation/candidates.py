"""The recipes that `qfx.advise` looks at: what is wanted of them, what was told of each, which are proposed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Wanted:
    """What the user asks for. max_loss: percent. ratio: at least so many times smaller than in 16 bits."""

    max_loss: float | None
    ratio: float | None
    batch: int
    sequence: int
    context: int

    def __post_init__(self) -> None:
        for name in ("max_loss", "ratio"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{name} is a number above 0, found {value!r}")
        for name, least in (("batch", 1), ("sequence", 1), ("context", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is an integer of {least} or more, found {value!r}")


@dataclass(frozen=True)
class Candidate:
    """A recipe that was looked at.

    nbytes: of all parameters and buffers once quantized (counted), before that predicted. ratio: of 16 bits to that.
    prefill, decode: predicted seconds; gain_prefill, gain_decode: how many times faster than in floats. memory: bytes
    that it takes while it runs. loss: measured, in percent; loss_error: its standard error, of perplexity alone; kld:
    measured, in nats; None where nothing was measured. misses: what it does not fulfil; empty for a proposal.
    """

    recipe: str
    nbytes: int
    ratio: float
    prefill: float
    decode: float | None
    gain_prefill: float
    gain_decode: float | None
    memory: int
    loss: float | None = None
    loss_error: float | None = None
    kld: float | None = None
    misses: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of one token, or of one call of a model that does not decode."""
        return self.prefill if self.decode is None else self.decode

    def judged(self, loss: float, loss_error: float | None, kld: float | None, most: float | None) -> Candidate:
        """With what was measured of it. most: the loss that is allowed, in percent."""
        misses = self.misses
        if most is not None and not loss <= most:
            misses = (*misses, f"a loss of {loss:.2f} %, {most:g} % is allowed (measured)")
        return replace(self, loss=loss, loss_error=loss_error, kld=kld, misses=misses)


@dataclass(frozen=True)
class Proposal:
    """A candidate that fulfils all that is wanted, and why it is proposed."""

    candidate: Candidate
    why: tuple[str, ...]


def proposals(good: Sequence[Candidate]) -> list[Proposal]:
    """The fastest, the smallest and the nearest of those that fulfil what is wanted; one may be all three."""
    why: dict[str, list[str]] = {}
    picks: list[tuple[str, Callable[[Candidate], tuple[float, float]]]] = [
        ("the fastest (predicted)", lambda c: (c.seconds, c.nbytes)),
        ("the smallest", lambda c: (c.nbytes, c.seconds)),
    ]
    if any(one.kld is not None for one in good):  # perplexity may fall by chance, which is no less of a change
        picks.append(("the nearest to the model (measured)", lambda c: (_number(c.kld), c.nbytes)))
    elif any(one.loss is not None for one in good):
        picks.append(("the least loss (measured)", lambda c: (_number(c.loss), c.nbytes)))
    for word, key in picks:
        if good:
            why.setdefault(min(good, key=key).recipe, []).append(word)
    by_name = {one.recipe: one for one in good}
    return [Proposal(by_name[name], tuple(words)) for name, words in why.items()]


def doubtful(found: Sequence[Proposal], most: float | None) -> list[str]:
    """Sentences on proposals whose loss is within two standard errors of what is allowed."""
    text = "{0.recipe}: its loss of {0.loss:+.2f} ± {0.loss_error:.2f} % may be more than {1:g} %: more data tells"
    return [
        text.format(one, most)
        for one in (proposal.candidate for proposal in found)
        if most is not None and one.loss is not None and one.loss_error is not None
        if one.loss + 2 * one.loss_error > most
    ]


def _number(value: float | None) -> float:
    return math.inf if value is None else value
