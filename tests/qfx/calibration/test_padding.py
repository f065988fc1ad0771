"""qfx.calibration.padding: which positions count, and that nothing which learns from data sees the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.calibration.clipping import Errors
from qfx.calibration.observers import MinMax
from qfx.calibration.padding import attended, in_positions, of_view, with_heads, without
from qfx.calibration.sample import Sample
from qfx.format import Format

B, T, K = 3, 5, 4
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
IDS = torch.arange(B * T).reshape(B, T)


def test_positions_of_the_mask_count() -> None:
    kept = attended(["input_ids", "attention_mask"], [IDS, MASK])
    assert list(kept) == [(B, T)] and torch.equal(kept[B, T], MASK.bool())
    x = torch.randn(B, T, K)
    assert torch.equal(without(x, kept), x[MASK.bool()])


@pytest.mark.parametrize(
    ("names", "batch"),
    [
        (["input_ids", "attention_mask"], [IDS, torch.ones_like(MASK)]),  # nothing is padded
        (["input_ids"], [IDS]),
        (["input_ids", "attention_mask"], [IDS, MASK.reshape(B, 1, 1, T)]),
        (["input_ids", "attention_mask"], [IDS, None]),
        (["input_ids", "attention_mask", "decoder_input_ids"], [IDS, MASK, IDS]),  # the decoder's inputs all count
        (["attention_mask", "decoder_attention_mask"], [MASK, torch.ones_like(MASK)]),
        (["attention_mask", "decoder_inputs_embeds"], [MASK, torch.randn(B, T, K)]),
        (["input_ids", "encoder_hidden_states", "encoder_attention_mask"], [IDS, torch.randn(B, T, K), MASK]),
        (["input_ids", "global_attention_mask"], [IDS, MASK]),  # Longformer's tokens that see all others
        (["input_ids", "attention_mask"], [IDS, torch.zeros_like(MASK)]),
        (["input_ids", "attention_mask"], [IDS, torch.zeros(B, T)]),  # added to scores: nothing is padded
    ],
)
def test_everything_counts(names: list[str], batch: list[Any]) -> None:
    assert attended(names, batch) == {}


@pytest.mark.parametrize("mask", [MASK.bool(), MASK.float(), (1.0 - MASK) * -1e4, MASK.float().log(), MASK * 2])
def test_masks_of_any_type_count_tokens(mask: Tensor) -> None:
    kept = attended(["input_ids", "attention_mask", "global_attention_mask"], [IDS, mask, torch.ones_like(MASK)])
    assert torch.equal(kept[B, T], MASK.bool())


def test_positions_with_a_label_count() -> None:
    """T5 makes its decoder's inputs of labels; where padding has none, as for language models, it does not count."""
    labels = torch.where(MASK == 0, -100, IDS)
    assert torch.equal(attended(["attention_mask", "labels"], [MASK, labels])[B, T], MASK.bool())
    labels[0, 3] = 1
    kept = attended(["attention_mask", "labels"], [MASK, labels])[B, T]
    assert bool(kept[0, 3]) and int(kept.sum()) == int(MASK.sum()) + 1
    assert attended(["attention_mask", "labels"], [MASK, IDS]) == {}


def test_encoder_and_decoder_have_masks_of_their_own() -> None:
    kept = attended(["attention_mask", "decoder_attention_mask"], [MASK, MASK[:, :2]])
    assert set(kept) == {(B, T), (B, 2)}


