"""What a quantized cache costs on the tiny language model; each figure is printed (`pytest -s`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qfx
from qfx.measuring import measure
from tests.qfx.kv.test_cache import logits
from tests.qfx.test_accuracy import ASSETS, ids_of

tf = pytest.importorskip("transformers", reason="the cache is one of transformers: pip install qfx[hf]")


@pytest.fixture(scope="module")
def model() -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    return ids_of(ASSETS / "tiny_lm")


def loss(model: Any, rows: Tensor, expected: Tensor, kv: Any, step: int = 32) -> tuple[float, float, float]:
    """KLD, rise of perplexity, bytes of half precision's."""
    cache = qfx.QuantizedCache(model.config, kv)
    found = logits(model, rows, cache, (step,) * (rows.shape[1] // step - 1))
    rise = measure.perplexity(found, rows) / measure.perplexity(expected, rows) - 1
    size = sum(fmt.nbytes(2, 32, rows.shape[1], batch=len(rows)) for fmt in cache.formats)
    size /= 6 * 2 * 2 * 32 * 2 * rows.numel()
    print(f"{cache.formats[0]}: KLD {measure.kld(expected, found):.2e}, perplexity {rise:+.3%}, bytes {size:.3f}")
    return measure.kld(expected, found), rise, size


def test_over_1024_tokens(model: Any, text: Tensor) -> None:
    rows = text[9216 : 9216 + 1024][None]
    expected = logits(model, rows, tf.DynamicCache(config=model.config))
    kld, rise, size = loss(model, rows, expected, "i8")
    assert 0 < kld <= 1e-3 and abs(rise) <= 0.002 and size <= 0.55
    kld, rise, size = loss(model, rows, expected, "i4")
    assert abs(rise) <= 0.015 and size <= 0.32
    more, fewer = (loss(model, rows, expected, {"k": k, "v": v})[0] for k, v in (("i4", "i2"), ("i2", "i4")))
    assert kld < more < fewer


@pytest.mark.slow
def test_greedy_output_is_that_of_float(model: Any, text: Tensor) -> None:
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    prompts = [text[9216 + 150 * i :][: 20 + i][None] for i in range(50)]
    same = sum(
        torch.equal(
            model.generate(p, past_key_values=qfx.QuantizedCache(model.config, "i8"), **how),
            model.generate(p, **how),
        )
        for p in prompts
    )
    print(f"{same} of 50 equal")
    assert same >= 48
