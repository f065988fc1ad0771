from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx
from qfx import Format, annotation
from qfx.analysis.measured import Measure, _distance, main_output, some
from qfx.annotation import Columns
from qfx.measuring import measure
from qfx.rounding.nearest import round_weight
from tests.qfx.analysis.models import captured, causal, ids, prepared
from tests.tiny import build

U4, U2, I8 = (Format.parse(t) for t in ("u4/g16", "u2/g16", "i8/ch"))


@torch.no_grad()
def quantized_kld(model: nn.Module, quantized: nn.Module, batches: list[dict[str, Any]]) -> float:
    pairs = [(model(**b).logits, quantized(**b).logits) for b in batches]
    wanted, found = (torch.cat([p[i].flatten(0, 1) for p in pairs]) for i in (0, 1))
    return measure.kld(wanted, found)


def of(kind: str = "llama", **kwargs: Any) -> tuple[Measure, nn.Module, list[dict[str, Any]]]:
    gm, flat, found = prepared(kind)
    return Measure(gm, flat, outputs=found.outputs, **kwargs), *causal(kind)


@pytest.mark.parametrize(
    ("kind", "fmt"),
    [("llama", U4), pytest.param("tied", I8, marks=pytest.mark.slow), ("tied", Format.parse("nf4/g64/dq"))],
)
def test_it_is_what_the_quantized_model_loses(kind: str, fmt: Format) -> None:
    measured, model, batches = of(kind, rounding="mse")
    found = measured.kld({unit.name: fmt for unit in measured.units})
    recipe = {"rules": [{"target": t, "w": str(fmt)} for t in ("linear", "embedding", "tied")], "rounding": "mse"}
    quantized = qfx.quantize(causal(kind)[0], recipe)
    assert found == pytest.approx(quantized_kld(model, quantized, batches), rel=2e-3, abs=1e-9)
    assert found > 0


@torch.no_grad()
def test_units_of_one_weight_are_rounded_as_segments_are() -> None:
    """Rows by heads, and columns of which no group of the format ends where a head ends."""
    measured, model, batches = of(rounding="rtn")
    wide = Format.parse("u3/g24")  # heads have 16 channels
    made = qfx.plan(model, {"rules": [{"target": "*proj", "w": "u4/g16"}], "rounding": "rtn"})
    for role, formats in (("q", (U4, U2)), ("o", Columns((wide, wide))), ("o", Columns((wide, U2)))):
        fqn = f"model.layers.0.self_attn.{role}_proj"
        each = formats.formats if isinstance(formats, Columns) else formats
        found = measured.kld({f"{fqn}.{role}{i}": fmt for i, fmt in enumerate(each)})
        one = dataclasses.replace(made, annotations={fqn: {"w": annotation.to_json(formats)}})
        assert found == pytest.approx(quantized_kld(model, qfx.quantize(causal()[0], one), batches), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("width", [8, 48])
def test_the_columns_of_an_only_head_are_the_whole_weight(width: int) -> None:
    """Wider and narrower than the model: its rows are others in number than its columns."""

    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(32, width) for _ in range(3))
            self.o = nn.Linear(width, 32)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one(x)[:, None] for one in (self.q, self.k, self.v))
            y: Tensor = self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])
            return y

    torch.manual_seed(0)
    model = OneHead().eval()
    gm, flat, found = captured(model, [{"x": torch.randn(2, 5, 32)}])
    weights = Measure(gm, flat, outputs=found.outputs, rounding="rtn").weights
    placed = weights.place({f"{role}.{role}0": U4 for role in "qkvo"})
    assert len(placed) == 4
    for node, value in placed.items():
        weight = model.get_submodule(str(node.meta["qfx_module"])).weight
        assert isinstance(weight, Tensor)
        assert torch.equal(value, round_weight(weight, U4, "rtn", name="x").dequantize())


def test_only_what_has_a_format_changes() -> None:
    measured, _, _ = of()
    assert measured.kld({}) == 0
    assert measured.what == "KL divergence, nats per position"
    plain = {unit.name: Format.parse("f32") for unit in measured.units}
    assert measured.kld(plain) == 0


def test_fewer_bits_cost_more_and_a_single_unit_is_measured_once() -> None:
    measured, _, _ = of()
    name = "model.layers.0.mlp.down_proj"
    two, four, eight = (measured.single(name, fmt) for fmt in (U2, U4, I8))
    assert two > 5 * four > 25 * eight > 0
    before = measured.evaluations
    assert measured.single(name, U2) == two
    assert measured.evaluations == before
    assert measured.measured[name] == {"u2/g16": two, "u4/g16": four, "i8/ch": eight}


