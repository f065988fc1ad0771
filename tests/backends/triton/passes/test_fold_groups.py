"""Attention of heads that share keys: one query, many queries with a mask, and what stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx import run
from qfx.backends.triton.passes.fold_groups import fold_groups
from tests.graphs import capture, counts, text


class Attention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True, scale=0.3)


def operands(queries: int, heads: int = 6, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, heads, queries, 8), torch.randn(2, groups, 5, 8), torch.randn(2, groups, 5, 4)


def mask(rows: int, heads: int = 1) -> Tensor:
    found = torch.rand(2, heads, rows, 5) > 0.4
    found[..., 0] = True
    return found


def test_one_query_reads_the_keys_once() -> None:
    inputs = (*operands(1), mask(1))
    gm = capture(Attention(), *inputs)
    (expected,) = gm(*inputs)
    run.run(gm, [fold_groups])
    assert (
        text(gm)
        == """\
%q: f32[2,6,1,8] = input
%k: f32[2,2,5,8] = input
%v: f32[2,2,5,4] = input
%mask: b1[2,1,1,5] = input
%reshape: f32[2,2,3,8] = aten.reshape(%q, [2, 2, 3, 8])
%scaled_dot_product_attention: f32[2,2,3,4] = \
aten.scaled_dot_product_attention(%reshape, %k, %v, %mask, 0.0, False, scale=0.3)
%reshape_1: f32[2,6,1,4] = aten.reshape(%scaled_dot_product_attention, [2, 6, 1, 4])
return [%reshape_1]
"""
    )
    torch.testing.assert_close(gm(*inputs)[0], expected)


@pytest.mark.parametrize("given", [mask(3), mask(3, 6), torch.randn(3, 5)], ids=["batch", "heads", "floats"])
def test_masks_of_more_queries_repeat_the_keys(given: Tensor) -> None:
    inputs = (*operands(3), given)
    gm = capture(Attention(), *inputs)
    (expected,) = gm(*inputs)
    run.run(gm, [fold_groups])
    assert counts(gm)["repeat_interleave"] == 2
    assert "enable_gqa" not in text(gm)
    torch.testing.assert_close(gm(*inputs)[0], expected)


def test_one_query_with_a_mask_for_each_head_repeats_the_keys() -> None:
    inputs = (*operands(1), mask(1, 6))
    gm = capture(Attention(), *inputs)
    (expected,) = gm(*inputs)
    run.run(gm, [fold_groups])
    assert counts(gm)["repeat_interleave"] == 2
    torch.testing.assert_close(gm(*inputs)[0], expected)


def test_groups_without_a_mask_stay_where_torch_has_a_kernel() -> None:
    for causal, queries in ((False, 3), (True, 3)):
        gm = capture(Attention(causal), *operands(queries))
        before = text(gm)
        assert not fold_groups(gm)
        assert text(gm) == before


def test_a_varying_batch() -> None:
    inputs = (*operands(1), mask(1))
    gm = capture(Attention(), *inputs, dynamic=True)
    run.run(gm, [fold_groups])
    more = tuple(torch.cat([x, x]) for x in inputs)
    torch.testing.assert_close(gm(*more)[0], Attention()(*more))
