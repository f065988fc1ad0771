"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.lm_eval import bits_per_byte, nll, perplexity, windows


def uniform(ids: Tensor) -> Tensor:
    """Every one of 16 tokens alike."""
    return torch.zeros(*ids.shape, 16)


def some_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(16, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [2, 7, 64, 1000])
def test_uniform_model_has_the_vocabulary_as_perplexity(window: int) -> None:
    assert perplexity(uniform, some_ids(65), window) == pytest.approx(16.0, rel=1e-6)
    assert bits_per_byte(uniform, some_ids(65), 130, window) == pytest.approx(4 / 2, rel=1e-6)


def test_nll_is_the_mean_over_scored_tokens() -> None:
    table = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    ids = some_ids(10)
    rows = table.log_softmax(-1)
    scored = [i for i in range(1, 10) if i % 4 != 0]  # windows start at 0, 4 and 8
    wanted = -sum(float(rows[ids[i - 1], ids[i]]) for i in scored) / len(scored)
    assert nll(lambda x: table[x], ids, 4) == pytest.approx(wanted, rel=1e-5)


def test_knowing_model_has_perplexity_one() -> None:
    ids = torch.arange(100) % 16
    next_one = 50.0 * torch.eye(16).roll(1, dims=1)
    assert perplexity(lambda x: next_one[x], ids, 32) == pytest.approx(1.0, abs=1e-6)


def test_a_last_piece_of_one_token_is_left_out() -> None:
    assert [piece.shape[1] for piece in windows(torch.arange(9), 4)] == [4, 4]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"shape \[T\].*\[1, 4\]"):
        perplexity(uniform, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="integer dtype"):
        perplexity(uniform, torch.zeros(4))
    with pytest.raises(ValueError, match="at least 2 tokens, found 1"):
        perplexity(uniform, some_ids(4), window=1)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(uniform, some_ids(4), 0)
    with pytest.raises(ValueError, match="logits"):
        perplexity(lambda x: "text", some_ids(4))
