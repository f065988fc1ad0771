"""The comparison of GGUF types: the wide model is the same function, and both files are measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="a peer's package: pip install qfx[bench]")
pytest.importorskip("llama_cpp", reason="a peer's package: pip install qfx[bench]")

from examples.benchmarks import gguf_types


def test_the_wide_model_is_the_same_function() -> None:
    model = gguf_types.load(gguf_types.TINY)
    wide = gguf_types.widened(model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted, found = model(ids).logits, wide(ids).logits
    assert wide.model.embed_tokens.weight.shape == (2048, 768)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.slow
def test_a_type_by_both(tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    gguf_types.main(["Q4_0"], gguf_types.TINY, wide=False, json_file=file)
    (row,) = json.loads(file.read_text(encoding="utf-8"))
    assert row["type"] == "Q4_0" and row["qfx_bytes"] == row["llama_cpp_bytes"]
    assert row["qfx_data_bytes"] == row["llama_cpp_data_bytes"]
    assert 0 < row["qfx"] < row["llama_cpp"], "the better scales"
    assert 0 < row["qfx_gptq"] < row["qfx_data"] < row["qfx"]
    assert 0 < row["qfx_learned"] < row["qfx_gptq"]
    assert row["qfx_gptq_bytes"] == row["qfx_learned_bytes"] == row["qfx_data_bytes"]
