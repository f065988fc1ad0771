from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from qfx.kv.plans import CacheLayer
from qfx.kv.sites import cache_layers
from tests import tiny
from tests.qfx.kv import models


def test_layers_of_a_decoder_are_named_by_their_attentions() -> None:
    found, note = cache_layers(models.build())
    assert note is None
    assert found == [CacheLayer(name, i, 2, (32, 32)) for i, name in enumerate(models.NAMES)]


def test_windows_are_seen() -> None:
    found, _ = cache_layers(models.build("gemma2"))
    assert [layer.window for layer in found] == [16, None]


def test_an_encoder_decoder_has_caches_of_both_kinds_and_its_encoder_none() -> None:
    found, _ = cache_layers(tiny.build("t5"))
    assert [(layer.fqn, layer.cross) for layer in found] == [
        ("decoder.block.0.layer.0.SelfAttention", False),
        ("decoder.block.0.layer.1.EncDecAttention", True),
    ]


@pytest.mark.parametrize("made", [nn.Linear(2, 2), tiny.build("bert")], ids=["module", "encoder"])
def test_models_without_a_cache_say_so(made: nn.Module) -> None:
    found, note = cache_layers(made)
    assert found == [] and note is not None
    assert "keeps no keys and values" in note.reason and note.node == type(made).__name__


def test_a_cache_that_cannot_be_quantized_is_told() -> None:
    """When the model is quantized, and not by generate()."""
    config = transformers.FalconH1Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, mamba_n_heads=2, mamba_d_head=16, mamba_d_ssm=32, mamba_d_state=8,
    )  # fmt: skip
    found, note = cache_layers(transformers.FalconH1ForCausalLM(config))
    assert found == [] and note is not None and "'hybrid', whose states a quantized cache cannot hold" in note.reason


class _Broken(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.config = error, tiny.build("llama").config

    def forward(self, x: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        raise self.error


def test_what_cannot_be_looked_at_is_told() -> None:
    broken = _Broken(RuntimeError("no such luck"))
    del broken.config
    calls: list[Any] = [((torch.ones(2, 2),), {})]
    for given, said in (((), "no example of its inputs"), (calls, "the model has no config of transformers")):
        found, note = cache_layers(broken, given)
        assert found == [] and note is not None and said in note.reason
    for error, said in ((RuntimeError("no such luck"), "no such luck"), (AssertionError(), "AssertionError")):
        found, note = cache_layers(_Broken(error), calls)
        assert found == [] and note is not None
        assert note.reason == f"its cache could not be looked at: {type(error).__name__}: {said}"


def test_nothing_of_the_model_changes() -> None:
    model = models.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    cache_layers(model)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_json_and_back() -> None:
    layer = CacheLayer("a.b", 3, 2, (8, 16), window=7, cross=True)
    assert CacheLayer.from_json("a.b", layer.to_json()) == layer
    for wrong in ({}, {**layer.to_json(), "heads": 0}, {**layer.to_json(), "widths": [8]}, {"heads": "x"}):
        with pytest.raises(ValueError, match="'a.b' of a cache"):
            CacheLayer.from_json("a.b", wrong)
