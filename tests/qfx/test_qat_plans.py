"""Training that begins at a plan: of heads in formats of their own and another order, and at what methods rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import qfx
from qfx.backends.qat import WeightQuantizer
from qfx.live.mixed import QuantMixed
from qfx.measuring.measure import sqnr_db
from tests.qat_nets import DATA as ROWS
from tests.qat_nets import both, net, prepared
from tests.qfx.kv import models
from tests.zoo import randomize

DATA = [{"input_ids": models.ids(24, 4, seed)} for seed in (2, 3)]
WORDS = models.ids(24)


def build() -> Any:
    """A decoder with four heads, two of keys and values, as wide as a group of weights."""
    config = tf.LlamaConfig(
        vocab_size=models.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model: Any = tf.LlamaForCausalLM(config)
    randomize(model, 0)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(WORDS).logits
    return found


def trained(plan: qfx.Plan, most: float) -> tuple[Any, Any]:
    """A model that was quantized, and one that was prepared, trained for two steps and converted, by one plan."""
    quantized, model = qfx.quantize(build(), plan), qfx.prepare_qat(build(), plan)
    first = logits(quantized)
    assert sqnr_db(first, logits(model)) > most
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        model.train()
        loss = nn.functional.cross_entropy(model(WORDS).logits[:, :-1].flatten(0, 1), WORDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    after = logits(model)
    converted = qfx.convert(model)
    assert sqnr_db(logits(converted), after) > most
    assert sqnr_db(first, after) < 40, "training changed it"
    return quantized, converted


@pytest.mark.slow
def test_heads_have_formats_of_their_own_in_another_order() -> None:
    """The plan moves heads of equal formats side by side; so they are trained, and so they are packed."""
    parts = ["i8/g16", "i4/g16", "i8/g16", "i4/g16"]
    rules = [{"target": f"*.{n}_proj", "w": parts[:heads]} for n, heads in (("q", 4), ("k", 2), ("v", 2))]
    rules.append({"target": "*.o_proj", "w": parts, "along": "columns"})
    plan = qfx.plan(build(), {"rules": rules, "rewrites": ["permute-heads"]}, DATA)
    assert [record["name"] for record in plan.rewrites] == ["permute-heads"] * 2
    model = qfx.prepare_qat(build(), plan)
    own: Any = model.get_submodule("model.layers.0.self_attn")
    fakes = {name: own.get_submodule(f"{name}_proj").fake_quant.weight for name in "qko"}
    kinds = {name: [str(part.format) for part in fake.parts] for name, fake in fakes.items()}
    assert all(sorted(found) == ["i4/g16", "i8/g16"] for found in kinds.values())
    assert sorted(len(s.ranges) for s in fakes["q"].segments) == [1, 2], "two of a kind side by side"
    before = build().get_submodule("model.layers.0.self_attn.q_proj").weight
    assert not torch.equal(own.q_proj.weight, before), "heads have changed places"
    assert torch.equal(own.q_proj.weight.sort(0).values, before.sort(0).values), "and nothing else has"
    quantized, converted = trained(plan, 100)
    for model in (quantized, converted):
        mixed = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(mixed, QuantMixed) and [str(s.format) for s in mixed.segments] == kinds["q"]
    row = next(row for row in qfx.report(converted) if row.node.endswith("layers.0.self_attn.o_proj"))
    assert "i8/g16" in row.asked and "i4/g16" in row.asked


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*groups of 128 are wider:qfx.QfxWarning")
@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        *((name, 100.0) for name in ("w4a16-gptq", "w3a16-gptq", "w4a16-awq", "w4a16-hqq", "nf4-mse", "nvfp4")),
        ("mxfp4", 100.0),
        *((name, 30.0) for name in ("w8a8-smooth", "w8a8-static", "w8a8", "w4a8", "fp8", "int8-outliers")),
        ("w4a16-gptq+kv4", 100.0),
    ],
)  # fmt: skip
def test_presets_begin_where_their_method_ends(recipe: str, most: float) -> None:
    """With inputs that are rounded, a last bit of a sum moves some of them by a code."""
    plan = qfx.plan(build(), recipe, DATA)
    quantized, converted = trained(plan, most)
    assert sqnr_db(logits(build()), logits(quantized)) > 5
    texts = [{row.node: row.asked for row in qfx.report(model)} for model in (quantized, converted)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["i8/ch", "i4/b20x20"])
def test_weights_begin_with_the_codes_of_a_plan(text: str, dtype: torch.dtype) -> None:
    """In bfloat16, too, whose values lie up to half a step of 8 bits apart, and where blocks do not divide them."""
    plan = qfx.plan(net().to(dtype), {**both(text), "rounding": "gptq"}, ROWS)
    model = prepared(net().to(dtype), plan)
    for name in ("up", "down", "head"):
        module = model.get_submodule(name)
        assert torch.equal(module.fake_quant.weight.parts[0].pack(module.weight).data, plan.tensors[f"{name}/codes"])
        assert not torch.equal(module.weight, net().to(dtype).get_parameter(f"{name}.weight")), "negative control"


@pytest.mark.slow
def test_weights_of_a_plan_are_trained_with_the_plans_scales() -> None:
    """GPTQ's: its scales, and codes that are not those of the nearest values."""
    plan = qfx.plan(build(), {"rules": [{"target": "*.up_proj", "w": "u3/g32"}], "rounding": "gptq"}, DATA)
    name = "model.layers.1.mlp.up_proj"
    model: Any = qfx.prepare_qat(build(), plan)
    module = model.get_submodule(name)
    part = module.fake_quant.weight.parts[0]
    assert isinstance(part, WeightQuantizer)
    assert torch.equal(part.qparams().scale, plan.tensors[f"{name}/scale"])
    assert torch.equal(part.pack(module.weight).data, plan.tensors[f"{name}/codes"])
    plain: Any = qfx.prepare_qat(build(), {"rules": [{"target": "*.up_proj", "w": "u3/g32"}]})
    nearest = plain.get_submodule(name).fake_quant.weight.parts[0].pack(plain.get_submodule(name).weight)
    assert not torch.equal(nearest.data, plan.tensors[f"{name}/codes"]), "negative control"
