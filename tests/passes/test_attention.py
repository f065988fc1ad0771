"""qfx.passes.attention: spelled-out attention becomes one node, repeated heads are shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx.passes.attention import attention
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[s0,4,s1,16] = input
%inputs_1: f32[s0,2,s2,16] = input
%inputs_2: f32[s0,2,s2,16] = input
%inputs_3: f32[s0,1,s1,s2] = input
%scaled_dot_product_attention: f32[s0,4,s1,16] = aten.scaled_dot_product_attention(%inputs_0, %inputs_1, %inputs_2, \
%inputs_3, enable_gqa=True)
return [%scaled_dot_product_attention]
"""
GOLDEN_FULL = """\
%inputs_0: f32[2,4,5,16] = input
%inputs_1: f32[2,2,7,16] = input
%inputs_2: f32[2,2,7,16] = input
%inputs_3: f32[2,1,5,7] = input
%attention: f32[2,4,5,16] = qfx.attention(%inputs_0, %inputs_1, %inputs_2, %inputs_3, @sinks, 0.25, False, 30.0)
return [%attention]
"""
LOW = torch.finfo(torch.float32).min


def repeated(x: Tensor, times: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def plain(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = repeated(k, 2), repeated(v, 2)
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def capped_with_sinks(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = repeated(k, 2), repeated(v, 2)
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * 0.25 / 30.0) * 30.0 + mask
    sinks = own.sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    scores = torch.cat([scores, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(scores, dim=-1)[..., :-1], v)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    hidden = torch.rand(2, 1, 5, 7) > 0.7
    hidden[..., 0] = False
    mask = torch.zeros(2, 1, 5, 7).masked_fill(hidden, torch.finfo(dtype).min)
    return q.to(dtype), k.to(dtype), v.to(dtype), mask.to(dtype)


def of(
    scores: Callable[[Any, Tensor, Tensor], Tensor], after_softmax: Callable[[Tensor], Tensor] | None = None
) -> Function:
    """Attention over as many heads everywhere, from a function of q k^T and the mask."""

    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = F.softmax(scores(own, torch.matmul(q, repeated(k, 2).mT), mask), dim=-1)
        return torch.matmul(weights if after_softmax is None else after_softmax(weights), repeated(v, 2))

    return Function(function, bias=torch.randn(4, 5, 7), sinks=torch.randn(4))


def test_golden_text() -> None:
    def fixed_heads(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        assert q.shape[1::2] == (4, 16) and k.shape[1::2] == (2, 16)  # specialises the symbols
        return plain(own, q, k, v, mask)

    gm, count = after(attention, Function(fixed_heads), *inputs(), dynamic=True)
    assert count == 1
    assert text(gm) == GOLDEN


def test_golden_text_of_what_sdpa_cannot_say() -> None:
    gm, count = after(attention, Function(capped_with_sinks, sinks=torch.randn(4)), *inputs())
    assert count == 1
    assert text(gm) == GOLDEN_FULL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [plain, capped_with_sinks])
def test_same_function(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert same(attention, Function(function, sinks=torch.randn(4).to(dtype)), *inputs(dtype), limit=limit) == 1


SPELLINGS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "no scale, no mask": lambda own, s, mask: s,
    "division": lambda own, s, mask: s / 4.0 + mask,
    "another scale": lambda own, s, mask: s * 0.1,
    "mask first": lambda own, s, mask: mask + s * 0.25,
    "bias and mask": lambda own, s, mask: s + own.bias + mask,
    "bias before the scale": lambda own, s, mask: (s + own.bias) * 0.25 + mask,
    "masked_fill": lambda own, s, mask: (s * 0.25).masked_fill(mask < -1.0, LOW),
    "where": lambda own, s, mask: torch.where(mask > -1.0, s * 0.25, LOW),
    "where and mask": lambda own, s, mask: torch.where(mask > -1.0, s, LOW) + own.bias,
    "soft cap": lambda own, s, mask: 5.0 * torch.tanh(s / 5.0) + mask,
    "soft cap and scale": lambda own, s, mask: torch.tanh(s * 0.25 / 5.0) * 5.0,
    "f64 scores": lambda own, s, mask: s.double() * 0.25,
}


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n != "f64 scores"])
def test_spellings(name: str) -> None:
    model = of(SPELLINGS[name])
    gm, _ = after(attention, model, *inputs())
    capped = "soft cap" in name
    assert counts(gm)["attention" if capped else "scaled_dot_product_attention"] == 1
    assert "softmax" not in counts(gm)
    assert same(attention, model, *inputs()) == 1


def test_fully_masked_rows_keep_their_values() -> None:
    q, k, v, mask = inputs()
    mask[0, 0, 2] = LOW
    assert same(attention, Function(plain), q, k, v, mask) == 1
    assert same(attention, of(SPELLINGS["masked_fill"]), q, k, v, mask) == 1


NEAR_MISSES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a function of the scores": lambda own, s, mask: s.exp() + mask,
    "a product with a tensor": lambda own, s, mask: s * own.bias,
    "a mask below the cap": lambda own, s, mask: torch.tanh((s + mask) / 5.0) * 5.0,
    "a cap that is none": lambda own, s, mask: torch.tanh(s / 5.0) * 4.0,
    "a soft fill": lambda own, s, mask: s.masked_fill(mask < -1.0, -5.0),
    "f64 scores": SPELLINGS["f64 scores"],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name: str) -> None:
    model = of(NEAR_MISSES[name], (lambda w: w.float()) if name == "f64 scores" else None)
    gm, count = after(attention, model, *inputs())
    expected = {"f64 scores": 1}.get(name, 0)  # up-casts lose nothing
    assert count == expected
    assert ("softmax" in counts(gm)) is not bool(expected)


