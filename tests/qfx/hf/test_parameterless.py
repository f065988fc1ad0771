"""qfx.hf.parameterless: a model without any float parameter left generates, saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qfx
from tests.zoo import ids


def olmo() -> transformers.OlmoForCausalLM:
    """Norms without weights, linears without biases."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return transformers.OlmoForCausalLM(transformers.OlmoConfig(**sizes, **special, num_attention_heads=4)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_and_dtype_are_told(dtype: torch.dtype, tmp_path: Path) -> None:
    model: Any = qfx.quantize(olmo().to(dtype), "w8a8")
    assert isinstance(model, transformers.OlmoForCausalLM) and not list(model.parameters())
    for part in (model, model.model):
        assert (part.device, part.dtype) == (torch.device("cpu"), dtype)
    wanted: Any = model.generate(ids(), max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again: list[Any] = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path), qfx.load(tmp_path)]
    for loaded in again:
        assert (loaded.device, loaded.dtype) == (torch.device("cpu"), dtype)
        assert torch.equal(loaded.generate(ids(), max_new_tokens=4, do_sample=False), wanted)
    assert model.half().dtype == model.model.dtype == torch.float16


def test_packed_parameters_and_float_ones_that_come_back() -> None:
    model: Any = qfx.quantize(olmo(), "w8a8", ignore=["embedding"])
    assert not hasattr(model, "qfx_parameterless") and model.dtype == torch.float32
    model = qfx.quantize(olmo(), "w8a8")
    model.model.norm.register_parameter("scale", torch.nn.Parameter(torch.ones(2, dtype=torch.float64)))
    assert model.dtype == torch.float64
