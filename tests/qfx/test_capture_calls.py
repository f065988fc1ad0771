"""qfx.capture_calls: models that loop over tokens are calibrated with texts of any lengths."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

import qfx
from qfx.capture_calls import capture_calls
from qfx.data import Call
from qfx.measuring.measure import sqnr_db


class Sums(nn.Module):
    """Running sums of tokens between linear layers: in a loop over them, or at once. masked: without padding."""

    def __init__(self, loop: bool, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.second = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.loop, self.masked = loop, masked

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.first(self.table(input_ids))
        if attention_mask is not None and self.masked:
            x = x * attention_mask[..., None]
        if self.loop:
            states = [x[:, 0]]
            for i in range(1, x.shape[1]):
                states.append(states[-1] + x[:, i])
            x = torch.stack(states, dim=1)
        else:
            x = x.cumsum(1)
        return self.second(torch.tanh(x))


def texts(*lengths: int, batch: int = 2) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, 32, (batch, length), generator=random)} for length in lengths]


def calls(data: list[dict[str, Tensor]]) -> list[Call]:
    return [((), dict(batch)) for batch in data]


def quiet(model: nn.Module, recipe: str, data: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qfx.quantize(model, recipe, data)


@pytest.mark.parametrize("recipe", ["w8a8-static", "w4a16-gptq"])
@pytest.mark.parametrize("lengths", [(20, 7, 13), (7, 20, 13)])
def test_what_was_filled_in_counts_nowhere(recipe: str, lengths: tuple[int, ...]) -> None:
    """A loop and a sum at once, which is traced for any length, come to the same weights and scales."""
    data = texts(*lengths)
    looped, plain = (quiet(Sums(loop).eval(), recipe, data) for loop in (True, False))
    ours, wanted = looped.state_dict(), plain.state_dict()
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    for batch in data:
        torch.testing.assert_close(looped(**batch), plain(**batch), rtol=1e-4, atol=1e-5)


def test_filling_is_told_once_and_is_no_loss() -> None:
    with pytest.warns(qfx.QfxWarning, match=r"Sums: its forward computes with the number of tokens, which is 7 to 20 "):
        made = qfx.plan(Sums(True).eval(), "w8a8-static", texts(20, 7), strict=True)
    assert made.annotations


def test_texts_of_one_length_are_not_filled() -> None:
    captured, flat, notes = capture_calls(Sums(True).eval(), calls(texts(9, 9, 9)))
    assert notes == [] and [x.shape for (x,) in flat] == [(2, 9)] * 3
    assert [n.meta["qfx_name"] for n in captured.gm.graph.find_nodes(op="placeholder")] == ["input_ids"]


def test_without_a_loop_nothing_is_filled() -> None:
    _, flat, notes = capture_calls(Sums(False).eval(), calls(texts(9, 5)))
    assert notes == [] and [x.shape for (x,) in flat] == [(2, 9), (2, 5)]


@pytest.mark.parametrize("how", ["no mask is read", "no mask is taken", "not a text"])
def test_where_nothing_can_be_filled_the_batch_is_named(how: str) -> None:
    model: nn.Module = Sums(True, masked=how != "no mask is read").eval()
    data: list[Any] = texts(20, 7)
    if how == "no mask is taken":
        model = Maskless(model)
    if how == "not a text":
        data = [{"input_ids": b["input_ids"].reshape(2, -1), "attention_mask": torch.ones(2, 20)} for b in data]
    with pytest.raises(ValueError, match=r"does not fit the (traced )?graph[\s\S]*cut"):
        quiet(model, "w8a8-static", data)


class Maskless(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids)


class Branch(nn.Module):
    """A length decides what is computed, and no shape tells (as RoPE whose base grows for long texts)."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.fc, self.factor = nn.Linear(8, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, 8]"""
        return torch.as_tensor(self.fc(x)) * (self.factor if x.shape[1] > 10 else 1.0)


def test_a_branch_that_another_batch_does_not_take() -> None:
    data = [torch.randn(2, 12, 8), torch.randn(2, 6, 8)]
    with pytest.raises(ValueError, match=r"batch 2 of the data does not fit the graph[\s\S]*12[\s\S]*\[2, 6, 8\]"):
        qfx.quantize(Branch(2.0).eval(), "w8a8-static", data)
    same = qfx.quantize(Branch(1.0).eval(), "w8a8-static", data)  # the branch not taken gives the same
    assert same(data[1]).shape == (2, 6, 8)


def test_one_size_that_stands_for_two_is_looked_at_afterwards() -> None:
    """Of a batch as large as its texts are long the trace does not tell which is which."""
    model = Branch(2.0).eval()
    with pytest.raises(ValueError, match="batch 2 of the data does not fit the graph"):
        qfx.quantize(model, "w8a8-static", [torch.randn(12, 12, 8), torch.randn(2, 6, 8)])


def mamba() -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=32, num_hidden_layers=1, vocab_size=32, state_size=8, time_step_rank=8, pad_token_id=0
    )
    return MambaForCausalLM(config).eval()


def test_mamba_takes_texts_of_several_lengths() -> None:
    model, data = mamba(), texts(12, 5, 9, batch=1)
    with torch.no_grad():
        wanted = [model(**batch).logits for batch in data]
        made = quiet(copy.deepcopy(model), "w8a8-smooth", data)
        found = [made(**batch).logits for batch in data]
    assert min(sqnr_db(a, b) for a, b in zip(wanted, found, strict=True)) > 25


@pytest.mark.parametrize("labels", [False, True])
def test_losses_see_the_filled_texts(labels: bool) -> None:
    data: list[Any] = texts(12, 5)
    if labels:
        data = [{**batch, "labels": batch["input_ids"]} for batch in data]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = qfx.analyze(mamba(), data, loss="causal-lm", units="layers", measure=0, progress=False)
    assert found.units and torch.isfinite(torch.tensor(next(iter(found.units)).elements)).all()
