"""What is read between the two products of an attention: scale, masks, soft cap and sinks, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx import run
from qfx.graph import is_call
from qfx.passes._scores import PRODUCTS, Scores, scores_of
from qfx.passes.cleanup import cleanup
from tests.graphs import Function, capture
from tests.passes.test_attention import LOW, capped_with_sinks, inputs, of


def read(model: Function) -> Scores | None:
    gm = capture(model, *inputs())
    run.run(gm, [cleanup])
    return scores_of([node for node in gm.graph.nodes if is_call(node, *PRODUCTS)][-1].args[0])


def test_scale_and_terms_in_their_order() -> None:
    found = read(of(lambda own, s, mask: (s * 0.5 + own.bias) * 0.25 + mask))
    assert found is not None and found.scale == 0.125 and not found.softcap and found.sinks is found.apart is None
    assert [factor for _, factor in found.terms] == [1.0, 0.25]  # the mask as it is, the bias by what follows it
    assert found.q.name == "inputs_0" and not found.fills


def test_fills_and_what_they_keep() -> None:
    found = read(of(lambda own, s, mask: torch.where(mask > -1.0, s.masked_fill(mask < -9.0, LOW), LOW)))
    assert found is not None and [(keeps, value) for _, keeps, value in found.fills] == [(True, LOW), (False, LOW)]


def test_a_soft_cap_and_sinks() -> None:
    found = read(Function(capped_with_sinks, sinks=torch.randn(4)))
    assert found is not None and found.softcap == 30.0 and found.scale == 0.25
    assert found.sinks.target == "sinks"


def test_flattened_heads_are_put_apart() -> None:
    def flat(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.bmm(q.flatten(0, 1), k.repeat_interleave(2, 1).flatten(0, 1).mT)
        weights = F.softmax(scores.reshape(2, 4, 5, 7) + mask, dim=-1)
        return torch.bmm(weights.reshape(8, 5, 7), v.repeat_interleave(2, 1).flatten(0, 1))

    found = read(Function(flat))
    assert found is not None and tuple(found.apart.meta["val"].shape) == (2, 4, 5, 7)


@pytest.mark.parametrize(
    "scores",
    [
        lambda own, s, mask: s.softmax(-1) + mask,  # a sum, not weights of scores that lead to a product
        lambda own, s, mask: torch.tanh(s) * mask,
        lambda own, s, mask: s.masked_fill(mask < -1.0, -5.0),  # seen a little
        lambda own, s, mask: 5.0 * torch.tanh((s + mask) / 5.0),  # a mask inside the cap
        lambda own, s, mask: s.relu() + mask,
    ],
)
def test_near_misses(scores: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    assert read(of(scores)) is None