def test_weights_that_are_returned_stay() -> None:
    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        weights = F.softmax(q @ repeated(k, 2).mT + mask, dim=-1)
        return weights @ repeated(v, 2), weights

    _, count = after(attention, Function(function), *inputs())
    assert count == 0


@pytest.mark.parametrize(
    "after_softmax",
    [lambda w: w * 2.0, lambda w: w.sin(), lambda w: w.transpose(0, 1).transpose(0, 1) + 1],
)
def test_changed_weights_stay(after_softmax: Callable[[Tensor], Tensor]) -> None:
    _, count = after(attention, of(lambda own, s, mask: s + mask, after_softmax), *inputs())
    assert count == 0


def test_softmax_over_another_dimension_stays() -> None:
    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.softmax(q @ repeated(k, 2).mT + mask, dim=-2) @ repeated(v, 2)

    _, count = after(attention, Function(function), *inputs())
    assert count == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_flattened_heads_with_alibi(dynamic: bool) -> None:
    def bloom(own: Any, q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, mask: Tensor) -> Tensor:
        batch, heads, length, width = q.shape
        q, k, v = (t.reshape(batch * heads, length, width) for t in (q, k, v))
        scores = torch.baddbmm(alibi, q, k.mT, beta=1.0, alpha=0.25).view(batch, heads, length, length)
        weights = F.softmax(scores + mask, dim=-1).view(batch * heads, length, length)
        return torch.bmm(weights, v).view(batch, heads, length, width)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 16) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), LOW)
    model = Function(bloom)
    gm, _ = after(attention, model, q, k, v, torch.randn(8, 1, 5), mask, dynamic=dynamic)
    assert counts(gm)["scaled_dot_product_attention"] == 1
    assert "bmm" not in counts(gm)
    assert same(attention, model, q, k, v, torch.randn(8, 1, 5), mask, dynamic=dynamic) == 1


def test_three_dimensions() -> None:
    model = Function(lambda own, q, k, v: torch.bmm(F.softmax(torch.bmm(q, k.mT) * 0.3, -1), v))
    x = (torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 8))
    gm, _ = after(attention, model, *x)
    assert counts(gm) == {"scaled_dot_product_attention": 1}
    assert same(attention, model, *x) == 1


def test_factors_of_q_and_k_join_the_scale() -> None:
    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.softmax((q * 0.5) @ (repeated(k, 2) * 0.5).mT, -1) @ repeated(v, 2)

    gm, _ = after(attention, Function(function), *inputs())
    assert counts(gm) == {"scaled_dot_product_attention": 1}
    assert same(attention, Function(function), *inputs()) == 1


@pytest.mark.parametrize("spelling", [repeated, lambda x, n: x.repeat_interleave(n, 1), lambda x, n: x[:, :1]])
def test_repeated_heads_of_a_call_are_shared(spelling: Callable[[Tensor, int], Tensor]) -> None:
    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, spelling(k, 2), spelling(v, 2), mask, scale=0.25)

    gm, count = after(attention, Function(function), *inputs())
    node = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    assert count == 1
    assert node.kwargs == {"enable_gqa": True}
    assert same(attention, Function(function), *inputs()) == 1


def test_heads_repeated_in_another_order_stay() -> None:
    def function(own: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), mask)

    _, count = after(attention, Function(function), *inputs())
    assert count == 0


@pytest.mark.parametrize(("heads", "before"), [(1, True), (8, True), (1, False), (4, False)])
def test_masks_of_flattened_heads(heads: int, before: bool) -> None:
    """A mask of three dimensions, added while heads are in the batch or after they were taken apart."""

    def flattened(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.bmm(q, k.mT) * 0.25
        scores = (scores + own.mask).view(2, 4, 5, 7) if before else scores.view(2, 4, 5, 7) + own.mask
        return torch.bmm(F.softmax(scores, dim=-1).view(8, 5, 7), v)

    model = Function(flattened, mask=torch.randn(heads, 5, 7))
    assert same(attention, model, torch.randn(8, 5, 16), torch.randn(8, 7, 16), torch.randn(8, 7, 16)) == 1


def test_heads_that_are_flattened_into_the_rows_are_left() -> None:
    def one_head(own: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.bmm(q.reshape(2, 20, 16), k.mT).view(2, 5, 4, 7) * 0.25
        return torch.bmm(F.softmax(scores, dim=-1).view(2, 20, 7), v)

    inputs = torch.randn(2, 5, 64), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    assert same(attention, Function(one_head), *inputs) == 0
