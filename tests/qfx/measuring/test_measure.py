"""The measures of how far two outputs lie apart."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.measuring import measure
from tests.seeded import randn


def test_sqnr_of_a_known_error() -> None:
    x = torch.ones(100)
    assert measure.sqnr_db(x, x * 0.9) == pytest.approx(20, abs=1e-5)
    assert measure.sqnr_db(x, x) == math.inf
    assert measure.sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert math.isnan(measure.sqnr_db(x, torch.full_like(x, math.nan)))


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(3, 10))
def test_one_bit_is_six_decibel(bits: int) -> None:
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(bits)) * 2 - 1
    coarse, fine = ((x * 2**b).round() / 2**b for b in (bits, bits + 1))
    assert measure.sqnr_db(x, fine) - measure.sqnr_db(x, coarse) == pytest.approx(6.02, abs=0.2)


def test_energies_of_batches_add_up() -> None:
    x, y = randn(6, 5), randn(6, 5, seed=1)
    pairs = [measure.energies(a, b) for a, b in zip(x.split(2), y.split(2), strict=True)]
    assert measure.decibel(sum(s for s, _ in pairs), sum(n for _, n in pairs)) == pytest.approx(measure.sqnr_db(x, y))


def test_cosine_ignores_length_and_sees_direction() -> None:
    x = randn(2, 3, 8)
    assert measure.cosine(x, 3 * x) == pytest.approx(1)
    assert measure.cosine(x, -x) == pytest.approx(-1)
    assert measure.cosine(torch.tensor([1.0, 0]), torch.tensor([0.0, 1])) == 0
    assert measure.cosine(torch.zeros(2, 4), torch.zeros(2, 4)) == 1
    assert measure.cosine(torch.zeros(2, 4), torch.ones(2, 4)) == 0


def test_kld_matches_its_definition() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    wanted = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert measure.kld(p.log(), q.log()) == pytest.approx(wanted, rel=1e-6)
    assert measure.kld(p.log(), p.log() + 5) == pytest.approx(0, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.01, 10))
def test_kld_is_never_negative(seed: int, scale: float) -> None:
    a = randn(4, 16, seed=seed) * scale
    assert measure.kld(a, a + randn(4, 16, seed=seed + 1)) >= 0


def test_divergences_are_those_of_each_position() -> None:
    a, b = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    each = measure.divergences(a, b)
    assert each.shape == (12,) and each.dtype == torch.float64
    assert float(each[5]) == pytest.approx(measure.kld(a[1, 1], b[1, 1]))
    assert float(each.mean()) == pytest.approx(measure.kld(a, b))


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    assert measure.perplexity(torch.zeros(1, 4, 50), ids) == pytest.approx(50)


def test_perplexity_scores_the_next_token() -> None:
    ids = torch.tensor([[1, 2, 3]])
    logits = torch.full((1, 3, 5), -50.0)
    logits[0, 0, 2] = logits[0, 1, 3] = 50.0  # position t says token t + 1
    assert measure.perplexity(logits, ids) == pytest.approx(1)
    assert measure.perplexity(logits.roll(1, 1), ids) > 1e10
    assert measure.perplexity(logits * 1e4, ids.roll(1)) == math.inf
    assert math.isnan(measure.perplexity(logits * math.nan, ids))


def test_top1_agreement_counts_positions() -> None:
    a = torch.eye(4)[None]
    assert measure.top1_agreement(a, a * 7) == 1
    assert measure.top1_agreement(a, a[:, [0, 1, 3, 2]]) == 0.5


def test_shapes_must_agree() -> None:
    a, b = torch.ones(2, 3), torch.ones(3, 2)
    for function in (measure.sqnr_db, measure.cosine, measure.kld, measure.top1_agreement):
        with pytest.raises(ValueError, match=r"one shape are needed, found \[2, 3\] and \[3, 2\]"):
            function(a, b)
    with pytest.raises(ValueError, match=r"found \[2, 3\] and \[3, 2\]"):
        measure.perplexity(a, b)
    for empty in (measure.kld, measure.top1_agreement, measure.cosine):
        with pytest.raises(ValueError, match=r"needed, found .* \[0, 3\]"):
            empty(a[:0], a[:0])


def test_parts_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, ids = randn(2, 5, 7), randn(2, 5, 7, seed=1), torch.arange(10).view(2, 5) % 7

    def found() -> list[float]:
        return [
            measure.kld(x, y),
            measure.cosine(x, y),
            measure.perplexity(x, ids),
            *measure.nll(x, ids).flatten().tolist(),
        ]

    whole = found()
    for elements in (1, 14, 21):
        monkeypatch.setattr(measure, "_PART", elements)
        assert found() == pytest.approx(whole, rel=1e-12)


def test_what_is_not_finite_shows_in_whichever_part() -> None:
    x = torch.zeros(3, 4)
    y = x.clone()
    y[2, 1] = math.nan
    assert math.isnan(measure.kld(x, y)) and math.isnan(measure.cosine(x, y))