@pytest.mark.parametrize("shape", [(B, T), (B, K, T), (B * T, K), (B, T, 2, K), (T, B, K)])
def test_other_shapes_stay(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert without(x, attended(["attention_mask"], [MASK])) is x


def test_positions_of_flattened_values() -> None:
    x = torch.randn(B, T, K)
    kept = {**attended(["attention_mask"], [MASK]), (T, B): MASK.t().bool()}
    found, same = in_positions(x.reshape(-1, K), kept, (B, T), ())
    assert torch.equal(found, x) and same is kept
    other, same = in_positions(x.reshape(-1, K), kept, (1, B * T), ())
    assert other.shape == (B * T, K) and same is kept, "that input has no padding"


def test_picked_positions() -> None:
    kept, x = attended(["attention_mask"], [MASK]), torch.randn(B * T, K)
    first, second = torch.tensor([3, 0, 14, 0, 7, 11]), torch.tensor([0, 1, 2, 5, 5])
    rows, told = in_positions(x[first][second], kept, (B, T), (first, second))
    at = first[second]
    assert torch.equal(without(rows, told), x[at[MASK.reshape(-1)[at] == 1]]) and len(without(rows, told)) == 2
    assert without(rows, kept) is rows


def test_positions_of_heads() -> None:
    kept, x = attended(["attention_mask"], [MASK]), torch.randn(B, 2, T, K)
    found = without(x, with_heads(kept, x))
    assert torch.equal(found, torch.stack([x[:, head][MASK.bool()] for head in range(2)]))
    assert without(x, kept) is x, "its axes could be others"
    for other in (torch.randn(B, 2, T + 1, K), torch.randn(B, T, 2, K), torch.randn(B, T, K)):
        assert with_heads(kept, other) is kept


def test_rows_that_are_a_view_of_positions() -> None:
    """What hooks see of a live layer."""
    kept, x = attended(["attention_mask"], [MASK]), torch.randn(B, T, K)
    assert torch.equal(without(of_view(x.view(-1, K), kept), kept), x[MASK.bool()])
    wide = torch.randn(B, T, 2 * K)
    for other in (
        x.transpose(0, 1).reshape(-1, K), torch.randn(B * T, K), x.view(-1, K)[1:], x.view(1, -1, K),
        wide[..., :K].view(-1, K), torch.randn(T, B, K).view(-1, K), wide.view(-1, K)[B * T :],
    ):  # fmt: skip
        assert of_view(other, kept) is other


@pytest.mark.parametrize("granularity", ["", "head", "ch"])
@pytest.mark.parametrize("centred", [False, True])
def test_observers_of_heads_do_not_see_padding(granularity: str, centred: bool) -> None:
    """Keys are centred over all tokens, as attention does it."""
    x = torch.randn(B, 2, T, K)
    x.transpose(1, 2)[MASK == 0] *= 20
    wanted, found = (MinMax(granularity) for _ in range(2))
    found.centred = centred
    found.update(x, None, with_heads(attended(["attention_mask"], [MASK]), x))
    rows = x - x.mean(-2, keepdim=True) if centred else x
    wanted.update(torch.stack([rows[:, head][MASK.bool()] for head in range(2)]))
    assert all(torch.equal(a, b) for a, b in zip(found.range(), wanted.range(), strict=True))
    assert found.seen == wanted.seen


def test_observers_do_not_see_padding() -> None:
    x = torch.randn(B, T, K)
    x[MASK == 0] = torch.nan
    kept = attended(["attention_mask"], [MASK])
    observer = MinMax()
    observer.update(x, None, kept)
    low, high = observer.range()
    rows = x[MASK.bool()]
    assert (float(low), float(high)) == (float(rows.min()), float(rows.max())) and observer.seen == rows.numel()
    with pytest.raises(ValueError, match="not finite"):
        MinMax().update(x)


def test_errors_of_clipping_do_not_count_padding() -> None:
    x = torch.randn(B, T, K)
    observer, rows = (Errors(Format.parse("u4/tok"), [torch.eye(K)], "x") for _ in range(2))
    rows.update(x[MASK.bool()])
    x[MASK == 0] = torch.nan
    observer.update(x, None, attended(["attention_mask"], [MASK]))
    assert torch.equal(observer.errors, rows.errors) and bool((observer.errors > 0).all())


def test_halves_of_a_sample_are_of_samples_however_they_are_cut() -> None:
    """Every second sample is told apart, not half of the positions: the first token of a text is like no other."""
    x = torch.randn(8, T, K)
    x[:, 0] *= 50

    def folds(*batches: Tensor) -> list[tuple[Tensor, ...]]:
        observer = Sample(rows=10**4)
        for batch in batches:
            observer.update(batch)
        return [tuple(t.sort(0).values for t in fold) for fold in observer.folds()]

    whole = folds(x)
    assert len(whole) == 2
    for cut in (1, 2, 3):
        for fold, other in zip(folds(*x.split(cut)), whole, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(fold, other, strict=True))
    assert all(float(high.max()) > 10 for _, _, high in whole), "both have first tokens"


class Reader(nn.Module):
    """A table and two linears; padding is not mixed into other positions."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = flat
        self.table = nn.Embedding(40, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.table.weight.data[0] = 200.0  # padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        y = self.down(torch.tanh(self.up(x.view(-1, 32) if self.flat else x))).view_as(x)
        found: Tensor = x + y * attention_mask[..., None]
        return found


def padded(samples: list[Tensor], length: int) -> list[dict[str, Tensor]]:
    """Two samples a batch, filled up with token 0."""
    batches = []
    for start in range(0, len(samples), 2):
        ids = torch.stack([nn.functional.pad(s, (0, length - len(s))) for s in samples[start : start + 2]])
        batches.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    return batches


RECIPES: dict[str, dict[str, Any]] = {
    "static": {"rules": [{"target": "linear", "x": "u8", "w": "i8/ch"}]},
    "static mse": {"rules": [{"target": "linear", "x": "u8", "w": "i8/ch"}], "observer": "mse"},
    "smooth": {"rules": [{"target": "linear", "x": "u8", "w": "i8/ch"}], "rewrites": ["smooth"], "smooth_alpha": 0.5},
    "gptq": {"rules": [{"target": "linear", "w": "u3/g16"}], "rounding": "gptq"},
    "weighted": {"rules": [{"target": "linear", "w": "u3/g16"}], "rounding": "mse", "weighting": "energy"},
    "learned": {
        "rules": [{"target": "linear", "w": "u3/g16"}], "rounding": "learned", "learned": {"steps": 5, "batch": 16},
    },
    "bias": {"rules": [{"target": "linear", "w": "u3/g16"}], "bias_correction": True},
}  # fmt: skip


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_more_padding_changes_nothing(name: str, flat: bool) -> None:
    """Whether linears read [B, T, K] or [B * T, K]."""
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(1, 40, (int(n),), generator=generator) for n in torch.randint(6, 12, (8,))]
    model, recipe = Reader(flat), qfx.Recipe.parse({"name": name, **RECIPES[name]})
    short, long, bare = (
        qfx.quantize(copy.deepcopy(model), recipe, data=data).state_dict()
        for data in (
            padded(samples, 12),
            padded(samples, 40),
            [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in padded(samples, 40)],
        )
    )
    for key, value in short.items():
        assert torch.allclose(value.double(), long[key].double(), rtol=1e-5, atol=1e-6), key
    changed = [k for k, v in short.items() if not torch.allclose(v.double(), bare[k].double(), rtol=1e-3, atol=1e-4)]
    assert changed, "without a mask padding is text like any other"


class Routed(nn.Module):
    """A table and experts, of which each token takes two; attention before them where it is asked for."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = attention
        self.table, self.gate = nn.Embedding(40, 32), nn.Linear(32, 4)
        self.up = nn.Parameter(torch.randn(4, 32, 64) * 0.2)
        self.down = nn.Parameter(torch.randn(4, 64, 32) * 0.2)
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.table.weight.data[0] = 40.0  # padding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        if self.attention:
            q, k, v = (one(x).unflatten(-1, (2, 16)).transpose(1, 2) for one in (self.q, self.k, self.v))
            mask = attention_mask[:, None, None, :].bool()
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            found: Tensor = y.transpose(1, 2).flatten(2)
            return found
        rows = x.reshape(-1, 32)
        weights, experts = self.gate(rows).softmax(-1).topk(2)
        chosen = experts.reshape(-1)
        own = rows[torch.arange(chosen.shape[0], device=x.device) // 2]
        hidden = torch.tanh(torch.bmm(own[:, None], self.up[chosen]).squeeze(1))
        y = torch.bmm(hidden[:, None], self.down[chosen]).squeeze(1) * weights.reshape(-1, 1)
        back: Tensor = y.reshape(-1, 2, 32).sum(1).view_as(x) * attention_mask[..., None]
        return back


ROUTED: dict[str, tuple[bool, dict[str, Any]]] = {
    "static": (True, {"rules": [{"target": "attention", "q": "i8", "k": "i8", "v": "i8"}]}),
    "static by head": (True, {"rules": [{"target": "attention", "q": "u8/head", "k": "u8/head", "v": "i8/head"}]}),
    "static mse": (True, {"rules": [{"target": "attention", "q": "i8", "k": "i8", "v": "i8"}], "observer": "mse"}),
    "gptq": (False, {"rules": [{"target": "experts", "w": "u3/g16"}], "rounding": "gptq"}),
    "clip": (True, {"rules": [{"target": "linear", "x": "u4/tok", "w": "u3/g16"}], "rounding": "gptq"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTED)
def test_more_padding_changes_nothing_for_attention_and_experts(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(1, 40, (int(n),), generator=generator) for n in torch.randint(6, 12, (48,))]
    attention, fields = ROUTED[name]
    model, recipe = Routed(attention), qfx.Recipe.parse({"name": name, **fields})
    bare = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in padded(samples, 40)]
    short, long, other = (
        qfx.plan(copy.deepcopy(model), recipe, data=data).tensors
        for data in (padded(samples, 12), padded(samples, 40), bare)
    )
    assert short.keys() == long.keys() and len(short) >= 2
    for key, value in short.items():
        if "/k_" in key:  # keys are rounded without their mean over all tokens, of padding, too
            continue
        assert torch.allclose(value.double(), long[key].double(), rtol=1e-5, atol=1e-6), key
    assert any(not torch.allclose(v.double(), other[k].double(), rtol=1e-3, atol=1e-4) for k, v in short.items())
