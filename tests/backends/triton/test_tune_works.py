"""What is tuned of a model: each kind of layer once, those that read the same rows together, and experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qfx
from qfx.backends.triton import lowering, tune_works
from tests import tiny
from tests.backends.triton.cases import DEVICE
from tests.graphs import capture
from tests.zoo import ZOO


def test_layers_of_a_model_once_each_and_those_that_read_the_same_together() -> None:
    model = qfx.quantize(tiny.build("llama"), "w8a8").to(torch.float16)
    found = tune_works.works_of(model)
    names = [one.name.rpartition("layers.0.")[2] for one in found]
    assert "self_attn.(q_proj+k_proj+v_proj)" in names and "mlp.(gate_proj+up_proj)" in names
    assert not any("layers.1." in one.name for one in found), "the same shapes and formats again"
    assert all(one.dtype == torch.float16 for one in found)
    with pytest.raises(ValueError, match="nothing to tune"):
        tune_works.works_of(nn.Linear(3, 3))


def test_experts_of_a_model_are_found() -> None:
    model = qfx.quantize(ZOO["mixtral"]()[0].to(DEVICE), "w4a16")
    found = [one for one in tune_works.works_of(model) if "experts" in one.name]
    assert [one.name.rpartition(".")[2] for one in found] == ["gate_up_proj", "down_proj"]
    assert found[0].read == sum(t.nbytes for t in found[0].module.buffers())
    expected = found[1].module(x := torch.randn(5, 96, device=DEVICE))
    run = lowering.lower(capture(found[1].module, x))
    torch.testing.assert_close(run(x)[0], expected, rtol=1e-4, atol=1e-5)
