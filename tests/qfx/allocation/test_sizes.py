"""Sizes of graphs as expressions in batch, sequence and context."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from qfx.allocation.sizes import BATCH, CONTEXT, SEQUENCE, Sizes, checked, numbers
from qfx.capture import capture_export
from qfx.decoding.decoder import capture_decoder
from qfx.pipeline import prepare
from tests.zoo import ZOO


def _inputs(gm: Any) -> dict[str, tuple[Any, ...]]:
    sizes = Sizes(gm)
    return {n.name: sizes.shape(n.meta["val"]) for n in gm.graph.nodes if n.op == "placeholder"}


def test_tokens_are_batch_and_sequence() -> None:
    model, inputs = ZOO["bert"]()
    captured = capture_export(model, (), inputs)
    prepare(captured.gm)
    assert set(_inputs(captured.gm).values()) == {(BATCH, SEQUENCE)}


def test_cached_tokens_are_the_context() -> None:
    captured, names = capture_decoder(ZOO["llama"]()[0], last_only=True)
    prepare(captured.gm)
    found = _inputs(captured.gm)
    assert found["input_ids"] == (BATCH, SEQUENCE)
    assert found["attention_mask"] == (BATCH, CONTEXT + SEQUENCE)
    assert all(found[name] == (BATCH, 2, CONTEXT, 16) for name in names if name.startswith("past"))


class _Picture(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.relu()


def test_other_sizes_have_the_name_of_their_input() -> None:
    gm = capture_export(_Picture(), (torch.ones(2, 3, 8, 10),)).gm
    (shape,) = _inputs(gm).values()
    assert [str(size) for size in shape] == ["batch", "pixels_1", "pixels_2", "pixels_3"]


def test_numbers() -> None:
    assert numbers([3, BATCH * SEQUENCE + CONTEXT, 2.5], {"batch": 2, "sequence": 5, "context": 7}) == [3, 17, 2.5]
    assert numbers([sympy.Min(4, BATCH)], {"batch": 9}) == [4]


def test_a_size_that_is_missing_is_named() -> None:
    extra = sympy.Symbol("frames_2", integer=True)
    with pytest.raises(ValueError, match=r"the cost depends on frames_2(.|\n)*give frames_2=") as error:
        numbers([BATCH * extra], {"batch": 2})
    assert "expected: a value for each of batch, frames_2" in str(error.value)


@pytest.mark.parametrize("given", [{"batch": 0}, {"sequence": -1}, {"context": -1}, {"batch": True}, {"batch": 1.5}])
def test_what_is_no_size_is_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} is no size\n  expected: an integer of "):
        checked(given)
    assert checked({"batch": 1, "context": 0}) == {"batch": 1, "context": 0}
