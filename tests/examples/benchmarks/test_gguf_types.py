"""The comparison of GGUF types: the wide model is the same function, and both files are measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf", reason="a peer's package: pip install qfx[bench]")
pytest.importorskip("llama_cpp", reason="a peer's package: pip install qfx[bench]")

import typer

from examples.benchmarks import gguf_types
from examples.benchmarks.peers.llama_cpp_rounding import importance, quantize


def test_the_wide_model_is_the_same_function() -> None:
    model = gguf_types.load(gguf_types.TINY)
    wide = gguf_types.widened(model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        wanted, found = model(ids).logits, wide(ids).logits
    assert wide.model.embed_tokens.weight.shape == (2048, 768)
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


def test_the_matrix_has_the_mean_squares_of_each_linear_by_its_name_in_the_file() -> None:
    model = gguf_types.load(gguf_types.TINY)
    ids = torch.arange(40)[None]
    seen: dict[str, torch.Tensor] = {}
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    hook = down.register_forward_pre_hook(lambda _, given: seen.update(x=given[0].detach()))
    found = importance(model, [{"input_ids": ids}])
    hook.remove()
    assert "token_embd.weight" in found and "output.weight" not in found, "the tied table stands where llama.cpp looks"
    assert len(found) == 7 * model.config.num_hidden_layers + 1
    wanted = seen["x"].flatten(0, 1).square().mean(0)
    assert torch.allclose(found["blk.1.ffn_down.weight"].float(), wanted, rtol=1e-4)


def test_what_llama_cpp_refuses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="llama_model_quantize returned"):
        quantize(tmp_path / "none.gguf", tmp_path / "out.gguf", "Q4_0", {}, 1)


def test_ways_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="awq is none of gptq, learned"):
        gguf_types.main(["Q4_0"], gguf_types.TINY, ways=["awq"])


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
