"""qfx.passes.rope: spelled-out rotary embeddings become qfx::rope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.passes.rope import rope
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[s0,4,s1,16] = input
%inputs_1: f32[s0,s1,16] = input
%inputs_2: f32[s0,s1,16] = input
%unsqueeze: f32[s0,1,s1,16] = aten.unsqueeze(%inputs_1, 1)
%unsqueeze_1: f32[s0,1,s1,16] = aten.unsqueeze(%inputs_2, 1)
%rope: f32[s0,4,s1,16] = qfx.rope(%inputs_0, %unsqueeze, %unsqueeze_1, False)
return [%rope]
"""


def turn_halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def turn_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def halves(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    assert x.shape[1:2] == (4,) and x.shape[3:] == cos.shape[2:] == sin.shape[2:] == (16,)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return x * cos + turn_halves(x) * sin


def chunks(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return sin.unsqueeze(1) * torch.cat((-b, a), -1) + cos.unsqueeze(1) * x


def pairs(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos.unsqueeze(1) + turn_pairs(x) * sin.unsqueeze(1)


def by_halves(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :8].unsqueeze(1), sin[..., :8].unsqueeze(1)
    a, b = x.split(8, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def sorted_pairs(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :8].unsqueeze(1), sin[..., :8].unsqueeze(1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def partial(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[..., :6].unsqueeze(1), sin[..., :6].unsqueeze(1)
    turned, rest = x[..., :6], x[..., 6:]
    return torch.cat((turned * cos + turn_halves(turned) * sin, rest), dim=-1)


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "halves": halves,
    "chunks": chunks,
    "pairs": pairs,
    "by halves": by_halves,
    "sorted pairs": sorted_pairs,
    "partial": partial,
}


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    angles = torch.rand(2, 7, 16)
    return torch.randn(2, 4, 7, 16).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)


def test_golden_text() -> None:
    gm, count = after(rope, Function(halves), *_inputs(), dynamic=True)
    assert count == 1
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_function(name: str, dtype: torch.dtype) -> None:
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    assert same(rope, Function(SPELLINGS[name]), *_inputs(dtype), limit=limit) == 1


def test_pairs_are_told_from_halves() -> None:
    for function, interleaved in ((halves, False), (pairs, True)):
        gm, _ = after(rope, Function(function), *_inputs())
        node = next(n for n in gm.graph.nodes if n.target is torch.ops.qfx.rope.default)
        assert node.args[3] is interleaved


def test_what_is_not_turned_is_cut_off_and_put_back() -> None:
    gm, _ = after(rope, Function(partial), *_inputs())
    assert counts(gm) == {"slice": 4, "unsqueeze": 2, "rope": 1, "cat": 1}


@pytest.mark.parametrize(
    "turn",
    [
        lambda x: torch.cat((x[..., 8:], -x[..., :8]), dim=-1),  # the other direction
        lambda x: torch.cat((-x[..., :8], x[..., 8:]), dim=-1),  # halves not exchanged
        lambda x: torch.cat((-x[..., 4:], x[..., :4]), dim=-1),  # not halves
        lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2),  # neighbours not exchanged
        lambda x: turn_halves(x.sin()),  # of another tensor
        lambda x: turn_halves(x.transpose(1, 2)).transpose(1, 2),
    ],
)
def test_near_misses_stay(turn: Callable[[Tensor], Tensor]) -> None:
    def function(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos.unsqueeze(1) + turn(x) * sin.unsqueeze(1)

    _, count = after(rope, Function(function), *_inputs())
    assert count == 0


def test_a_difference_is_no_sum() -> None:
    def function(own: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * cos.unsqueeze(1) - turn_halves(x) * sin.unsqueeze(1)

    _, count = after(rope, Function(function), *_inputs())
    assert count == 0
