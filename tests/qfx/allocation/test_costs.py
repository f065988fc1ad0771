"""Costs of graphs: weights, cache, products and traffic, against numbers counted by hand and by running."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qfx import quantize
from qfx.allocation.costs import Costs, role_formats
from qfx.allocation.model_costs import costs_of, formats_of_plan
from qfx.allocation.sizes import BATCH, CONTEXT, SEQUENCE
from qfx.annotation import Columns, Outliers
from qfx.capture import capture_export
from qfx.decoding import decoder
from qfx.format import Format
from qfx.inputs import without_cache
from qfx.kv.formats import CacheFormat
from qfx.live.segments import nbytes
from qfx.pipeline import prepare
from qfx.quantize import plan
from tests.zoo import HEADS, HIDDEN, LAYERS, VOCAB, WIDE, ZOO

F = Format.parse
ANGLES = HIDDEN // HEADS // 2  # of rotary positions of one token: releases of transformers multiply or use a product
KV = 2 * (HIDDEN // HEADS)  # elements of the keys of one token in one layer of the zoo's decoders


def _slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@functools.cache
def _plain(name: str) -> tuple[nn.Module, dict[str, Tensor], Costs]:
    model, inputs = ZOO[name]()
    gm = capture_export(model, (), without_cache(model, inputs)).gm
    prepare(gm)
    return model, inputs, Costs.of(gm)


@functools.cache
def _of_model(name: str) -> tuple[nn.Module, Costs]:
    model = ZOO[name]()[0]
    return model, costs_of(model)


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, dict[str, Tensor], Costs]:
    return _plain("llama")


def test_expressions_of_a_decoder(llama: Any) -> None:
    linears = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * WIDE
    total = llama[2].total()
    head = BATCH * SEQUENCE * HIDDEN * VOCAB
    wanted = LAYERS * (BATCH * SEQUENCE * linears + 2 * BATCH * SEQUENCE * (SEQUENCE + CONTEXT) * HIDDEN) + head
    assert sympy.expand(total.macs - wanted) in (0, ANGLES * SEQUENCE)
    assert sympy.expand(total.cache - LAYERS * 2 * KV * 4 * BATCH * (SEQUENCE + CONTEXT)) == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", _slow("bert"), _slow("vit"), _slow("t5")])
def test_products_are_those_that_run(name: str) -> None:
    _, inputs, costs = _plain(name)
    model = ZOO[name](attention="eager")[0]  # the counter of torch knows no fused attention on CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**without_cache(model, inputs))
    sizes = {"batch": 2, "sequence": inputs["input_ids"].shape[1] if "input_ids" in inputs else 1}
    if "decoder_input_ids" in inputs:
        sizes["decoder_input_ids_1"] = inputs["decoder_input_ids"].shape[1]
    assert 2 * costs.at(**sizes).macs == counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "gpt2", _slow("bert"), _slow("vit")])
def test_weights_are_those_of_the_model(name: str) -> None:
    model, _, costs = _plain(name)
    used = sum(costs.stored[key].elements * costs.stored[key].itemsize for key in costs.stored)
    assert costs.weights() == used
    held = {key: p for key, p in model.named_parameters() if key in costs.stored}
    assert sum(p.nbytes for p in held.values()) >= 0.98 * used, "what is no parameter is small"
    matrices = [p for p in held.values() if p.dim() > 1]
    assert costs.weights() - costs.weights(rest=F("f16")) >= sum(p.nbytes for p in matrices) // 2


def test_formats_count_as_they_are_stored() -> None:
    model, costs = ZOO["llama"]()[0], _plain("llama")[2]
    asked = {n.name: F("u4/g32") for n in costs.nodes if n.kind == "linear"}
    quantized = quantize(model, {"rules": [{"target": "linear", "w": "u4/g32"}]})
    packed = sum(b.nbytes for name, b in quantized.named_buffers() if name.rpartition(".")[2].startswith("w_"))
    linears = [s for s in costs.stored.values() if set(s.names) & set(asked)]
    floats = sum(s.elements * 4 for s in linears)
    assert costs.weights() - costs.weights(asked) == floats - packed


def test_a_table_of_two_readers_counts_once() -> None:
    tied: Any = ZOO["gpt2"]()[0]
    costs = costs_of(tied)
    (table,) = (s for s in costs.stored.values() if "lm_head" in s.names)
    assert set(table.names) == {"transformer.wte", "lm_head"}
    by_one, by_other = (costs.weights({name: F("i8/ch")}) for name in table.names)
    assert by_one == by_other == costs.weights() - 4 * table.elements + F("i8/ch").nbytes(table.shape)
    both = {"transformer.wte": F("i8/ch"), "lm_head": F("u4/g32")}
    assert costs.weights(both) == by_one, "the first is taken, as plans do"


def test_weights_cut_into_several_formats(llama: Any) -> None:
    costs = llama[2]
    name = "model.layers.0.self_attn.q_proj"
    rows, columns = (F("i8/ch"), F("u4/g32"), F("i8/ch"), F("u4/g32")), Columns((F("i8/ch"), F("u4/g32")))
    half = F("i8/ch").nbytes((32, 64)) + F("u4/g32").nbytes((32, 64))
    kept = Outliers(F("u4/g32"), F("f16"), (3, 9))
    assert costs.weights() - costs.weights({name: rows}) == 64 * 64 * 4 - half
    assert nbytes(columns, (64, 64), name) == F("i8/ch").nbytes((64, 32)) + F("u4/g32").nbytes((64, 32))
    assert nbytes(kept, (64, 64), name) == F("u4/g32").nbytes((64, 62)) + 2 * 64 * 2
    with pytest.raises(ValueError, match="cannot be cut into 3 equal parts"):
        costs.weights({name: (F("i8/ch"),) * 3})


def test_entries_may_be_roles_and_texts(llama: Any) -> None:
    name = "model.layers.0.mlp.up_proj"
    ways: list[Any] = [F("u4/g32"), "u4/g32", {"w": "u4/g32", "x": "i8/tok"}, {"w": F("u4/g32")}]
    assert len({llama[2].weights({name: way}) for way in ways}) == 1
    assert llama[2].weights({name: {"x": "i8/tok"}}) == llama[2].weights()
    assert role_formats({"columns": ["i8/ch", "u4/g32"]}) == {"w": Columns((F("i8/ch"), F("u4/g32")))}


def test_names_and_rests_that_make_no_sense(llama: Any) -> None:
    with pytest.raises(ValueError, match="no node with a weight is called 'model.layers.0.mlp.up', did you mean"):
        llama[2].weights({"model.layers.0.mlp.up": F("i8/ch")})
    with pytest.raises(ValueError, match="rest is a plain format .* found 'i8/ch'"):
        llama[2].weights(rest=F("i8/ch"))


@pytest.mark.parametrize("name", ["llama", _slow("gpt2"), _slow("qwen3")])
def test_a_graph_with_its_cache_costs_what_one_without_says(name: str) -> None:
    model, _, plain = _plain(name)
    captured, names = decoder.capture_decoder(model, last_only=False)
    prepare(captured.gm)
    unfused = Costs.of(captured.gm)
    assert decoder.fuse_cache(captured, names)
    fused = Costs.of(captured.gm)
    for sizes in ({"batch": 1, "sequence": 1, "context": 40}, {"batch": 3, "sequence": 8, "context": 0}):
        totals = [costs.at(**sizes) for costs in (plain, unfused, fused)]
        for what in ("cache", "cache_moved"):
            assert len({getattr(total, what) for total in totals}) == 1, what
        macs = [total.macs for total in totals]
        assert max(macs) - min(macs) <= ANGLES * sizes["batch"] * sizes["sequence"], "positions may differ by sequence"
        assert totals[2].weights_read == pytest.approx(totals[0].weights_read, rel=0.02), "rows of position tables"
        assert totals[2].activations == pytest.approx(totals[0].activations, rel=0.2)


def test_the_cache_is_as_large_as_it_is() -> None:
    model, _, costs = _plain("llama")
    with torch.no_grad():
        kept = model(torch.ones(3, 11, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert costs.at(batch=3, sequence=11).cache == held == costs.at(batch=3, sequence=1, context=10).cache


def test_formats_of_the_cache(llama: Any) -> None:
    costs = llama[2]
    whole = costs.cache().subs({BATCH: 2, SEQUENCE: 1, CONTEXT: 9})
    at = {"batch": 2, "context": 9}
    assert costs.total(cache=F("i8")).at(**at).cache == whole // 4
    assert costs.total(cache=F("i4")).at(**at).cache == whole // 8
    mixed = costs.total(cache={"k": F("i8"), "v": F("i4")}).at(**at).cache
    assert mixed == (whole // 4 + whole // 8) // 2
    heads = LAYERS * 2 * 2 * 20  # of 16 elements; per token: a scale of 4 bytes each
    assert costs.total(cache=F("i8/tok")).at(**at).cache == heads * (16 + 4)


def test_a_model_without_causal_attention_has_no_cache() -> None:
    costs = _plain("bert")[2]
    assert (costs.cache(), costs.caches) == (0, ())


@pytest.mark.slow
def test_keys_of_an_encoder_are_kept_once() -> None:
    costs = _plain("t5")[2]
    caches = [c for c in costs.caches if c.new == 0]
    assert len(caches) == LAYERS and len(costs.caches) == 2 * LAYERS
    sizes = {"sequence": 6, "decoder_input_ids_1": 1}
    near, far = (costs.at(batch=2, context=n, **sizes).cache for n in (0, 5))
    assert far - near == 5 * 2 * LAYERS * 2 * HIDDEN * 4


def test_traffic_of_one_token() -> None:
    costs = _of_model("llama")[1]
    one = costs.at(context=100)
    table = next(s for s in costs.stored.values() if "model.embed_tokens" in s.names)
    rows = 0 if "lm_head" in table.names else table.elements * 4 - HIDDEN * 4
    unread = one.weights - rows - one.weights_read
    assert unread in (0, 4 * ANGLES), "one row of the table, all other weights; frequencies of a product are no weights"
    assert one.cache_moved == LAYERS * 2 * KV * 4 * (101 + 1)
    assert one.traffic == one.weights_read + one.activations + one.cache_moved
    half = costs.total(rest=F("f16")).at(context=100)
    assert half.activations == pytest.approx(one.activations / 2, abs=1) and half.weights_read < 0.51 * one.weights_read


@pytest.mark.slow
def test_experts_are_read_as_far_as_there_are_rows() -> None:
    costs = costs_of(ZOO["mixtral"]()[0])
    experts = [n for n in costs.nodes if n.kind == "experts"]
    assert experts
    few, many = (costs.at(sequence=n).weights_read for n in (1, 64))
    each = sum(costs.stored[n.weight].elements * 4 for n in experts)
    count = costs.stored[experts[0].weight].shape[0]
    rows = 63 * HIDDEN * 4  # of the table of embeddings
    assert many - few == pytest.approx(each * (1 - 2 / count) + rows, rel=0.001)


class _Branches(nn.Module):
    """x + relu(x) + tanh(relu(x)): three values of x's size are alive at once beside it."""

    def forward(self, x: Tensor) -> Tensor:
        a = x.relu()
        b = a.view(-1).tanh().view(x.shape)
        return a + b


