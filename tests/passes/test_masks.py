"""qfx.passes.masks: what is always true goes, whole indices become new axes, attention spreads its mask itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.passes.masks import always_true, masks
from tests.graphs import Function, after, capture, counts, same, text

GOLDEN = """\
%inputs_0: f32[2,4,3,8] = input
%inputs_1: b1[2,3] = input
%unsqueeze: b1[2,1,3] = aten.unsqueeze(%inputs_1, 1)
%unsqueeze_1: b1[2,1,1,3] = aten.unsqueeze(%unsqueeze, 2)
%scaled_dot_product_attention: f32[2,4,3,8] = aten.scaled_dot_product_attention(%inputs_0, %inputs_0, %inputs_0, \
%unsqueeze_1)
return [%scaled_dot_product_attention]
"""


def padded(_: Any, x: Tensor, keep: Tensor) -> Tensor:
    """Attention under a mask of padding as transformers spells it for encoders."""
    batch, length = keep.shape
    rows = torch.arange(batch)[:, None, None, None]
    places = torch.arange(length)
    true = torch.ones((), dtype=torch.bool) & (places[None, None, :, None] >= 0)
    seen = true & keep[rows, places[None, None, None, :]]
    return F.scaled_dot_product_attention(x, x, x, seen.expand(batch, 1, length, length))


def inputs(batch: int = 2, length: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    x = torch.randn(batch, 4, length, 8, generator=generator)
    return x, torch.arange(length) <= torch.arange(batch)[:, None]


def test_golden_text() -> None:
    gm, count = after(masks, Function(padded), *inputs())
    assert count > 0
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_padding_mask_is_seen_to_be_one(dynamic: bool) -> None:
    gm, _ = after(masks, Function(padded), *inputs(), dynamic=dynamic)
    found = counts(gm)
    assert not {"__and__", "index", "ge", "expand", "arange"} & set(found), found
    assert same(masks, Function(padded), *inputs(), dynamic=dynamic)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5))
def test_the_function_stays(batch: int, length: int) -> None:
    same(masks, Function(padded), *inputs(batch, length))


TRUE = {
    "ones": lambda x: torch.ones(3, dtype=torch.bool),
    "new_ones": lambda x: x.new_ones(3, dtype=torch.bool),
    "full": lambda x: torch.full((3,), True),
    "views": lambda x: torch.ones(3, dtype=torch.bool)[None, :, None].expand(2, 3, 4),
    "both": lambda x: torch.ones(3, dtype=torch.bool) & (torch.arange(3) >= 0),
    "positions": lambda x: torch.arange(x.shape[0]) > -1,
    "later positions": lambda x: torch.arange(2, 5) + 1 >= 0,
}
UNKNOWN = {
    "zeros": lambda x: torch.zeros(3, dtype=torch.bool),
    "full of False": lambda x: torch.full((3,), False),
    "first is 0": lambda x: torch.arange(3) > 0,
    "a limit above": lambda x: torch.arange(3) >= 1,
    "from below zero": lambda x: torch.arange(-1, 2) >= 0,
    "less": lambda x: torch.arange(3) <= 5,
    "data": lambda x: x >= 0,
    "difference": lambda x: (torch.arange(3) - 1) >= 0,
    "with unknown": lambda x: torch.ones(3, dtype=torch.bool) & (x[:3, 0] > 0),
}


@pytest.mark.parametrize("name", TRUE)
def test_what_is_always_true(name: str) -> None:
    assert _told(TRUE[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_may_be_false(name: str) -> None:
    assert not _told(UNKNOWN[name])


def _told(make: Any) -> bool:
    gm = capture(Function(lambda own, x: (make(x), x + 1)), torch.randn(5, 4))
    mask = gm.graph.output_node().args[0][0]  # type: ignore[index]
    return always_true(mask)


KEPT = {
    "an order of its own": lambda keep, b, s: keep[torch.arange(b).flip(0)[:, None], torch.arange(s)[None]],
    "a part": lambda keep, b, s: keep[torch.arange(b)[:, None], torch.arange(s - 1)[None]],
    "shifted": lambda keep, b, s: keep[torch.arange(b)[:, None], (torch.arange(s) + 1)[None].clamp(max=s - 1)],
    "swapped axes": lambda keep, b, s: keep[torch.arange(b)[None, :], torch.arange(s)[:, None]],
    "the diagonal": lambda keep, b, s: keep[:, :b][torch.arange(b), torch.arange(b)],
}


@pytest.mark.parametrize("name", KEPT)
def test_other_indices_stay(name: str) -> None:
    def select(_: Any, keep: Tensor) -> Tensor:
        chosen: Tensor = KEPT[name](keep, *keep.shape)
        return chosen

    keep = torch.tensor([[True, False, True], [False, False, True]])
    gm, count = after(masks, Function(select), keep)
    assert count == 0
    assert counts(gm).get("index") == 1


def causal(_: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[-2])
    return F.scaled_dot_product_attention(x, x, x, (places[:, None] >= places)[None, None], scale=0.2)


def capped(_: Any, x: Tensor) -> Tensor:
    places = torch.arange(x.shape[-2])
    y: Tensor = torch.ops.qfx.attention(x, x, x, places <= places[:, None], None, 0.2, False, 5.0)
    return y


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("function", [causal, capped])
def test_attention_says_that_it_is_causal(function: Any, dynamic: bool) -> None:
    gm, count = after(masks, Function(function), inputs()[0], dynamic=dynamic)
    assert count == 1 and not {"ge", "le", "arange"} & set(counts(gm)), text(gm)
    assert "None, 0.0, True, scale=0.2" in text(gm) or "None, None, 0.2, True, 5.0" in text(gm)
    assert same(masks, Function(function), inputs()[0], dynamic=dynamic) == 1


def test_causal_and_padded_stays() -> None:
    def both(_: Any, x: Tensor, keep: Tensor) -> Tensor:
        places = torch.arange(x.shape[-2])
        return F.scaled_dot_product_attention(x, x, x, (places[:, None] >= places) & keep[:, None, None])

    gm, count = after(masks, Function(both), *inputs())
    assert count == 0 and counts(gm)["ge"] == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_prompt_without_a_cache_has_no_mask(dynamic: bool) -> None:
    """transformers looks for texts that follow each other in one row, which positions in order are not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=50,
                                         num_attention_heads=2, num_key_value_heads=2)).eval()  # fmt: skip

    def logits(own: Any, ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    ids = torch.randint(50, (2, 9))
    gm, count = after(masks, Function(logits), ids, dynamic=dynamic)
    assert count > 0 and not {"cumsum", "index", "le", "__and__"} & set(counts(gm))
    torch.testing.assert_close(gm(ids)[0], logits(None, ids))


def test_a_mask_of_rank_one_keeps_its_expand() -> None:
    def flat(_: Any, x: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, keep.expand(3, 3))

    assert same(masks, Function(flat), torch.randn(2, 4, 3, 8), torch.tensor([True, False, True])) == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_nothing_goes(dynamic: bool) -> None:
    def unpadded(_: Any, x: Tensor) -> Tensor:
        batch, length = x.shape[0], x.shape[2]
        places = torch.arange(length)[None, None, :, None]
        return F.scaled_dot_product_attention(x, x, x, (places >= 0).expand(batch, 1, length, length))

    gm, count = after(masks, Function(unpadded), inputs()[0], dynamic=dynamic)
    assert count == 1 and not {"ge", "expand", "arange"} & set(counts(gm)), text(gm)
    assert same(masks, Function(unpadded), inputs()[0], dynamic=dynamic) == 1


def test_a_row_of_a_mask_is_spread_before_attention() -> None:
    """Kernels on GPUs refuse a mask whose last axis repeats one element."""

    def by_query(_: Any, x: Tensor, keep: Tensor) -> Tensor:
        length = x.shape[2]
        return F.scaled_dot_product_attention(x, x, x, keep[:, None, :, None].expand(-1, 1, length, length))

    x, keep = inputs()
    gm, count = after(masks, Function(by_query), x, keep)
    assert count == 0 and counts(gm)["expand"] == 1
