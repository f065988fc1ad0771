"""Linears of several formats in live models: planned, written back by name, cast, copied, saved, compiled, reported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx
from qfx import QfxWarning, Recipe, Rule
from qfx.annotation import Columns
from qfx.capture import capture_export
from qfx.errors import UnsupportedError
from qfx.format import Format
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear
from qfx.live.segments import Segment, take
from qfx.measuring.measure import sqnr_db
from qfx.packing import pack_weight
from qfx.pipeline import apply_plan, prepare
from qfx.plan import Plan
from qfx.save import load, save
from tests.graphs import Function
from tests.seeded import randn
from tests.zoo import ZOO

HEADS = ["i8/ch", "i4/g32", "i8/ch", "i4/g32"]


class Two(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.o = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(torch.tanh(self.q(x)))
        return out


def recipe(x: str = "i8/tok", **fields: Any) -> Recipe:
    rules = (Rule(target="*q", x=x, w=HEADS), Rule(target="*o", x=x, w=["i8/ch", "i4/g32"], along="columns"))
    return Recipe(name="heads", rules=rules, **fields)


def quantized(x: str = "i8/tok", **fields: Any) -> Any:
    return qfx.quantize(Two().eval(), recipe(x, **fields), [randn(6, 64)])


@pytest.mark.parametrize("x_format", ["none", "i8/tok", "u8"])
@torch.no_grad()
def test_the_live_model_computes_what_the_graph_does(x_format: str) -> None:
    model, x = Two().eval(), randn(6, 64)
    made = qfx.plan(model, recipe(x_format), [x])
    assert made.annotations["q"]["w"] == HEADS
    assert made.annotations["o"]["w"] == {"columns": ["i8/ch", "i4/g32"]}
    captured = capture_export(model, (x,), {})
    prepare(captured.gm)
    apply_plan(captured.gm, made, made.recipe)
    wanted = model(x)
    found = qfx.quantize(model, made)
    assert isinstance(model.q, QuantMixed) and isinstance(model.o, QuantMixed)
    assert sqnr_db(captured.gm(x)[0], found(x)) > 110
    assert sqnr_db(wanted, found(x)) > 20
    assert made.sensitivities["sqnr_db"].keys() == {"q", "o"} and model.q.sqnr_db == made.sensitivities["sqnr_db"]["q"]


def test_what_is_held_under_which_names() -> None:
    model = quantized("u8")
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items() if name.startswith("q.")}
    assert shapes == {
        "q.bias": ((32,), torch.float32),
        "q.rows0_codes": ((16, 64), torch.int8),
        "q.rows0_scale": ((16, 1), torch.float32),
        "q.rows1_codes": ((16, 32), torch.uint8),
        "q.rows1_scale": ((16, 2), torch.float32),
        "q.x_scale": ((), torch.float32),
        "q.x_zero": ((), torch.uint8),
    }
    assert {n for n in model.state_dict() if n.startswith("o.columns")} == {
        "o.columns0_codes", "o.columns0_scale", "o.columns1_codes", "o.columns1_scale",
    }  # fmt: skip
    assert repr(model.q) == "QuantMixed(64, 32, x=u8 w=[i8/ch:16,i4/g32:16], bias=True)"


def test_the_weight_is_that_of_the_parts() -> None:
    model: Any = Two()
    q, o = model.q.weight.detach().clone(), model.o.weight.detach().clone()
    found: Any = qfx.quantize(model.eval(), recipe(), [randn(6, 64)])
    i8, i4 = Format.parse("i8/ch"), Format.parse("i4/g32")
    from qfx.numerics import fake_quantize

    parts = [fake_quantize(p, f) for p, f in zip(q.chunk(4), (i8, i4, i8, i4), strict=True)]
    assert torch.equal(found.q.weight, torch.cat(parts))
    halves = [fake_quantize(p, f) for p, f in zip(o.chunk(2, 1), (i8, i4), strict=True)]
    assert torch.equal(found.o.weight, torch.cat(halves, 1))


def test_one_row_for_each_linear_with_the_bytes_of_all_parts() -> None:
    model = quantized()
    found = {row.node: row for row in qfx.report(model)}
    assert found.keys() == {"q", "o"}
    bytes_of = {n: sum(b.nbytes for b in getattr(model, n).buffers()) for n in found}
    assert {n: row.bytes_after for n, row in found.items()} == bytes_of
    assert [found["q"].elements, found["q"].bytes_before] == [2048, 8192]
    assert found["q"].asked == "x=i8/tok w=[i8/ch:16,i4/g32:16]"
    assert found["o"].asked == "x=i8/tok w=columns[i8/ch:16,i4/g32:16]"
    assert all(row.quantized and row.sqnr_db is not None for row in found.values())
    report = qfx.report(model)
    assert report.other_bytes == 4 * (32 + 16)  # the biases; packed parts are counted in the rows


@torch.no_grad()
def test_compiled_it_is_one_row_too(onnx_or_reference: str) -> None:
    model, x = quantized(), randn(6, 64)
    compiled = torch.compile(model, backend="qfx", options={"backend": onnx_or_reference})
    assert sqnr_db(model(x), compiled(x)) > (35 if onnx_or_reference == "onnx" else 110)  # type: ignore[no-untyped-call]
    assert [(r.node, r.asked) for r in qfx.report(compiled)] == [(r.node, r.asked) for r in qfx.report(model)]
    assert [r.bytes_after for r in qfx.report(compiled)] == [r.bytes_after for r in qfx.report(model)]
    assert [r.macs for r in qfx.report(compiled)] == [6 * 64 * 32, 6 * 32 * 16]


@pytest.fixture(params=["onnx", "reference"])
def onnx_or_reference(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("x_format", ["none", "i8/tok", "u8"])
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, x_format: str) -> None:
    model, x = quantized(x_format), randn(6, 64)
    save(model, tmp_path)
    loaded = load(tmp_path, Two())
    assert isinstance(loaded.q, QuantMixed) and torch.equal(loaded(x), model(x))
    assert [(r.asked, r.bytes_after, r.sqnr_db) for r in qfx.report(loaded)] == [
        (r.asked, r.bytes_after, r.sqnr_db) for r in qfx.report(model)
    ]
    with pytest.raises(ValueError, match="no such module 'q'|shape|does not fit"):
        load(tmp_path, nn.Sequential(nn.Linear(64, 32)))


@torch.no_grad()
def test_a_bare_linear_is_replaced_saved_and_loaded(tmp_path: Path) -> None:
    x = randn(3, 64)
    model = qfx.quantize(nn.Linear(64, 32).eval(), Recipe(name="r", rules=(Rule(target="linear", w=HEADS),)), [x])
    assert isinstance(model, QuantMixed)
    save(model, tmp_path)
    assert torch.equal(load(tmp_path, nn.Linear(64, 32))(x), model(x))


@torch.no_grad()
def test_copied_and_cast() -> None:
    model, x = quantized(), randn(6, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.q.rows0_scale.dtype == torch.float32 and half.q.rows0_codes.dtype == torch.int8
    assert half.q.weight.dtype == half(x.bfloat16()).dtype == torch.bfloat16
    assert sqnr_db(model(x), half(x.bfloat16()).float()) > 25


def test_adapters_train_above_it() -> None:
    model, x = quantized(), randn(6, 64).requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())


@torch.no_grad()
def test_smoothed(tmp_path: Path) -> None:
    """o has no norm before it, so that its input is divided: by the module, before it is cut."""
    x = randn(6, 64)
    model = quantized("i8", rewrites=("smooth",))
    assert model.q.smooth is not None and model.o.smooth is not None
    assert sqnr_db(Two()(x), model(x)) > 20
    compiled = torch.compile(model, backend="qfx", options={"backend": "reference"})
    assert sqnr_db(model(x), compiled(x)) > 60  # type: ignore[no-untyped-call]
    save(model, tmp_path)
    assert torch.equal(load(tmp_path, Two())(x), model(x))


@torch.no_grad()
def test_transposed_layers() -> None:
    """Conv1D of GPT-2 holds its weight [K, N]: rows are still those of the output."""
    from transformers.pytorch_utils import Conv1D

    make: Any = Conv1D
    layer = make(32, 64)
    want = layer.weight.detach().t().clone()
    x = randn(3, 64)
    model: Any = qfx.quantize(
        nn.Sequential(layer).eval(), Recipe(name="r", rules=(Rule(target="linear", w=HEADS),)), [x]
    )
    assert isinstance(model[0], QuantMixed) and model[0].weight.shape == (32, 64)
    fine, coarse = (sqnr_db(want[part], model[0].weight[part]) for part in (slice(0, 8), slice(8, 16)))
    assert fine > 40 and coarse < 25


def test_parts_of_one_format_are_a_plain_linear() -> None:
    same = Recipe(name="r", rules=(Rule(target="linear", w=["i4/g32", "i4/g32"]),))
    model = qfx.quantize(Two().eval(), same, [randn(6, 64)])
    plain = qfx.quantize(Two().eval(), Recipe(name="r", rules=(Rule(target="linear", w="i4/g32"),)), [randn(6, 64)])
    assert isinstance(model.q, QuantLinear)
    assert torch.equal(model(randn(6, 64)), plain(randn(6, 64)))


def test_a_model_by_its_types_alone() -> None:
    """Without a graph the plan carries the lists as well."""
    with pytest.warns(QfxWarning, match="its layers were found by their types"):
        model = qfx.quantize(Two().eval(), recipe())
    assert isinstance(model.q, QuantMixed) and sqnr_db(Two()(randn(6, 64)), model(randn(6, 64))) > 20


def test_a_plan_carries_them(tmp_path: Path) -> None:
    made = qfx.plan(Two().eval(), recipe(), [randn(6, 64)])
    made.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again == made and again.formats("o")["w"] == Columns((Format.parse("i8/ch"), Format.parse("i4/g32")))
    one, two = (qfx.quantize(Two().eval(), p) for p in (made, again))
    assert torch.equal(one(randn(6, 64)), two(randn(6, 64)))


@torch.no_grad()
def test_heads_of_a_decoder(tmp_path: Path) -> None:
    """q, k, v by output heads, o by input heads, through generate() and a saved folder."""
    model: Any
    model, inputs = ZOO["llama"]()
    heads = model.config.num_attention_heads
    formats = ["i8/ch" if head % 2 else "i4/g32" for head in range(heads)]
    kv = formats[: model.config.num_key_value_heads]
    made = Recipe(
        name="heads",
        rules=(
            Rule(target="linear", w="i4/g32"),
            Rule(target="*.q_proj", w=formats),
            Rule(target="re:.*\\.[kv]_proj", w=kv),
            Rule(target="*.o_proj", w=formats, along="columns"),
        ),
    )
    wanted = model(**inputs).logits
    quantized: Any = qfx.quantize(model, made, [inputs])
    attention = quantized.model.layers[0].self_attn
    assert [type(getattr(attention, n)) for n in ("q_proj", "o_proj")] == [QuantMixed, QuantMixed]
    assert sqnr_db(wanted, quantized(**inputs).logits) > 8
    tokens = quantized.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    save(quantized, tmp_path)
    loaded: Any = load(tmp_path)
    assert torch.equal(loaded.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), tokens)


# Refusals


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(target="*q", w=["i8/ch"] * 3 + ["i4/ch"] * 2), "32 output rows of 'q' cannot be cut into 5 equal parts"),
        (Rule(target="*q", w=["i8/ch", "i4/ch"] * 32), "32 output rows of 'q' cannot be cut into 64"),
        (Rule(target="*o", w=["i8/ch", "i4/ch", "i4/ch"], along="columns"), "32 input columns of 'o'"),
    ],
)
def test_parts_that_do_not_fit_change_nothing(rule: Rule, message: str) -> None:
    for data in ([randn(6, 64)], None):
        model = Two().eval()
        asked = Recipe(name="r", rules=(rule,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            with pytest.raises(ValueError, match=message):
                qfx.quantize(model, asked, data)
        assert type(model.q) is nn.Linear and type(model.o) is nn.Linear


@torch.no_grad()
def test_what_is_no_linear_stays_in_float_and_says_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.patch, self.own = nn.Embedding(8, 32), nn.Conv1d(32, 32, 1), nn.Parameter(randn(32, 32))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.patch(self.embed(ids).transpose(1, 2)).transpose(1, 2)
            return F.linear(x, self.own)

    ids = torch.arange(6).reshape(2, 3)
    everything = Recipe(name="r", rules=(Rule(target="*", w=["i8/ch", "i4/ch"]),))
    for strict in (True, False):
        model = Model().eval()
        wanted = model(ids)
        if strict:
            with pytest.raises(UnsupportedError, match="only the weight of a linear takes several formats"):
                qfx.quantize(model, everything, [ids], strict=True)
        else:
            with pytest.warns(QfxWarning, match="only the weight of a linear") as told:
                qfx.quantize(model, everything, [ids])
            assert [str(w.message).split(":")[0] for w in told] == ["embed", "patch, own (2 nodes)"]
        assert torch.equal(model(ids), wanted)


@torch.no_grad()
def test_a_tied_table_keeps_its_own_weight() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 32), nn.Linear(32, 12, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.table(ids))
            return out

    ids = torch.arange(12).reshape(2, 6)
    model = Tied().eval()
    wanted = model(ids)
    found = qfx.quantize(model, Recipe(name="r", rules=(Rule(target="*head", w=["i8/ch", "i4/ch"]),)), [ids])
    assert isinstance(found.head, QuantMixed) and type(found.table) is nn.Embedding
    assert sqnr_db(wanted, found(ids)) > 15
    model = Tied().eval()
    both = Recipe(name="r", rules=(Rule(target="*head", w=["i8/ch", "i4/ch"]), Rule(target="embedding", w="i8/ch")))
    with pytest.warns(QfxWarning, match=r"tied to .* stored twice"):
        qfx.quantize(model, both, [ids])


def test_one_layer_under_two_names() -> None:
    layer = nn.Linear(32, 32)
    shared = Function(lambda own, x: own.b(torch.relu(own.a(x))), a=layer, b=layer)
    with torch.no_grad():
        model: Any = qfx.quantize(
            shared.eval(), Recipe(name="r", rules=(Rule(target="linear", w=HEADS),)), [randn(3, 32)]
        )
    assert model.a is model.b and isinstance(model.a, QuantMixed)


def test_a_state_dict_of_other_segments_is_refused() -> None:
    """Heads in another order, and formats of the same shapes, have the same names and sizes."""

    def mixed(formats: list[str], order: list[tuple[int, int]], rotation: tuple[int, int] | None = None) -> QuantMixed:
        weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
        cut = [Segment(Format.parse(fmt), (at,)) for fmt, at in zip(formats, order, strict=True)]
        return QuantMixed([pack_weight(take(weight, s, 0), s.format) for s in cut], cut, 0, None, rotation=rotation)

    state = mixed(["i4/g32", "i8/g32"], [(0, 4), (4, 8)]).state_dict()
    mixed(["i4/g32", "i8/g32"], [(0, 4), (4, 8)]).load_state_dict(state)
    for other in (
        mixed(["i4/g32", "i8/g32"], [(4, 8), (0, 4)]),
        mixed(["nf4/g32", "i8/g32"], [(0, 4), (4, 8)]),
        mixed(["i4/g32", "i8/g32"], [(0, 4), (4, 8)], (32, 0)),
    ):
        with pytest.raises(RuntimeError, match="is stored in another way"):
            other.load_state_dict(state)


def test_printed_it_tells_that_its_input_is_rotated() -> None:
    cut = [Segment(Format.parse("i4/g32"), ((0, 4),)), Segment(Format.parse("i8/g32"), ((4, 8),))]
    packed = [pack_weight(torch.ones(s.size, 32), s.format) for s in cut]
    assert repr(QuantMixed(packed, cut, 0, None, rotation=(32, 0))).endswith("bias=False, rotation=(32, 0))")