def test_an_anchor_changes_no_result() -> None:
    measured, _, _ = of()
    base = {unit.name: U4 for unit in measured.units}
    change = base | {"lm_head": U2, "model.layers.0.mlp.up_proj": I8}
    plain = [measured.kld(a) for a in (base, change, {})]
    measured.anchor(base)
    assert [measured.kld(a) for a in (base, change, {})] == pytest.approx(plain, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_logits_of_no_anchor_are_held(rounded: bool) -> None:
    """They are as long as the vocabulary, and there would be some of all batches for each anchor."""
    from qfx.passes.annotate import annotate

    gm, flat, found = prepared("llama")
    if rounded:
        annotate(gm, qfx.Recipe.parse({"rules": [{"target": "linear", "x": "i8/tok", "w": "i8/ch"}]}))
    measured = Measure(gm, flat, outputs=found.outputs)
    base = {unit.name: U4 for unit in measured.units}
    wanted = measured.kld(base)
    measured.anchor(base)
    assert len(measured._anchors) == 2
    assert all(measured.main not in env for _, borders in measured._anchors for at in borders for env in at)
    assert measured.kld(base) == pytest.approx(wanted, rel=1e-6)  # of the anchor itself: the last block runs again
    assert (measured.kld({}) > 0) == rounded


def test_a_mask_that_leaves_nothing_out_changes_nothing() -> None:
    p, q = torch.randn(2, 3, 7).log_softmax(-1), torch.randn(2, 3, 7)
    every, some_of = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, True], [True, False, False]])
    assert _distance(p, q, every, logits=True) == _distance(p, q, None, logits=True)
    assert _distance(p, q, some_of, logits=True)[1] == 4


def test_a_change_in_a_late_layer_runs_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, _, _ = of()
    ran = []
    step = measured.program.step

    def counted(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        ran.append(node)
        return step(node, *args, **kwargs)

    monkeypatch.setattr(measured.program, "step", counted)
    measured.kld({"lm_head": U4})
    late = len(ran)
    measured.kld({"model.embed_tokens": U4})
    assert 0 < late < (len(ran) - late) / 2


def test_padding_does_not_count() -> None:
    """A masked tail of random tokens changes nothing; without the mask it would."""
    model = build("bert")
    short = ids(length=6)
    mask = torch.ones_like(short)
    mask[:, 4:] = 0
    batches = [{"input_ids": short, "attention_mask": mask}]
    gm, flat, found = captured(model, batches)
    masked = Measure(gm, flat, outputs=found.outputs)
    assignment = {unit.name: U4 for unit in masked.units}
    with_tail = masked.kld(assignment)
    other = torch.where(mask == 0, 5, short)
    again = Measure(gm, [found.flatten((), {"input_ids": other, "attention_mask": mask})], outputs=found.outputs)
    assert again.kld(assignment) == pytest.approx(with_tail, rel=1e-4)


def test_a_model_without_logits_is_compared_by_its_error() -> None:
    import transformers as tf

    model = tf.BertModel(build("bert").config).eval()
    gm, flat, found = captured(model, [{"input_ids": ids()}])
    measured = Measure(gm, flat, outputs=found.outputs)
    assert measured.what == "relative squared error of last_hidden_state"
    few, many = (measured.kld({unit.name: f for unit in measured.units}) for f in (U2, I8))
    assert 0 < 100 * many < few


def test_inputs_are_rounded_where_annotations_ask_for_it() -> None:
    from qfx.passes.annotate import annotate

    model, batches = causal()
    gm, flat, found = captured(model, batches)
    annotate(gm, qfx.Recipe.parse({"rules": [{"target": "linear", "x": "i8/tok", "w": "i8/ch"}]}))
    measured = Measure(gm, flat, outputs=found.outputs, rounding="rtn")
    floor = measured.kld({})
    assert floor > 0
    linears = {unit.name: I8 for unit in measured.units if unit.kind != "embedding"}
    recipe = {"rules": [{"target": "linear", "x": "i8/tok", "w": "i8/ch"}]}
    wanted = quantized_kld(model, qfx.quantize(causal()[0], recipe), batches)
    assert measured.kld(linears) == pytest.approx(wanted, rel=0.05)


def test_bad_input() -> None:
    model, batches = causal()
    gm, flat, found = captured(model, batches)
    with pytest.raises(ValueError, match="no batch was given"):
        Measure(gm, [], outputs=found.outputs)
    with pytest.raises(ValueError, match="batch 1 does not fit the graph"):
        Measure(gm, [[*flat[0], torch.ones(1)]], outputs=found.outputs)
    with pytest.raises(ValueError, match=r"no unit 'lm_heat'(?s:.*)did you mean 'lm_head'"):
        Measure(gm, flat, outputs=found.outputs).kld({"lm_heat": U4})
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match="float model's logits on batch 1 holds NaN or Inf"):
        Measure(gm, flat, outputs=found.outputs)


def test_the_main_output() -> None:
    model, batches = causal()
    gm, _, found = captured(model, batches)
    assert main_output(gm, found.outputs)[0] == "logits"
    assert main_output(gm, ())[0] == "output"


def test_gradients_stay_on_for_the_caller() -> None:
    measured, _, _ = of()
    found = measured.outputs({})
    next(found)
    assert torch.is_grad_enabled()


def test_some_batches_hold_so_many_positions() -> None:
    batch = [torch.zeros(2, 9, dtype=torch.int64), None, torch.zeros(2, 9)]
    assert [len(some([batch] * 5, n)) for n in (1, 18, 19, 1000)] == [1, 1, 2, 5]
    assert len(some([[torch.zeros(3)]] * 4, 6)) == 2
