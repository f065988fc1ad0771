"""qfx.passes.kv_cache: concatenation and attention become one operator that grows a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qfx import graph, run
from qfx.passes.cleanup import cleanup
from qfx.passes.kv_cache import kv_cache, shared
from tests.graphs import Function, capture, counts, error, text

GOLDEN = """\
%inputs_0: i64[2,3] = input
%inputs_1: b1[2,8] = input
%inputs_2: f32[2,4,3,8] = input
%inputs_3: f32[2,2,3,8] = input
%inputs_4: f32[2,2,5,8] = input
%inputs_5: f32[2,2,5,8] = input
%mul: f32[2,2,3,8] = aten.mul.Tensor(%inputs_3, 2)
%unsqueeze: b1[2,1,8] = aten.unsqueeze(%inputs_1, 1)
%unsqueeze_1: b1[2,1,1,8] = aten.unsqueeze(%unsqueeze, 2)
%cached_attention: (f32[2,4,3,8], f32[2,2,8,8], f32[2,2,8,8]) = qfx.cached_attention(%inputs_2, %inputs_3, \
%mul, %inputs_4, %inputs_5, %unsqueeze_1, None, 0.3, False, 0.0)
%getitem: f32[2,4,3,8] = getitem(%cached_attention, 0)
%getitem_1: f32[2,2,8,8] = getitem(%cached_attention, 1)
%getitem_2: f32[2,2,8,8] = getitem(%cached_attention, 2)
%unsqueeze_2: i64[2,1,3] = aten.unsqueeze(%inputs_0, 1)
%unsqueeze_3: i64[2,1,3,1] = aten.unsqueeze(%unsqueeze_2, 3)
%add: f32[2,4,3,8] = aten.add.Tensor(%getitem, %unsqueeze_3)
return [%add, %getitem_1, %getitem_2]
"""


def attend(_: Any, ids: Tensor, keep: Tensor, q: Tensor, new: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    keys, values = torch.cat([past_k, new], -2), torch.cat([past_v, new * 2], 2)
    y = F.scaled_dot_product_attention(q, keys, values, keep[:, None, None], enable_gqa=True, scale=0.3)
    return y + ids[:, None, :, None], keys, values


def inputs(old: int = 5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(old)
    q, new = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 3, 8, generator=g)
    past = [torch.randn(2, 2, old, 8, generator=g) for _ in range(2)]
    keep = torch.ones(2, old + 3, dtype=torch.bool)
    keep[1, :2] = False
    return torch.arange(6).reshape(2, 3), keep, q, new, *past


def fused(function: Any, dynamic: bool = False, pasts: tuple[str, ...] = ("inputs_4", "inputs_5")) -> Any:
    gm = capture(Function(function), *inputs(), dynamic=dynamic)
    run.run(gm, [cleanup])
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    kv_cache(gm, pasts=list(pasts), total=names[1], new=names[0])
    run.run(gm, [cleanup])
    return gm


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_operator_with_the_same_results(dynamic: bool) -> None:
    gm = fused(attend, dynamic)
    found = counts(gm)
    assert found["cached_attention"] == 1
    assert "cat" not in found
    assert set(shared(gm)["names"]) == {"inputs_4", "inputs_5"}
    for old in (5, 9) if dynamic else (5,):
        given = inputs(old)
        assert error(attend(None, *given), gm(*given)) < 1e-5


def test_golden_text() -> None:
    assert text(fused(attend)) == GOLDEN


def test_the_length_is_not_read_from_the_cache() -> None:
    def counted(own: Any, *given: Tensor) -> Any:
        y, keys, values = attend(own, *given)
        return y * given[4].shape[2], keys, values

    gm = fused(counted, dynamic=True)
    readers = [u for n in gm.graph.nodes if n.name in ("inputs_4", "inputs_5") for u in n.users]
    assert {graph.op_name(u) for u in readers} == {"cached_attention"}
    assert error(counted(None, *inputs()), gm(*inputs())) < 1e-5


def causal(own: Any, ids: Tensor, keep: Tensor, q: Tensor, new: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    keys, values = torch.cat([past_k, new], -2), torch.cat([past_v, new], -2)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True) + ids.sum() + keep.sum()


def elsewhere(own: Any, *given: Tensor) -> Any:
    y, keys, values = attend(own, *given)
    return y, keys * 2, values


def reversed_order(own: Any, ids: Tensor, keep: Tensor, q: Tensor, new: Tensor, past_k: Tensor, past_v: Tensor) -> Any:
    keys, values = torch.cat([new, past_k], -2), torch.cat([new, past_v], -2)
    y = F.scaled_dot_product_attention(q, keys, values, keep[:, None, None], enable_gqa=True)
    return y + ids[:, None, :, None], keys, values


@pytest.mark.parametrize("function", [causal, elsewhere, reversed_order])
def test_what_is_no_cache_stays(function: Any) -> None:
    gm = fused(function)
    assert counts(gm).get("cached_attention", 0) == 0
    assert not shared(gm)["names"]
    assert error(function(None, *inputs()), gm(*inputs())) < 1e-5


def test_inputs_that_are_not_named_are_no_caches() -> None:
    assert counts(fused(attend, pasts=("inputs_4",))).get("cached_attention", 0) == 0


def test_a_decoder_that_reads_no_mask_is_left_alone() -> None:
    """Nothing tells how many tokens of its cache are there (FSMT)."""
    gm = capture(Function(lambda _, past: past * 2), torch.randn(1, 2, 3, 4))
    (past,) = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    assert not kv_cache(gm, pasts=[past], total="attention_mask", new="input_ids")
    assert shared(gm) == {}
