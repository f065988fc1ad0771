"""Bits by heads of the cache, on the trained language model. Each figure is printed (`pytest -s`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qfx
from qfx.kv.judge import judge_each
from qfx.kv.plans import read
from tests.qfx.test_accuracy import ASSETS, ids_of

transformers = pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")
LENGTH = 1024


@pytest.mark.slow
def test_bits_by_heads_lose_no_more_than_as_many_bytes_everywhere() -> None:
    """Planned on the first half of the text, told on the other, where every token is given."""
    ids = ids_of(ASSETS / "tiny_lm")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32)
    data: list[Any] = [{"input_ids": row[None]} for row in ids[: 8 * LENGTH].view(-1, LENGTH)]
    plan = qfx.plan(model.eval(), "kv-heads", data, progress=False)
    caches = {"i3": qfx.QuantizedCache(model.config, "i3"), "kv-heads": qfx.QuantizedCache(model.config, plan)}
    sizes = {"i3": [fmt.nbytes(2, 32, LENGTH) for fmt in caches["i3"].formats]}
    sizes["kv-heads"] = [one.nbytes(LENGTH) for one in read(plan.caches)]
    found = judge_each(model, ids[8 * LENGTH : 16 * LENGTH].view(-1, LENGTH), caches, step=4)
    for name, one in found.items():
        print(f"{name}: {one.kld:.3g} nats, perplexity {one.change:+.3%}, {sum(sizes[name]):,} bytes")
    print(f"{found['kv-heads'].kld / found['i3'].kld:.2f} of the divergence")
    assert sum(sizes["kv-heads"]) <= sum(sizes["i3"])
    assert found["kv-heads"].kld <= found["i3"].kld
