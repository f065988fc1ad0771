"""qfx.live.attending: attention formats in live models; what is caught, what is left alone, what is told."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import qfx
import qfx.onnx
from qfx.errors import QfxWarning, UnsupportedError
from qfx.live import attending
from qfx.measuring.measure import sqnr_db
from tests import tiny

STATIC = {"target": "attention", "q": "i8/tok", "k": "i8", "v": "i8/head", "p": "u8/tok"}
DYNAMIC = {"target": "attention", "q": "i8/tok", "k": "i8/tok", "v": "i8/head/dyn", "p": "u8/tok"}
WEIGHTS = {"target": "linear", "x": "i8/tok", "w": "i8/ch"}


class Attention(nn.Module):
    """Causal self-attention of 4 heads."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.by_hand = nn.Linear(32, 96), nn.Linear(32, 32), by_hand

    def forward(self, x: Tensor, hook: Callable[[Tensor], Tensor] = lambda key: key) -> Tensor:
        q, k, v = (t.view(*x.shape[:2], 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.by_hand:
            y = (q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, hook(k), v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Net(nn.Module):
    """Two layers of attention, the second of them perhaps spelled out."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(), Attention(by_hand)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


X = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))


def recipe(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"rules": list(rules)}


def ran(model: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


def test_a_live_model_multiplies_rounded_operands() -> None:
    model = Net().eval()
    wanted, keys, mode = ran(model, X), list(model.state_dict()), F.scaled_dot_product_attention
    assert qfx.quantize(model, recipe(STATIC), data=[X, 2 * X]) is model
    found = ran(model, X)
    assert 35 < sqnr_db(wanted, found) < 80
    assert list(model.state_dict()) == keys
    assert F.scaled_dot_product_attention is mode
    assert isinstance(model.layers[0], Attention) and type(model.layers[0]).__name__ == "Attention"
    spec = attending.specs_of(model)["layers.0"]
    assert spec["name"] == "layers.0.scaled_dot_product_attention"
    assert (len(spec["scales"]["k"]), len(spec["scales"]["v"])) == (1, 4)


def test_the_report_tells_it() -> None:
    model = qfx.quantize(Net().eval(), recipe(STATIC, WEIGHTS), data=[X])
    rows = {row.node: row for row in qfx.report(model)}
    row = rows["layers.0.scaled_dot_product_attention"]
    assert (row.op, row.asked) == ("attention", "q=i8/tok k=i8 v=i8/head p=u8/tok")
    assert row.kernel == "qfx::quantized_attention (reference)"
    assert row.sqnr_db is not None and row.sqnr_db > 30
    assert rows["layers.0.qkv"].asked == "x=i8/tok w=i8/ch"


def test_copies_and_plans_carry_it(tmp_path: Path) -> None:
    plan = qfx.plan(Net().eval(), recipe(STATIC), data=[X])
    assert set(plan.tensors) >= {f"layers.{i}.scaled_dot_product_attention/{r}_scale" for i in (0, 1) for r in "kv"}
    plan.save(tmp_path)
    model = qfx.quantize(Net().eval(), qfx.Plan.load(tmp_path))
    direct = qfx.quantize(Net().eval(), recipe(STATIC), data=[X])
    assert torch.equal(ran(model, X), ran(direct, X))
    assert torch.equal(ran(copy.deepcopy(model), X), ran(model, X))
    with pytest.raises(ValueError, match="quantized already: 2 parts"):
        qfx.quantize(model, "w8a8")


@pytest.mark.parametrize("rule", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_queries_and_keys_are_rotated_before_they_are_rounded(rule: dict[str, Any]) -> None:
    """As a compiled graph does by the same plan."""
    plan = qfx.plan(Net().eval(), {**recipe(rule), "rewrites": ["rotate-qk"]}, data=[X])
    turned = qfx.quantize(Net().eval(), plan)
    assert attending.specs_of(turned)["layers.0"]["rotation"] == [8, 0]
    options: Any = {"plan": plan}
    compiled = torch.compile(Net().eval(), backend="qfx", options=options, fullgraph=True)
    found = ran(turned, X)
    plain = ran(qfx.quantize(Net().eval(), recipe(rule), data=[X]), X)  # negative control: other codes
    assert sqnr_db(found, ran(compiled, X)) > max(60, sqnr_db(found, plain) + 10)


def test_other_calls_run_in_float() -> None:
    model = qfx.quantize(Net().eval(), recipe(DYNAMIC), data=[X])
    q = torch.randn(1, 2, 3, 8)
    before = F.scaled_dot_product_attention(q, q, q)
    ran(model, X)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), before)


@pytest.mark.parametrize("strict", [False, True])
def test_export_sees_the_operator(strict: bool) -> None:
    model = qfx.quantize(Net().eval(), recipe(DYNAMIC), data=[X])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects", UserWarning)
        exported = torch.export.export(model, (X,), strict=strict)
    called = [str(n.target) for n in exported.graph.nodes]
    assert called.count("qfx.quantized_attention.default") == 2
    assert not any("scaled_dot_product" in name for name in called)


def test_a_compiled_model_keeps_it_in_one_graph() -> None:
    model = qfx.quantize(Net().eval(), recipe(DYNAMIC, WEIGHTS), data=[X])
    compiled = torch.compile(model, backend="qfx", fullgraph=True)
    assert sqnr_db(ran(model, X), ran(compiled, X)) > 45
    found = qfx.report(compiled)
    assert found.graphs == 1
    rows = [row for row in found if row.op == "attention"]
    assert [row.node for row in rows] == [f"layers.{i}.scaled_dot_product_attention" for i in (0, 1)]
    assert all("MatMulIntegerToFloat u8 x s8" in row.kernel for row in rows)
    assert all(row.asked == "q=i8/tok k=i8/tok v=i8/head/dyn p=u8/tok" for row in rows)


class Grouped(nn.Module):
    """4 query heads over 2 of keys and values, which it repeats itself where it has a mask (as transformers do)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 4, 8).transpose(1, 2)
        k, v = (t.view(*x.shape[:2], 2, 8).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        if mask is not None:
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=mask is None)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


BY_HEADS = [
    {"target": "attention", "q": "i8/tok", "k": "i8/head", "v": "i8/head"},
    {"target": "attention", "q": "i8/tok", "k": ["i8/tok", "i3/tok"], "v": ["i8", "i8"]},
    {"target": "attention", "q": ["i8/tok", "i3/tok"], "k": "i8/tok", "v": "i8/tok"},
]
MASK = torch.ones(2, 1, 16, 16, dtype=torch.bool)


@pytest.mark.parametrize("planned", [(X,), (X, MASK)], ids=["once", "repeated"])
@pytest.mark.parametrize("rule", BY_HEADS)
def test_keys_that_a_module_repeats_have_the_formats_of_their_heads(
    rule: dict[str, Any], planned: tuple[Tensor, ...]
) -> None:
    """Whichever way the plan saw; as a graph does that has them once. Training alike."""
    model = Grouped().eval()
    wanted = ran(model, X)
    live = qfx.quantize(copy.deepcopy(model), recipe(rule), data=[planned])
    once, repeated = ran(live, X), ran(live, X, MASK)
    assert 10 < sqnr_db(wanted, once) < 60
    torch.testing.assert_close(once, repeated)
    trained = qfx.prepare_qat(copy.deepcopy(model), recipe(rule), [planned])
    for mode in (True, False):
        torch.testing.assert_close(ran(trained.train(mode), X, MASK), repeated, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ran(trained, X), repeated, atol=1e-4, rtol=1e-3)


def test_multi_head_attention_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    wanted = ran(model, X)
    qfx.quantize(model, recipe(DYNAMIC), data=[X])
    assert 30 < sqnr_db(wanted, ran(model, X)) < 80
    compiled = torch.compile(model, backend="qfx", fullgraph=True)
    assert sqnr_db(ran(model, X), ran(compiled, X)) > 45


def test_cross_attention_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1).eval()
    memory = torch.randn(2, 9, 32)
    wanted = ran(model, X, memory)
    qfx.quantize(model, recipe(DYNAMIC), data=[(X, memory)])
    assert len(attending.specs_of(model)) == 2
    assert 30 < sqnr_db(wanted, ran(model, X, memory)) < 80


def test_attention_by_hand_is_told() -> None:
    model = Net(by_hand=True).eval()
    with pytest.warns(
        QfxWarning, match=r"layers\.1\..*q=i8/tok.*spells it out.*next step: .*attn_implementation='sdpa'"
    ):
        qfx.quantize(model, recipe(DYNAMIC), data=[X])
    assert list(attending.specs_of(model)) == ["layers.0"]
    strict = Net(by_hand=True).eval()
    with pytest.raises(UnsupportedError, match="spells it out"):
        qfx.quantize(strict, recipe(DYNAMIC), data=[X], strict=True)
    assert attending.specs_of(strict) == {}


def test_attention_that_turns_to_other_ways_is_told() -> None:
    model = qfx.quantize(Net().eval(), recipe(DYNAMIC), data=[X])
    model.get_submodule("layers.1").by_hand = True  # type: ignore[assignment]
    with pytest.warns(QfxWarning, match=r"layers\.1.*did not call F\.scaled_dot_product_attention: ran in float"):
        ran(model, X)


def test_dropout_is_refused() -> None:
    model = nn.MultiheadAttention(32, 4, dropout=0.5, batch_first=True)
    holder = nn.ModuleDict({"inner": model})
    spec = {"name": "inner.x", "formats": {"k": "i8/tok"}, "scales": {}, "zeros": {}, "rotation": None, "sqnr_db": None}
    attending.attend(holder, {"inner": spec})
    assert model.eval()(X, X, X, need_weights=False)[0].shape == X.shape
    with pytest.raises(UnsupportedError, match=r"(?s)attention 'inner.x'.*dropout.*model\.eval"):
        model.train()(X, X, X, need_weights=False)


def test_a_module_inside_that_stays_in_float() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)[:, None]
            return F.scaled_dot_product_attention(y, y, y)[:, 0]

    model = nn.Sequential(Outer()).eval()
    with pytest.warns(QfxWarning, match=r"0\.scaled.*the module calls '0\.inner', whose attention shall stay"):
        qfx.quantize(model, {"rules": [DYNAMIC, WEIGHTS], "ignore": ["0.inner.scaled*"]}, data=[X])
    assert attending.specs_of(model) == {}
    both = nn.Sequential(Outer()).eval()
    wanted = ran(both, X)
    qfx.quantize(both, recipe(DYNAMIC), data=[X])
    assert list(attending.specs_of(both)) == ["0", "0.inner"]
    assert 30 < sqnr_db(wanted, ran(both, X)) < 80


