"""What a cache costs: a language model with it against the same model with a float cache, on given tokens.

Teacher-forced: every token is given, whatever the model would have said. The tokens come in steps of a few, so that
what a cache stores is read back from it by all later steps:

    D = mean over tokens of KL(p || q) = sum p log(p / q)       p: with transformers' own float cache, q: with this one
    perplexity = exp(mean negative log likelihood of each token after the ones before)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qfx.data import Call
from qfx.errors import explain
from qfx.measuring import measure

FLOAT = "float"
_STEPS, _STEP = 32, 16  # of what `over_cache` reads: steps, and the most tokens of one


@dataclass(frozen=True)
class Judgement:
    """What a cache did to a model.

    kld: mean KL divergence from the float cache, nats a token. perplexity, float_perplexity: with this cache and with
    the float one. top1: share of tokens whose best guess stays. tokens: how many were judged. nbytes: of the cache at
    the end, None where it does not say. curve: (tokens read before a step, mean divergence of the step's tokens), in
    their order, so that damage which grows with the context is seen.
    """

    kld: float
    perplexity: float
    float_perplexity: float
    top1: float
    tokens: int
    nbytes: int | None
    curve: tuple[tuple[int, float], ...]

    @property
    def change(self) -> float:
        """By how much the perplexity rose, as a share of the float one."""
        return self.perplexity / self.float_perplexity - 1


def judge(
    model: Any, ids: Tensor, cache: Any, *, step: int = 1, mask: Tensor | None = None, reference: Any = None
) -> Judgement:
    """`judge_each` of a single cache, an empty one."""
    return judge_each(model, ids, {"": cache}, step=step, mask=mask, reference=reference)[""]


def judge_each(
    model: Any, ids: Tensor, caches: Mapping[str, Any], *, step: int = 1, mask: Tensor | None = None,
    reference: Any = None,
) -> dict[str, Judgement]:  # fmt: skip
    """What each of some caches does to a causal language model, all on the same tokens at the same steps.

    ids: int64 [B, T], T >= 2. caches: empty caches of transformers by name, whose tokens of one step attend as the
    cache says. step: tokens that are read at once. mask: [B, T], 0 where a token is padding and does not count.
    reference: the float cache, a DynamicCache where left out. The model runs in eval mode and is left as it was; logits
    [B, step, V] of every step are compared at once, and none are kept. Values that are not finite make the result so.
    Raises ValueError for other ids, for a cache that is not empty, and where nothing is left to be judged.
    """
    from transformers import DynamicCache

    from qfx.quantize import evaluating  # which imports much

    _check(ids, step, mask)
    plain = DynamicCache(config=getattr(model, "config", None)) if reference is None else reference
    every = {FLOAT: plain, **{f"={n}": c for n, c in caches.items()}}
    for name, cache in every.items():
        if cache.get_seq_length():
            raise ValueError(
                explain(
                    f"the cache {name.removeprefix('=')!r} holds tokens already",
                    expected="an empty one",
                    found=f"{cache.get_seq_length()} tokens",
                    next_step="make a new one",
                )
            )
    sums = {name: _Sum() for name in every}
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    last: dict[str, Tensor] = {}
    with evaluating(model) if isinstance(model, nn.Module) else torch.no_grad():
        for start in range(0, ids.shape[1], step):
            part = slice(start, start + step)
            wanted = None
            for name, cache in every.items():
                logits = _logits(model, ids, counted if mask is not None else None, part, cache)
                wanted = logits if wanted is None else wanted
                sums[name].step(start, wanted, logits, counted[:, part])
                sums[name].text(last.get(name), logits, ids, counted, start)
                last[name] = logits[:, -1:]
    return {name: sums[f"={name}"].result(sums[FLOAT], cache) for name, cache in caches.items()}


def over_cache(model: Any, kv: Any, calls: Sequence[Call]) -> Callable[..., Any]:
    """A causal language model whose calls read their tokens over an empty `QuantizedCache` of formats `kv`.

    Called with input_ids [B, T] (alone or by name) and perhaps an attention_mask [B, T], it gives an object with the
    logits [B, T, V] of all tokens, read in steps of a 32nd of them, at most 16: what a step stores is read back by the
    later ones. calls: what it will be called with. Raises ValueError where there is none, or none with so many tokens
    that some are read back in these formats.
    """
    from transformers.modeling_outputs import CausalLMOutput

    from qfx.kv.cache import QuantizedCache  # which imports much

    texts = [kwargs["input_ids"] if "input_ids" in kwargs else args[0] for args, kwargs in calls]
    longest = max((ids.shape[1] for ids in texts), default=0)
    formats = QuantizedCache(model.config, kv).formats
    if not any(fmt.stored(longest - _step_of(longest)) for fmt in formats):
        what = f"no text is so long that tokens are read back from the cache ({longest} tokens, {formats[0]})"
        raise ValueError(explain(what, next_step="give longer batches"))

    def call(input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        count, cache = input_ids.shape[1], QuantizedCache(model.config, kv)
        step = _step_of(count)
        mask = None if attention_mask is None else attention_mask.bool()
        parts = [slice(start, start + step) for start in range(0, count, step)]
        return CausalLMOutput(logits=torch.cat([_logits(model, input_ids, mask, part, cache) for part in parts], 1))

    return call


def _step_of(tokens: int) -> int:
    return max(1, min(_STEP, tokens // _STEPS))


class _Sum:
    """Sums over the steps of one cache."""

    def __init__(self) -> None:
        self.divergence, self.same, self.tokens = 0.0, 0.0, 0
        self.surprise, self.guessed = 0.0, 0
        self.curve: list[tuple[int, float]] = []

    def step(self, start: int, wanted: Tensor, found: Tensor, counted: Tensor) -> None:
        """Divergence of the logits [B, c, V] of a step that begins at token `start`."""
        count = int(counted.sum())
        if count == 0:
            return
        wanted, found = wanted[counted], found[counted]
        mean = measure.kld(wanted, found)
        self.curve.append((start, mean))
        self.divergence += mean * count
        self.same += measure.top1_agreement(wanted, found) * count
        self.tokens += count

    def text(self, before: Tensor | None, logits: Tensor, ids: Tensor, counted: Tensor, start: int) -> None:
        """Likelihood of the tokens of a step; `before`: the logits [B, 1, V] of the token ahead of it."""
        rows = logits[:, :-1] if before is None else torch.cat((before, logits[:, :-1]), 1)
        first = start + (before is None)
        end = first + rows.shape[1]
        both = counted[:, first:end] & counted[:, first - 1 : end - 1]
        if bool(both.any()):
            guesses, targets = rows[both].double(), ids[:, first:end][both]
            self.surprise += float(functional.cross_entropy(guesses, targets, reduction="sum"))
            self.guessed += len(targets)

    @property
    def perplexity(self) -> float:
        return measure.exp(self.surprise / self.guessed) if self.guessed else math.nan

    def result(self, plain: _Sum, cache: Any) -> Judgement:
        """As a Judgement, beside the float cache's sums."""
        size = getattr(cache, "nbytes", None)
        return Judgement(
            self.divergence / self.tokens, self.perplexity, plain.perplexity, self.same / self.tokens, self.tokens,
            int(size()) if callable(size) else None, tuple(self.curve),
        )  # fmt: skip


def _logits(model: Any, ids: Tensor, mask: Tensor | None, part: slice, cache: Any) -> Tensor:
    given: dict[str, Any] = {}
    if mask is not None:
        seen = mask[:, : part.stop].long()
        given = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)[:, part.start :]}
    new = ids[:, part]
    logits: Tensor = model(input_ids=new, past_key_values=cache, use_cache=True, **given).logits
    if logits.shape[:2] != new.shape:
        raise ValueError(
            explain(
                f"{type(model).__name__} gives logits of other tokens",
                expected=f"{list(new.shape)}, one row for each token",
                found=str(list(logits.shape[:2])),
                next_step="give the whole model, or export it with all_logits=True",
            )
        )
    return logits


def _check(ids: Tensor, step: int, mask: Tensor | None) -> None:
    if ids.dim() != 2 or ids.shape[1] < 2 or ids.shape[0] < 1 or ids.is_floating_point():
        raise ValueError(
            explain("token ids", expected="integers [B, T] with T >= 2", found=f"{ids.dtype} {list(ids.shape)}")
        )
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(explain("tokens of a step", expected="a number of 1 or more", found=repr(step)))
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(explain("the mask", expected=f"{list(ids.shape)}, as the ids", found=str(list(mask.shape))))
    if mask is not None and not bool(mask.bool().any()):
        raise ValueError(explain("the mask", expected="tokens that count", found="padding alone"))
