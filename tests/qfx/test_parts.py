"""qfx.parts: what a part of a model is given while the whole runs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.measuring.measure import sqnr_db


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        found = torch.as_tensor(self.fc(x)) * scale
        return found if shift is None else found + shift


class Outer(nn.Module):
    """Cuts its input by a number that it reads from a tensor, which torch.export does not take, and calls a part for
    each piece."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.idle, self.head = Inner(), nn.Linear(2, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor, cut: Tensor, use_cache: bool = True) -> Tensor:
        if use_cache:
            raise AssertionError("a graph carries no cache")
        at = int(cut)
        if at > 2:
            return torch.as_tensor(self.head(self.inner(x[:, :at], 2.0, shift=x[:, :at])))
        return torch.as_tensor(self.head(self.inner(x)))


def data() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 9, 16, generator=random), "cut": torch.tensor(at)} for at in (4, 6, 5)]


@pytest.mark.parametrize("by_name", [True, False])
def test_each_call_is_a_batch_by_name(by_name: bool) -> None:
    model = Outer().train()
    found = qfx.part_batches(model, "inner" if by_name else model.inner, data())
    assert len(found) == 3 and model.training and not model.inner._forward_pre_hooks
    for batch, whole in zip(found, data(), strict=True):
        at = int(whole["cut"])
        assert set(batch) == {"x", "scale", "shift"} and batch["scale"] == 2.0
        assert torch.equal(batch["x"], whole["x"][:, :at]) and not batch["x"].requires_grad


def test_samples_stop_early() -> None:
    assert len(qfx.part_batches(Outer(), "inner", data(), samples=3)) == 2


def test_a_part_is_calibrated_where_the_whole_cannot_be(tmp_path: Path) -> None:
    model = Outer().eval()
    with pytest.raises(qfx.UnsupportedError, match=r"next step: [\s\S]*qfx\.part_batches\(model, '"):
        qfx.quantize(copy.deepcopy(model), "w8a8-static", data())
    quantized = copy.deepcopy(model)
    qfx.quantize(quantized.inner, "w8a8-static", qfx.part_batches(quantized, quantized.inner, data()))
    for batch in data():
        assert sqnr_db(model(**batch, use_cache=False), quantized(**batch, use_cache=False)) > 30
    qfx.save(quantized, tmp_path / "m")
    again = qfx.load(tmp_path / "m", Outer())
    assert torch.equal(again(**data()[0], use_cache=False), quantized(**data()[0], use_cache=False))


def test_what_is_changed_later_was_copied() -> None:
    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            found = torch.as_tensor(self.inner(y))
            y.zero_()
            return found + y

    (batch,) = qfx.part_batches(Changes(), "inner", [torch.ones(1, 4)])
    assert torch.equal(batch["input"], torch.full((1, 4), 2.0))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("iner", r"no part 'iner', did you mean 'inner'\?"),
        ("idle", r"does not call 'idle' on this data[\s\S]*expected: a part whose forward runs"),
        (nn.Linear(2, 2), r"the Linear is no part of the Outer"),
    ],
)
def test_parts_that_are_none(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qfx.part_batches(Outer(), part, data())


def test_bad_data() -> None:
    with pytest.raises(ValueError, match="the data holds no batch"):
        qfx.part_batches(Outer(), "inner", [])
    bad = [data()[0], {"x": torch.randn(2, 9, 15), "cut": torch.tensor(4)}]
    model = Outer()
    with pytest.raises(ValueError, match="does not take batch 2 of the data"):
        qfx.part_batches(model, "inner", bad)
    assert not model.inner._forward_pre_hooks


def test_arguments_without_a_name() -> None:
    class Star(nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return torch.stack(x).sum(0)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Star()

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inner(x, x))

    with pytest.raises(ValueError, match=r"'inner' is called with 2 arguments by position[\s\S]*\(none\)"):
        qfx.part_batches(Whole(), "inner", [torch.ones(1, 4)])


def test_the_language_model_of_a_qwen_vl() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
        "window_size": 56, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()

    def batch(words: int) -> dict[str, Tensor]:
        ids = torch.cat([torch.randint(3, 59, (words,)), torch.tensor([62, 60, 60, 60, 60, 63])])[None]
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 1176),
            "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == 60).int(),
        }  # fmt: skip

    images = [batch(n) for n in (9, 5, 12)]
    quantized = copy.deepcopy(model)
    part = quantized.model.language_model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qfx.quantize(part, "w8a8-smooth", qfx.part_batches(quantized, part, images))
    with torch.no_grad():
        assert min(sqnr_db(model(**b).logits, quantized(**b).logits) for b in images) > 25
