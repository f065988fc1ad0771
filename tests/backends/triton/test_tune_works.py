"""What is tuned of a model: each kind of layer once, those that read the same rows together, and experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import qfx
from qfx.backends.triton import lowering, tune_works
from qfx.live.mixed import QuantMixed
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


def test_layers_of_several_formats_are_found() -> None:
    rows = ["i4/g32", "i8/ch", "i4/g32", "i8/ch"]
    rules = [{"target": "linear", "w": "i8/ch"}, *({"target": f"*.{name}_proj", "w": rows} for name in "qkv")]
    found = tune_works.works_of(qfx.quantize(tiny.build("llama").to(DEVICE), {"name": "heads", "rules": rules}))
    (together,) = (one for one in found if one.name.endswith("self_attn.(q_proj+k_proj+v_proj)"))
    assert all(isinstance(layer, QuantMixed) for layer in together.module.get_submodule("layers").children())
    _lowered_gives_the_same(together)


def test_convolutions_over_windows_are_tuned_as_the_linears_that_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 8, 8)).to(DEVICE)
    (one,) = tune_works.works_of(qfx.quantize(model, "w8a8", [torch.randn(1, 3, 16, 16, device=DEVICE)]))
    assert (one.name, one.width) == ("0", 192)
    _lowered_gives_the_same(one)
    assert model(torch.randn(1, 3, 16, 16, device=DEVICE)).shape == (1, 32, 2, 2), "the model's own stays what it is"


def test_experts_of_a_model_are_found() -> None:
    model = qfx.quantize(ZOO["mixtral"]()[0].to(DEVICE), "w4a16")
    found = [one for one in tune_works.works_of(model) if "experts" in one.name]
    assert [one.name.rpartition(".")[2] for one in found] == ["gate_up_proj", "down_proj"]
    assert found[0].read == sum(t.nbytes for t in found[0].module.buffers())
    _lowered_gives_the_same(found[1])


def _lowered_gives_the_same(work: tune_works.Work) -> None:
    x = torch.randn(5, work.width, device=DEVICE)
    expected = pytree.tree_leaves(work.module(x))
    found = lowering.lower(capture(work.module, x))(x)
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)
