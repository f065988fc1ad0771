"""Caches are updated where they lie, and only where nothing else could see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.backends.onnx import lower
from qfx.capture import capture_export
from tests.backends.onnx.checks import floats, same


class _Cache(nn.Module):
    """Writes new rows into a cache and reads it; `late` reads the former content too."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late

    def forward(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        before = cache.sum() if self.late else 0.0
        cache.index_copy_(1, at, new)
        return cache.sum(-1) + before


def given(size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    return floats(2, size, 4), torch.tensor([3, 5]), floats(2, 2, 4, seed=2)


def captured(late: bool = False) -> fx.GraphModule:
    return capture_export(_Cache(late), given(), dynamic=False).gm


def test_a_cache_is_written_in_its_own_memory() -> None:
    lowered = lower(captured(), strict=True)
    inputs = given()
    expected = inputs[0].index_copy(1, inputs[1], inputs[2])
    new, total = lowered(*inputs)
    assert new is inputs[0]
    same(new, expected)
    same(total, expected.sum(-1), 1e-5)


def test_a_strided_cache_is_left_to_the_caller() -> None:
    lowered = lower(captured(), strict=True)
    cache, at, rows = given()
    strided = cache.transpose(0, 2).contiguous().transpose(0, 2)
    new, _ = lowered(strided, at, rows)
    assert new is not strided
    same(strided, cache)
    same(new, cache.index_copy(1, at, rows))


@pytest.mark.parametrize("case", ["read before", "half"])
def test_otherwise_the_input_is_not_touched(case: str) -> None:
    inputs: Any = given()
    gm = captured(late=True)
    if case == "half":
        inputs = (inputs[0].bfloat16(), inputs[1], inputs[2].bfloat16())
        gm = capture_export(_Cache(), inputs, dynamic=False).gm
    kept = inputs[0].clone()
    lowered = lower(gm, strict=True)
    assert not lowered.models[0].in_place
    new, _ = lowered(*inputs)
    assert torch.equal(inputs[0], kept)
    same(new, kept.index_copy(1, inputs[1], inputs[2]))
