"""qfx.passes.sentinels: masks of experts that no router names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.passes.sentinels import sentinels
from tests.graphs import Function, after, counts, same, text

EXPERTS = 4
GOLDEN = """\
%inputs_0: f32[5,8] = input
%mul: f32[5,8] = aten.mul.Tensor(%inputs_0, 2)
return [%mul]
"""


def picked(scores: Tensor) -> Tensor:
    return scores.softmax(-1).topk(2, -1).indices


def masked(x: Tensor, ids: Tensor, bound: int = EXPERTS) -> Tensor:
    return x.masked_fill((ids >= bound).unsqueeze(-1), 0.0)


def of_router(own: Any, x: Tensor) -> Tensor:
    """As transformers writes it: ids sorted, those of no expert at the end; biases by clamped ids."""
    ids = picked(x @ own.router)
    by_expert, order = ids.reshape(-1).sort()
    rows = masked(x[order // 2], by_expert)
    rows = rows + own.bias[by_expert.clamp(max=EXPERTS - 1)]
    return masked(rows, by_expert)


def clamped(own: Any, x: Tensor) -> Tensor:
    ids = picked(x @ own.router).reshape(-1).clamp(0, EXPERTS - 1)
    y: Tensor = x.repeat_interleave(2, 0) + own.bias[ids]
    return y


def best(own: Any, x: Tensor) -> Tensor:
    ids = (x @ own.router).argmax(-1)
    y: Tensor = masked(x, ids.to(torch.int32)) + own.bias[ids]
    return y


X = torch.randn(5, 8)
SCORES, IDS = torch.randn(5, EXPERTS), torch.tensor([9, 0, 1, 2, 3])


def layer(function: Callable[..., Tensor]) -> Function:
    return Function(function, router=torch.randn(8, EXPERTS), bias=torch.randn(EXPERTS, 8))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("function", "count"), [(of_router, 3), (clamped, 1), (best, 1)])
def test_they_go_and_nothing_changes(function: Callable[..., Tensor], count: int, dynamic: bool) -> None:
    model = layer(function)
    assert same(sentinels, model, X, dynamic=dynamic, limit=0.0) == count
    gm, _ = after(sentinels, model, X, dynamic=dynamic)
    assert not {"masked_fill", "clamp"} & set(counts(gm))


def test_golden_text() -> None:
    model = Function(lambda own, x: masked(x * 2, (x @ own.router).argmax(-1)), router=torch.randn(8, EXPERTS))
    gm, count = after(sentinels, model, X)
    assert count == 1
    assert text(gm) == GOLDEN


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x, s, ids: masked(x, s.argmax(-1), EXPERTS - 1),  # the last expert is masked
        lambda own, x, s, ids: masked(x, torch.cat([s, s], -1).argmax(-1)),  # more numbers than experts
        lambda own, x, s, ids: masked(x, s.argmax()),  # counts all elements
        lambda own, x, s, ids: x.masked_fill((s.argmax(-1) >= EXPERTS + s[0, 0] * 0).unsqueeze(-1), 0.0),
        lambda own, x, s, ids: masked(x, s.topk(2).values[:, 0]),  # not the places
        lambda own, x, s, ids: masked(x, s.argmax(-1) + 1),
        lambda own, x, s, ids: masked(x, s.argmax(-1).sort().indices),
        lambda own, x, s, ids: x + own.bias[s.argmax(-1).clamp(max=EXPERTS - 2)],
        lambda own, x, s, ids: x + own.bias[s.argmax(-1).clamp(min=1)],
        lambda own, x, s, ids: x + own.bias[s.argmax(-1).to(torch.int8).clamp(0, EXPERTS - 1).long()],  # may wrap
        lambda own, x, s, ids: x + own.bias[ids.clamp(max=EXPERTS - 1)],  # who knows what they are
        lambda own, x, s, ids: x.masked_fill((s.argmax(-1) <= EXPERTS).unsqueeze(-1), 0.0),
    ],
)
def test_what_may_change_something_stays(function: Callable[..., Tensor]) -> None:
    gm, count = after(sentinels, layer(function), X, SCORES, IDS)
    assert count == 0
    assert {"masked_fill", "clamp"} & set(counts(gm))


def test_a_mask_that_spreads_its_tensor_stays() -> None:
    model = layer(lambda own, x: masked(x, (x @ own.router).argmax(-1)[:, None]))
    assert after(sentinels, model, X)[1] == 0