def test_activations_that_are_alive_at_once() -> None:
    costs = Costs.of(capture_export(_Branches(), (torch.ones(2, 6, 8),)).gm)
    assert costs.activations(batch=2, sequence=6, x_2=8) == 3 * 2 * 6 * 8 * 4


def test_memory_is_the_sum(llama: Any) -> None:
    costs = llama[2]
    sizes = {"batch": 2, "sequence": 5, "context": 3}
    parts = costs.weights() + costs.at(**sizes).cache + costs.activations(**sizes)
    assert costs.memory(**sizes) == parts


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.integers(1, 512), st.integers(0, 4096))
def test_costs_only_grow(batch: int, sequence: int, context: int) -> None:
    costs = _plain("llama")[2]
    here = costs.at(batch=batch, sequence=sequence, context=context)
    for more in ((batch + 1, sequence, context), (batch, sequence + 1, context), (batch, sequence, context + 1)):
        there = costs.at(**dict(zip(("batch", "sequence", "context"), more, strict=True)))
        assert there.macs > here.macs and there.cache > here.cache and there.traffic > here.traffic
        assert there.weights == here.weights


def test_formats_of_a_plan() -> None:
    model, costs = _of_model("llama")
    asked = formats_of_plan(plan(model, "w8a8"), costs)
    assert asked["model.layers.0.mlp.up_proj"] == {"x": F("i8/tok"), "w": F("i8/ch")}
    assert costs.weights(asked) < 0.3 * costs.weights()


