"""qfx.filling: texts of several lengths brought to one, where that leaves a model's tokens as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.filling import filled, to_length


class Text(nn.Module):
    """A running mean of embeddings [B, T, 4]; masked, or of all that it is given, or the mean of the whole text."""

    def __init__(self, how: str = "masked") -> None:
        super().__init__()
        self.table, self.how = nn.Embedding(16, 4), how

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **rest: Any
    ) -> dict[str, Tensor]:
        x = self.table(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if self.how == "masked":
            x = x * attention_mask[..., None]
        if self.how == "whole":
            return {"pooled": x.mean(1)}
        return {"states": x.cumsum(1), "pooled": (x * attention_mask[..., None]).sum(1)}


def ids(length: int, batch: int = 2) -> Tensor:
    return torch.randint(1, 16, (batch, length))


def test_texts_become_as_long_as_the_longest() -> None:
    texts = [ids(5), ids(9), ids(3)]
    calls, lengths = filled(Text(), [((), {"input_ids": text, "flag": True}) for text in texts]) or ([], range(0))
    assert (lengths[0], lengths[-1]) == (3, 9)
    for text, (args, kwargs) in zip(texts, calls, strict=True):
        assert args == () and set(kwargs) == {"input_ids", "attention_mask", "flag"} and kwargs["flag"] is True
        assert kwargs["input_ids"].shape == kwargs["attention_mask"].shape == (2, 9)
        n = text.shape[1]
        assert torch.equal(kwargs["input_ids"][:, :n], text) and not kwargs["input_ids"][:, n:].any()
        assert kwargs["attention_mask"][:, :n].all() and not kwargs["attention_mask"][:, n:].any()


def test_a_mask_that_was_given_stays() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    types = torch.ones(2, 3, dtype=torch.long)
    batches = [((ids(3), mask), {"token_type_ids": types}), ((ids(4), None), {"token_type_ids": ids(4)})]
    calls, _ = filled(Text(), batches) or ([], range(0))
    assert calls[0][1]["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert calls[0][1]["token_type_ids"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]
    assert calls[1][1]["attention_mask"].tolist() == [[1] * 4] * 2


@pytest.mark.parametrize(
    ("how", "batches"),
    [
        ("whole", [{"input_ids": ids(3)}, {"input_ids": ids(9)}]),  # a filled text means something else
        ("masked", [{"input_ids": ids(5)}, {"input_ids": ids(5)}]),  # of one length
        ("masked", [{"input_ids": ids(3), "pixels": torch.randn(2, 3)}, {"input_ids": ids(9), "pixels": None}]),
        ("masked", [{"input_ids": ids(3), "attention_mask": torch.ones(2, 1, 3, 3)}, {"input_ids": ids(9)}]),
        ("masked", [{"inputs_embeds": torch.randn(2, 3, 4)}, {"input_ids": ids(9)}]),
        ("masked", [{"input_ids": ids(3), "past": [torch.randn(2, 3)]}, {"input_ids": ids(9)}]),
    ],
)
def test_what_is_not_filled(how: str, batches: list[dict[str, Any]]) -> None:
    assert filled(Text(how), [((), batch) for batch in batches]) is None


def test_a_forward_without_a_mask_is_not_filled() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float().cumsum(1)

    assert filled(Plain(), [((ids(3),), {}), ((ids(5),), {})]) is None


def test_tokens_that_see_no_later_ones_need_not_be_masked() -> None:
    assert filled(Text("causal"), [((ids(3),), {}), ((ids(5),), {})]) is not None


@pytest.mark.parametrize(("name", "value"), [("input_ids", 0), ("attention_mask", 0), ("labels", -100)])
def test_what_fills(name: str, value: int) -> None:
    assert to_length(name, torch.ones(1, 2, dtype=torch.long), 4).tolist() == [[1, 1, value, value]]


def test_a_model_that_fails_is_not_filled() -> None:
    bad = [((), {"input_ids": torch.full((2, 3), 99)}), ((), {"input_ids": ids(9)})]
    assert filled(Text(), bad) is None