class Handle(Tensor):
    """Stands for a handle on a quantized cache: a subclass of Tensor from its package."""


Handle.__module__ = "qfx.kv.states"


def test_a_quantized_cache_keeps_its_formats() -> None:
    layer = Attention().eval()
    holder = nn.ModuleList([layer])
    wanted = ran(layer, X)
    spec = {"name": "0.x", "formats": {"k": "i2/tok"}, "scales": {}, "zeros": {}, "rotation": None, "sqnr_db": None}
    attending.attend(holder, {"0": spec})
    with torch.no_grad():
        assert sqnr_db(wanted, layer(X)) < 30
        assert torch.allclose(layer(X, lambda k: k.as_subclass(Handle)).as_subclass(Tensor), wanted, atol=1e-6)


def test_a_plan_for_another_model_is_refused() -> None:
    plan = qfx.plan(Net().eval(), recipe(DYNAMIC), data=[X])
    plan.fingerprint = ""
    with pytest.raises(ValueError, match=r"(?s)attention that the model lacks.*no module 'layers.0'"):
        qfx.quantize(nn.Sequential(Attention()).eval(), plan)
    with pytest.raises(ValueError, match="cannot have k=i8/ch"):
        attending.check(Net(), {"layers.0": {"name": "x", "formats": {"k": "i8/ch"}}})


