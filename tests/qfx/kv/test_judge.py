"""qfx.kv.judge: a float cache costs nothing, a coarse one much; what it says is what the logits say."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.kv.judge import Judgement, judge, judge_each
from qfx.measuring import measure
from tests import tiny

DynamicCache: Any = pytest.importorskip("transformers", reason="caches are of transformers").DynamicCache


@cache
def model() -> Any:
    return tiny.build("llama")


def tokens(batch: int = 2, length: int = 24, seed: int = 3) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def coarse() -> Any:
    """2 bits for every token, none kept in float."""
    fmt = {"k": "u2/g8/f16", "v": "u2/g8/f16", "residual": 0, "sinks": 0}
    return qfx.QuantizedCache(model().config, fmt)


class Noise(DynamicCache):  # type: ignore[misc]
    """A float cache whose values come back `by` times as large."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args)
        return keys, values * self.by


@pytest.mark.parametrize("step", [1, 5, 24, 100])
def test_a_float_cache_costs_nothing(step: int) -> None:
    found = judge(model(), tokens(), DynamicCache(), step=step)
    assert found.kld == 0 and found.change == 0 and found.top1 == 1
    assert found.tokens == 48 and found.nbytes is None
    assert [start for start, _ in found.curve] == list(range(0, 24, step))


@torch.no_grad()
def test_perplexity_and_divergence_are_those_of_the_logits() -> None:
    """Read at once, with another cache than the float one: the sums of all steps are the whole text's."""
    ids = tokens()
    plain = model()(input_ids=ids).logits
    found = judge(model(), ids, Noise(0.5), step=7)
    other = model()(input_ids=ids, past_key_values=Noise(0.5), use_cache=True).logits
    assert found.float_perplexity == pytest.approx(measure.perplexity(plain, ids), rel=1e-5)
    assert found.perplexity == pytest.approx(measure.perplexity(other, ids), rel=1e-5)
    assert found.kld == pytest.approx(measure.kld(plain, other), rel=1e-3)
    assert found.top1 == pytest.approx(measure.top1_agreement(plain, other))
    assert found.change == pytest.approx(found.perplexity / found.float_perplexity - 1)
    assert found.kld == pytest.approx(sum(n * d for n, (_, d) in zip((7, 7, 7, 3), found.curve, strict=True)) / 24)


def test_coarser_caches_cost_more_and_say_their_bytes() -> None:
    caches = {"i8": qfx.QuantizedCache(model().config, "i8"), "coarse": coarse()}
    found = judge_each(model(), tokens(), caches)
    assert 0 < found["i8"].kld < 0.01 * found["coarse"].kld
    assert {name: one.nbytes for name, one in found.items()} == {n: c.nbytes() for n, c in caches.items()}
    assert found["i8"].float_perplexity == found["coarse"].float_perplexity
    assert all(cache.get_seq_length() == 24 for cache in caches.values())


def test_tokens_of_one_step_attend_as_the_cache_says() -> None:
    """A cache of qfx reads the new tokens as they came, so a text that is one step costs nothing."""
    assert judge(model(), tokens(), coarse(), step=24).kld == pytest.approx(0, abs=1e-6)
    assert judge(model(), tokens(), coarse(), step=1).kld > 1e-4


def test_the_first_step_of_a_cache_is_not_the_only_one() -> None:
    found = judge(model(), tokens(), coarse(), step=8)
    assert found.curve[0][1] == pytest.approx(0, abs=1e-6) and min(d for _, d in found.curve[1:]) > 1e-5


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("step", [1, 4])
def test_padding_does_not_count(left: bool, step: int) -> None:
    """A padded text gives what it gives alone."""
    ids = tokens(1, 12)
    alone = judge(model(), ids, Noise(0.5), step=12)
    pad, ones = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 12, dtype=torch.int64)

    def order(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat((a, b) if left else (b, a), 1)

    found = judge(model(), order(pad, ids), Noise(0.5), step=step, mask=order(pad, ones))
    assert found.tokens == 12
    assert found.kld == pytest.approx(alone.kld, rel=1e-3)
    assert found.perplexity == pytest.approx(alone.perplexity, rel=1e-5)
    assert found.float_perplexity == pytest.approx(alone.float_perplexity, rel=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    trained = tiny.build("llama").train()
    trained.model.norm.eval()
    judge(trained, tokens(1, 4), DynamicCache(), step=2)
    assert trained.training and not trained.model.norm.training


def test_not_finite_logits_are_not_hidden() -> None:
    found = judge(model(), tokens(), Noise(math.inf), step=4)
    assert math.isnan(found.kld) and math.isnan(found.perplexity) and math.isfinite(found.float_perplexity)


def test_the_reference_may_be_another_cache() -> None:
    one = judge(model(), tokens(), Noise(0.5), reference=Noise(0.5))
    assert one.kld == 0 and isinstance(one, Judgement)


def used() -> Any:
    found = DynamicCache()
    with torch.no_grad():
        model()(input_ids=tokens(), past_key_values=found)
    return found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ids": tokens()[0]}, "integers .B, T. with T >= 2"),
        ({"ids": tokens(length=1)}, "found: torch.int64 .2, 1."),
        ({"ids": tokens().float()}, "found: torch.float32"),
        ({"step": 0}, "a number of 1 or more"),
        ({"step": 1.5}, "found: 1.5"),
        ({"step": True}, "found: True"),
        ({"mask": torch.ones(2, 3)}, "2, 24., as the ids"),
        ({"mask": torch.zeros(2, 24)}, "padding alone"),
        ({"cache": "used"}, "holds tokens already.*24 tokens"),
        ({"reference": "used"}, "the cache 'float' holds tokens already"),
    ],
)
def test_bad_input(given: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"ids": tokens(), "cache": coarse(), **given}
    settings = {key: used() if isinstance(value, str) else value for key, value in settings.items()}
    ids, found = settings.pop("ids"), settings.pop("cache")
    with pytest.raises(ValueError, match="(?s)" + message):
        judge(model(), ids, found, **settings)


def test_logits_of_the_last_token_alone_are_refused() -> None:
    def last(**given: Any) -> Any:
        return model()(**given, logits_to_keep=1)

    with pytest.raises(ValueError, match="one row for each token"):
        judge(last, tokens(), DynamicCache(), step=3)