class _Nameless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_model_whose_inputs_are_not_known() -> None:
    with pytest.raises(ValueError, match="_Nameless must be traced, and no example of its inputs is known"):
        costs_of(_Nameless())


def test_caches_of_true_bytes(llama: Any) -> None:
    """Those of a `CacheFormat`: the first and the newest tokens as floats, scales by groups of tokens."""
    costs, one = llama[2], CacheFormat.from_json({"k": "u4/g8/f16", "v": "u4/g8/f16", "residual": 4, "sinks": 2})
    plain = CacheFormat.from_json({"k": "f32", "v": "f32"})
    heads, widths = costs.caches[0].heads, costs.caches[0].widths
    at = {BATCH: 3, SEQUENCE: 1, CONTEXT: 40}
    first, rest = one.nbytes(heads, widths, 41, dtype=torch.float32), 41 * 2 * KV * 4
    each = [one, *[plain] * (LAYERS - 1)]
    for formats, wanted in ((one, LAYERS * first), (each, first + (LAYERS - 1) * rest)):
        assert costs.cache(formats).subs(at) == 3 * wanted
        new = 3 * LAYERS * 2 * KV * 4  # written as it came
        assert costs.total(cache=formats).cache_moved.subs(at) == 3 * wanted + new
    assert costs.memory(cache=one, context=400) < costs.memory(context=400)
    with pytest.raises(ValueError, match=f"{LAYERS} caches that grow, and there are 1 formats"):
        costs.cache([one])
