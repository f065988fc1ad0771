"""On the trained language model: which formula tells what a unit loses. Each figure is printed (`pytest -s`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qfx
from qfx.analysis.predictors import EVERY
from qfx.analysis.scores import METHODS
from tests.qfx.test_accuracy import ASSETS, ids_of

transformers = pytest.importorskip("transformers", reason="the model is a transformers model: pip install qfx[hf]")


def batches(count: int) -> list[dict[str, Any]]:
    rows = ids_of(ASSETS / "tiny_lm")[: 2 * count * 256].view(-1, 256)
    return [{"input_ids": pair, "use_cache": False} for pair in rows.split(2)]


@pytest.mark.slow
def test_quant_fisher_tells_the_divergence_and_no_other_formula_does() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "tiny_lm", dtype=torch.float32).eval()
    found = qfx.analyze(
        model, batches(8), method="all", formats=["u2/g64/f16", "u4/g64/f16"], measure=4, progress=False
    )
    rows = {(row.method, row.bits): row for row in found.predictions() if row.kind == EVERY}
    for (method, bits), row in rows.items():
        print(f"{method} {bits} bits: rank {row.rank:.3f}, ratio {row.ratio:.3g}, off by x{row.error:.2f}")
    for bits in (2, 4):
        best = rows["quant-fisher", bits]
        assert best.count >= 25 and best.rank >= 0.97 and 0.7 <= best.ratio <= 1.4 and best.error <= 1.5
        for method in set(METHODS) - {"quant-fisher"}:
            assert rows[method, bits].rank < best.rank and rows[method, bits].error > best.error, method
