"""Attention computed again, and the types that its sums make, on patterns that are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from qfx.analysis.attentions import find
from qfx.analysis.head_types import PRIORS, TYPES, Head, prior, type_of
from qfx.analysis.patterns import Patterns, _facts, _offsets, _Sums, logits_of, probabilities
from qfx.ops import floats as float_ops
from qfx.rounding.lanes import Program
from tests.qfx.analysis.models import captured, ids, of_zoo, prepared
from tests.seeded import randn

T = 12


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_probabilities_are_those_of_fused_attention(causal: bool, masked: str | None) -> None:
    """With the identity as values the result of attention is its probabilities; key heads serve two query heads."""
    q, k = randn(2, 4, T, 8), randn(2, 2, T, 8, seed=1)
    mask = None if masked is None else torch.rand(T, T, generator=torch.Generator().manual_seed(2)) > 0.2
    if mask is not None:
        mask.fill_diagonal_(fill_value=True)
    if masked == "float" and mask is not None:
        mask = torch.zeros(T, T).masked_fill(~mask, torch.finfo(torch.float32).min)
    both = causal and mask is not None
    given: dict[str, Any] = {"query": q, "key": k, "attn_mask": mask, "is_causal": causal, "scale": None}
    if both:
        keep = torch.ones(T, T, dtype=torch.bool).tril()
        mask = mask & keep if masked == "bool" else mask.masked_fill(~keep, torch.finfo(torch.float32).min)  # type: ignore[operator,union-attr]
    wanted = sdpa(q, k.repeat_interleave(2, 1), torch.eye(T).expand(2, 4, T, T), mask, 0.0, causal and not both)
    torch.testing.assert_close(probabilities(logits_of(given)), wanted)


def test_sinks_and_softcap_take_part() -> None:
    q, k, sinks = randn(2, 4, T, 8), randn(2, 2, T, 8, seed=1), randn(4, seed=2)
    wanted = float_ops.attention(q, k, torch.eye(T).expand(2, 2, T, T), None, sinks, 0.7, True, 3.0)
    given = {"q": q, "k": k, "mask": None, "scale": 0.7, "causal": True, "softcap": 3.0}
    found = probabilities(logits_of(given), sinks)
    torch.testing.assert_close(found, wanted)
    assert (found.sum(-1) < 1).all()


def test_a_row_that_sees_nothing_is_zero() -> None:
    scores = torch.zeros(1, 1, 2, 3)
    scores[0, 0, 0] = -torch.inf
    assert probabilities(scores)[0, 0].tolist() == [[0, 0, 0], [pytest.approx(1 / 3)] * 3]


def head_of(*batches: Tensor) -> dict[str, Any]:
    """The facts of the only head whose attention [T, T] is each of the batches."""
    sums = _Sums()
    for p in batches:
        _offsets(sums, p[None, None])
    return _facts(sums, 0)


def at_offset(offset: int, size: int = T) -> Tensor:
    """Every query sees the key at one offset, those that cannot the first token."""
    p = torch.zeros(size, size)
    for query in range(size):
        p[query, query + offset if 0 <= query + offset < size else 0] = 1
    return p


def test_a_head_of_the_token_before() -> None:
    facts = head_of(at_offset(-1), at_offset(-1, size=7))
    assert facts["offset"] == -1 and facts["largest"] == 1
    assert facts["previous"] == pytest.approx(1) and facts["explained"] == pytest.approx(1)
    assert type_of(facts) == "positional"
    ahead = head_of(at_offset(2))
    assert ahead["offset"] == 2 and type_of(ahead) == "positional" and ahead["previous"] == 0


def test_a_head_that_rests_on_the_first_token() -> None:
    p = torch.zeros(T, T)
    p[:, 0] = 1
    facts = head_of(p)
    assert facts["sink"] == 1 and facts["explained"] == 0, "the first token's attention explains nothing"


def test_a_head_whose_attention_the_tokens_decide() -> None:
    """Each query sees one key of its own drawing."""
    p = torch.zeros(64, 64)
    at = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(0))
    p[torch.arange(64), at] = 1
    facts = head_of(p)
    assert facts["explained"] < 0.2 and facts["largest"] < 0.2
    assert type_of(facts) == "semantic"


def test_a_uniform_causal_head_is_not_explained_by_what_it_cannot_see() -> None:
    p = torch.ones(T, T).tril()
    p = p / p.sum(-1, keepdim=True)
    assert 0 <= head_of(p)["explained"] < 1


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"explained": 0.85, "largest": 0.1}, "positional"),
        ({"explained": 0.5, "largest": 0.95}, "positional"),
        ({"explained": 0.5, "largest": 0.5}, "mixed"),
        ({"explained": 0.5, "largest": 0.5, "induction": 0.2, "duplicate": 0.2}, "semantic"),
        ({"explained": 0.1, "largest": 0.5}, "semantic"),
        ({}, "mixed"),
    ],
)
def test_types(facts: dict[str, float], kind: str) -> None:
    assert type_of(facts) == kind
    assert type_of(facts, cross=True) == "cross"


def test_repeated_tokens_show_heads_that_look_for_them() -> None:
    """Scores that are made by hand: head 0 sees the former copy, head 1 the token after it."""
    gm, _, _ = captured_long()
    (attention,), _ = find(gm)
    patterns = Patterns([attention])
    size, period = 16, 8
    rows = torch.arange(size)

    def keys(offset: int) -> Tensor:
        scores = torch.full((size, size), -30.0)
        at = rows + offset
        scores[rows[at >= 0], at[at >= 0]] = 30.0
        return scores

    q = torch.stack([keys(-period), keys(1 - period)])[None]
    given = {"query": q, "key": torch.eye(size).expand(1, 2, size, size), "is_causal": True, "scale": 1.0}
    patterns._same_tokens(attention.node, given, period)
    first, second = patterns.heads({attention.name: "layer"})
    assert first.duplicate == pytest.approx(1) and first.induction == pytest.approx(0, abs=1e-6)
    assert second.induction == pytest.approx(1) and second.duplicate == pytest.approx(0, abs=1e-6)
    assert first.type == second.type == "semantic" and first.layer == "layer"


def captured_long() -> tuple[Any, Any, Any]:
    from tests import tiny

    return captured(tiny.build("llama"), [{"input_ids": ids(2, 16), "use_cache": False}])


def test_heads_of_a_model() -> None:
    gm, flat, _ = prepared()
    attentions, _ = find(gm)
    patterns, program = Patterns(attentions), Program(gm)
    assert patterns.repeated(program, flat[0])
    (first, second) = patterns.heads({})
    assert (first.head, second.head, first.kv_head, second.kv_head) == (0, 1, 0, 0)
    assert first.induction is not None and 0 <= first.induction <= 1
    assert first.sink is None and first.outliers is None, "no data was run"
    assert patterns.outliers() == {}


def test_a_model_without_ids_has_no_repeated_tokens() -> None:
    gm, flat, _ = of_zoo("vit")
    attentions, _ = find(gm)
    assert not Patterns(attentions).repeated(Program(gm), flat[0])


def test_outliers_are_counted_by_head() -> None:
    """One score of a thousand is far above all others: its head has it, the other has none."""
    gm, _, _ = captured_long()
    (attention,), _ = find(gm)
    patterns = Patterns([attention])
    q, k = randn(1, 2, 32, 16) * 0.1, randn(1, 2, 32, 16, seed=1)
    q[0, 1, 5], k[0, 1, 3] = 10, 10
    patterns.watch(attention.node, {"query": q, "key": k, "is_causal": True})
    found = patterns.outliers()
    assert found[attention.name, 0] == 0 < found[attention.name, 1] < 0.05
    assert found[attention.name, 1] == pytest.approx(1 / (32 * 33 / 2), rel=1.1)


def test_priors_are_tables_of_tasks() -> None:
    heads = [Head("a", "l", i, 0, kind) for i, kind in enumerate(TYPES)]
    assert prior(heads, "qa") == {("a", 0): 4, ("a", 1): 8, ("a", 2): 6, ("a", 3): 8}
    assert prior(heads, "translation")["a", 0] == 8 and prior(heads, "translation")["a", 1] == 4
    assert set(prior(heads, "classification").values()) == {8}
    assert all(set(table) == set(TYPES) for table in PRIORS.values())
    with pytest.raises(ValueError, match="no table of bits for the task 'qna', did you mean 'qa'"):
        prior(heads, "qna")
    assert not math.isnan(sum(prior(heads, "qa").values()))