def test_a_model_without_a_graph_is_told() -> None:
    with pytest.warns(QfxWarning) as caught:
        model = qfx.quantize(Net().eval(), recipe(DYNAMIC, WEIGHTS))  # no inputs are known
    assert any("attention stays in float" in str(w.message) for w in caught)
    assert attending.specs_of(model) == {}


def test_transformers() -> None:
    model = tiny.build("llama")
    wanted = tiny.logits(model)
    qfx.quantize(model, recipe(DYNAMIC))
    assert 25 < sqnr_db(wanted, tiny.logits(model)) < 80
    tokens = model.generate(tiny.ids()[:, :4], max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == 8


@pytest.mark.parametrize("rule", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_saved_and_loaded(rule: dict[str, Any], tmp_path: Path) -> None:
    model = qfx.quantize(Net().eval(), recipe(rule, WEIGHTS), data=[X])
    qfx.save(model, tmp_path)
    found = qfx.load(tmp_path, Net())
    assert attending.specs_of(found) == attending.specs_of(model)
    assert torch.equal(ran(found, X), ran(model, X))


def test_attention_alone_can_be_saved(tmp_path: Path) -> None:
    model = qfx.quantize(Net().eval(), recipe(DYNAMIC), data=[X])
    qfx.save(model, tmp_path)
    assert torch.equal(ran(qfx.load(tmp_path, Net()), X), ran(model, X))


@pytest.mark.slow
def test_transformers_save_and_load_it(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "float")
    qfx.quantize(model, recipe(DYNAMIC, WEIGHTS))
    model.save_pretrained(tmp_path / "packed")
    wanted = tiny.logits(model)
    assert torch.equal(tiny.logits(qfx.load(tmp_path / "packed")), wanted)
    again = type(model).from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny.logits(again.eval()), wanted)
    base = transformers.AutoModel.from_pretrained(tmp_path / "packed")
    assert [spec["name"] for spec in attending.specs_of(base).values()] == [
        "layers.0.self_attn.scaled_dot_product_attention"
    ]
    asked = qfx.QfxConfig(recipe={"rules": [DYNAMIC, WEIGHTS]})
    streamed = type(model).from_pretrained(tmp_path / "float", quantization_config=asked)
    assert torch.equal(tiny.logits(streamed.eval()), wanted)


def test_a_file_with_a_quantized_cache_has_attention_in_float() -> None:
    asked = qfx.Recipe.parse(recipe(DYNAMIC, WEIGHTS))
    left, plan, (note,) = attending.without(asked, None)
    assert left is not None and plan is None
    assert not left.formats_for("attention", "x") and left.formats_for("linear", "x") == asked.formats_for(
        "linear", "x"
    )
    assert "beside those of the cache" in note.reason and "kv=" in note.next_step
    made = qfx.Plan(recipe=asked, annotations={"a.x": {"k": "i8/tok"}, "b": {"w": "i8/ch"}})
    _, kept, (note,) = attending.without(None, made)
    assert kept is not None and kept.annotations == {"b": {"w": "i8/ch"}} and len(made.annotations) == 2
    plain = qfx.Recipe.parse("w8a8")
    assert attending.without(plain, None) == (plain, None, [])


@pytest.mark.slow
def test_exported_decoders_have_it(tmp_path: Path) -> None:
    model, how = tiny.build("llama"), {"max_new_tokens": 3, "do_sample": False}
    with pytest.warns(QfxWarning, match="attention in formats of its own reads its cache in float"):
        written = qfx.export_onnx(model, None, tmp_path / "a", recipe=recipe(DYNAMIC))
    name = "model.layers.0.self_attn.scaled_dot_product_attention"
    assert written.formats == {name: {r: DYNAMIC[r] for r in "qkvp"}}
    loaded: Any = qfx.onnx.load(tmp_path / "a")
    live: Any = qfx.quantize(tiny.build("llama"), recipe(DYNAMIC))
    assert torch.equal(loaded.generate(tiny.ids()[:1], **how), live.generate(tiny.ids()[:1], **how))
    with pytest.warns(QfxWarning, match="formats of attention were asked beside those of the cache"):
        written = qfx.export_onnx(
            model, None, tmp_path / "b", recipe=recipe(DYNAMIC), kv="i8", data=[{"input_ids": tiny.ids()}]
        )
    assert list(written.formats.values()) == [{"k": "i8/ch", "v": "i8/ch"}]


def test_a_step_over_a_quantized_cache_reads_what_it_stores() -> None:
    model = tiny.build("llama")
    cache = qfx.QuantizedCache(model.config, "i8")
    with torch.no_grad():
        model(tiny.ids(), past_key_values=cache)
        wanted = model(tiny.ids()[:, :1], past_key_values=copy.deepcopy(cache)).logits
        coarse = recipe({"target": "attention", "q": "i2/tok", "k": "i2/tok", "v": "i2/tok", "p": "u2/tok"})
        qfx.quantize(model, coarse)
        assert torch.equal(model(tiny.ids()[:, :1], past_key_values=cache).logits, wanted)
        assert sqnr_db(tiny.logits(tiny.build("llama")), tiny.logits(model)) < 30
