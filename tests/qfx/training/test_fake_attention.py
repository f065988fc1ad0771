"""Attention and caches of keys and values that train with fake quantization."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.kv.cache import QuantizedCache
from qfx.kv.live import new_cache
from qfx.live import attending
from qfx.live.modules import prepared_parts, quantized_parts
from qfx.measuring.measure import sqnr_db
from qfx.training.fake_attention import CHILD, FakeAttention
from tests import tiny
from tests.qfx.kv import models
from tests.qfx.kv.test_cross import bart
from tests.qfx.live.test_attending import DYNAMIC, STATIC, WEIGHTS, Attention, Net, X, recipe

NO_P = {"target": "attention", "q": "i8/tok", "k": "u8/head", "v": "f8e4m3/tok"}
CACHES: dict[str, dict[str, Any]] = {
    "groups": {"k": "u4/g8/f16", "v": "u2/g32/f16", "residual": 4, "sinks": 2},
    "i8": {"k": "i8", "v": "i8"},
    "heads": {"k": ["i4", "i8"], "v": ["i8/tok/f16", "i2"], "residual": 3},
}


def step(model: nn.Module, x: Tensor = X) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()(x).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not (p.grad.any() or "zero_shift" in n)] == []
    optimizer.step()


def run(model: nn.Module, *args: Any) -> Tensor:
    with torch.no_grad():
        y: Any = model(*args)
    found: Tensor = getattr(y, "logits", y)
    return found


@functools.cache
def planned(name: str, kv: bool = False) -> qfx.Plan:
    """Of a recipe that stands below; a plan is not changed by what is made with it."""
    if kv:
        return qfx.plan(models.build(), recipe({"target": "cache", **CACHES[name]}))
    return qfx.plan(Net().eval(), recipe(RULES[name], WEIGHTS), data=[X, 2 * X])


BY_HEADS = {
    "target": "attention", "q": ["i8/tok", "f16", "i8/tok", "i8/tok"], "k": ["u8", "f16", "u8", "i4/tok"],
    "v": ["i8/tok", "i8", "i4", "f16"], "p": ["u8", "u8/tok", "u8", "f16"],
}  # fmt: skip
RULES: dict[str, dict[str, Any]] = {"static": STATIC, "dynamic": DYNAMIC, "without p": NO_P, "heads": BY_HEADS}


@pytest.mark.parametrize("name", ["static", pytest.param("dynamic", marks=pytest.mark.slow), "without p", "heads"])
def test_it_begins_as_quantize_gives_it_and_ends_as_convert_gives_it(name: str) -> None:
    plan, rule = planned(name), RULES[name]
    quantized, model = qfx.quantize(Net().eval(), plan), qfx.prepare_qat(Net().eval(), plan)
    first = run(quantized, X)
    assert sqnr_db(first, run(model, X)) > 60 > sqnr_db(run(Net().eval(), X), first)
    assert not quantized_parts(model) and "layers.0" in prepared_parts(model)
    static = [r for r in "qkv" if r in rule and "/tok" not in rule[r] and "dyn" not in rule[r]]
    static = ["k", "v"] if name == "heads" else static
    scales = [n for n, _ in model.named_parameters() if f"layers.0.{CHILD}" in n and "log_scale" in n]
    assert list(dict.fromkeys(n.split(".")[3] for n in scales)) == static
    step(model)
    trained = run(model.eval(), X)
    converted = qfx.convert(copy.deepcopy(model))
    assert sqnr_db(run(converted, X), trained) > 60 > sqnr_db(first, trained)
    assert not any("fake" in n for n in converted.state_dict())
    spec = attending.specs_of(converted)["layers.0"]
    asked = {r: f if isinstance(f, str) else f"[{','.join(f)}]" for r, f in rule.items() if r != "target"}
    assert asked == spec["formats"]
    before = attending.specs_of(quantized)["layers.0"]["scales"]
    assert all(spec["scales"][role] != before[role] for role in static), "learned scales are those that are kept"


def test_a_state_dict_holds_the_scales_of_attention() -> None:
    model, other = (qfx.prepare_qat(Net(), planned("static")) for _ in range(2))
    step(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other.eval(), X), run(model.eval(), X))


def test_gradients_go_straight_inside_the_range_and_stop_outside() -> None:
    """Of v alone, with one key: the result is v itself, as it comes back."""
    layer = nn.ModuleList([Attention()])
    plan = qfx.Plan(
        recipe=qfx.Recipe.parse("w8a8"), annotations={"0.x": {"v": "i8"}}, tensors={"0.x/v_scale": torch.tensor(0.01)}
    )
    plan.fingerprint = ""
    fake: Any = qfx.prepare_qat(layer, plan)[0].get_submodule(CHILD)  # type: ignore[index]
    v = torch.tensor([0.503, -0.2, 2.0, -3.0]).reshape(1, 1, 1, 4).requires_grad_()
    q = torch.zeros(1, 1, 1, 4)
    y = fake(F.scaled_dot_product_attention, q, q, v)
    assert torch.allclose(y.flatten(), torch.tensor([0.5, -0.2, 1.27, -1.27]))
    y.sum().backward()
    assert v.grad is not None and v.grad.flatten().tolist() == [1, 1, 0, 0]


def test_masks_causal_groups_of_heads_and_dropout() -> None:
    fake: Any = qfx.prepare_qat(Net(), planned("dynamic")).get_submodule(f"layers.0.{CHILD}").train()
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    mask = torch.rand(2, 1, 5, 7) > 0.3
    mask[0, 0, 2] = False  # a row that sees nothing
    given: Any = ([], [], [], [], [], [], 8**-0.5)
    texts = [DYNAMIC[role] for role in "qkvp"]
    for causal, seen in ((True, None), (False, mask), (False, torch.where(mask, 0.5, -torch.inf))):
        wanted = torch.ops.qfx.quantized_attention(q, k, v, seen, None, *given, causal, 0.0, *texts)
        found = fake(F.scaled_dot_product_attention, q, k, v, seen, 0.0, causal, enable_gqa=True)
        assert sqnr_db(wanted, found) > 60
    torch.manual_seed(0)
    many = torch.stack([fake(F.scaled_dot_product_attention, q, k, v, mask, 0.2) for _ in range(300)])
    plain = fake(F.scaled_dot_product_attention, q, k, v, mask)
    assert not torch.equal(many[0], many[1]) and sqnr_db(plain, many.mean(0)) > 15
    with pytest.raises(UnsupportedError, match="operands of 3 dimensions"):
        fake(F.scaled_dot_product_attention, q[0], k[0], v[0])


def test_multi_head_attention_of_torch_with_dropout() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    plan = qfx.plan(model, recipe(DYNAMIC, {"target": "linear", "w": "i8/ch"}), data=[X])
    quantized = qfx.quantize(copy.deepcopy(model), plan)
    model = qfx.prepare_qat(model, plan)
    assert sqnr_db(run(quantized, X), run(model, X)) > 40
    step(model)
    trained = run(model.eval(), X)
    assert sqnr_db(run(qfx.convert(model), X), trained) > 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # of Dynamo, on any such function
@pytest.mark.parametrize("name", ["static", "groups"])
def test_a_training_step_is_one_graph(name: str, fresh_dynamo: None) -> None:
    kv = name in CACHES
    x = models.ids(48, 1) if kv else X
    found = []
    for compiled in (False, True):
        model = qfx.prepare_qat(models.build() if kv else Net(), planned(name, kv)).train()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        y: Any = forward(x, use_cache=False).logits if kv else forward(x)
        y.square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found, strict=True))


def decoded(model: nn.Module, ids: Tensor, cache: Any) -> Tensor:
    rows = [run(model, ids[:, i : i + 1], None, None, cache) for i in range(ids.shape[1])]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("kv", ["groups", "heads", pytest.param("i8", marks=pytest.mark.slow)])
def test_training_reads_keys_and_values_as_decoding_with_the_cache_does(kv: str) -> None:
    ids, plan = models.ids(40), planned(kv, True)
    quantized, plain = qfx.quantize(models.build(), plan), run(models.build(), ids)
    model: Any = qfx.prepare_qat(models.build(), plan)
    assert torch.equal(run(model.eval(), ids), plain), "a prompt is read as it comes"
    wanted = decoded(quantized, ids, QuantizedCache(model.config, plan))
    assert sqnr_db(wanted, run(model.train(), ids)) > 90 > sqnr_db(plain, wanted) + 20
    model(ids).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    tokens = models.generated(model.eval())
    assert isinstance(tokens.past_key_values, QuantizedCache)
    converted = qfx.convert(model)
    assert torch.equal(models.generated(converted).sequences, tokens.sequences)
    assert not prepared_parts(converted) and qfx.report(converted).cache is not None


def test_a_prepared_model_with_a_cache_is_not_a_quantized_one(tmp_path: Any) -> None:
    model = qfx.prepare_qat(models.build(), "kv8")
    with pytest.raises(ValueError, match=r"(?s)nothing that qfx quantized.*qfx.convert"):
        qfx.save(model, tmp_path)
    with pytest.raises(ValueError, match="prepared for training"):
        qfx.prepare_qat(model, "kv8")


def test_attention_and_cache_together() -> None:
    """What is read of the cache has its formats, the rest those of attention."""
    ids = models.ids(12)
    both = {"target": "cache", "k": "i8/tok", "v": "i8/tok", "residual": 0}
    plan = qfx.plan(models.build(), recipe(DYNAMIC, both))
    model: Any = qfx.prepare_qat(models.build(), plan)
    plain, found = run(models.build(), ids), run(model.train(), ids)
    assert 20 < sqnr_db(plain, found) < 70
    model(ids).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_attention_by_hand_is_told() -> None:
    with pytest.warns(QfxWarning, match=r"layers\.1.*spells it out"):
        model = qfx.prepare_qat(Net(by_hand=True), recipe(DYNAMIC), data=[X])
    assert prepared_parts(model) == ["layers.0"]
    with pytest.raises(UnsupportedError, match="spells it out"):
        qfx.prepare_qat(Net(by_hand=True), recipe(DYNAMIC), data=[X], strict=True)
    plan = qfx.plan(models.build(), "kv4")
    plan.layouts["model.layers.0.self_attn.softmax"] = "spelled-out"
    with pytest.warns(QfxWarning, match=r"layers\.0\.self_attn.*cache of k=u4.*trains with float keys.*sdpa"):
        assert len(prepared_parts(qfx.prepare_qat(models.build(), plan))) == 1
    eager: Any = models.build()
    eager.set_attn_implementation("eager")
    with pytest.warns(QfxWarning, match=r"self_attn.*cache=k=u4.*did not call F\.scaled_dot_product_attention"):
        qfx.prepare_qat(eager, "kv4").train()(models.ids(4))


def test_formats_that_attention_cannot_have_are_refused() -> None:
    plan = copy.deepcopy(planned("static"))
    plan.tensors.pop("layers.0.scaled_dot_product_attention/k_scale")
    model: Any = Net()
    with pytest.raises(UnsupportedError, match="calibrated scale"):
        qfx.prepare_qat(model, plan)
    assert prepared_parts(model) == [] and type(model.layers[0]) is Attention


def test_a_scale_of_one_head_is_learned_and_kept() -> None:
    model: Any = qfx.prepare_qat(Net(), planned("heads"))
    keys = model.get_submodule(f"layers.0.{CHILD}.k")
    assert [str(fmt) for fmt in keys.kinds] == ["u8/head", "f16", "i4/tok"]
    before = keys.qparams()
    assert before.scale[1] == before.scale[3] == 1 and before.zero is not None and before.zero[1] == 0
    keys.parts[0].log_scale.data += 0.1
    after = keys.qparams().scale / before.scale
    assert torch.allclose(after.flatten(), torch.tensor([1.35, 1, 1.35, 1]), atol=1e-3)


@pytest.mark.slow
def test_cross_attention_reads_what_the_encoder_gave_as_it_is_stored() -> None:
    """From the second token on, as decoding does."""
    kv = {"target": "cache", "k": "u4/g4/f16", "v": "i4/g8/f16", "residual": 2, "sinks": 1}
    ids, words = tiny.ids(), torch.randint(3, tiny.VOCAB, (tiny.ids().shape[0], 20))
    plan = qfx.plan(bart(), recipe(kv))
    quantized: Any = qfx.quantize(bart(), plan)
    model = qfx.prepare_qat(bart(), plan)
    for module in model.modules():
        module.training = isinstance(module, FakeAttention)  # no dropout
    cache, rows = new_cache(quantized), []
    with torch.no_grad():
        encoded = quantized.model.encoder(ids)
        for i in range(words.shape[1]):
            step = {"decoder_input_ids": words[:, i : i + 1], "past_key_values": cache, "use_cache": True}
            rows.append(quantized(encoder_outputs=encoded, **step).logits)
        wanted, found = torch.cat(rows, 1), model(ids, decoder_input_ids=words, use_cache=False).logits
        plain = bart()(ids, decoder_input_ids=words, use_cache=False).logits
    assert len([name for name in prepared_parts(model) if "encoder_attn" in name]) == 2
    assert sqnr_db(wanted, found) > 80 > sqnr_db(plain, wanted) + 20
