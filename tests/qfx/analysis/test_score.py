"""Scores of a whole graph: against measurements, against the formula by hand, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from qfx import Format
from qfx.analysis.caches import CachedProgram, caches
from qfx.analysis.gradients import gather
from qfx.analysis.losses import General, Task
from qfx.analysis.measured import Measure, main_output
from qfx.analysis.predictors import EVERY
from qfx.analysis.score import Options, score_graph
from qfx.analysis.scores import METHODS, scores
from qfx.analysis.units import units, wholes
from qfx.analysis.weights import Weights
from qfx.rounding.lanes import Program
from tests.qfx.analysis.models import captured, causal, ids, of_zoo, prepared

TEXTS = ("u3/g16", "i8/ch")
FORMATS = tuple(Format.parse(t) for t in TEXTS)


def batches_of(count: int, rows: int = 4, length: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": ids(rows, length, seed=i), "use_cache": False} for i in range(count)]


def test_quant_fisher_is_the_divergence_in_nats() -> None:
    """No scale is fitted: the mean over many drawn labels is what is measured, for every kind of unit."""
    model, _ = causal()
    gm, flat, found = captured(model, batches_of(16))
    options = Options(formats=("u4/g16",), measure=0, heads=False)
    made, _ = score_graph(gm, flat, options, outputs=found.outputs, progress=False)
    assert made.what == "KL divergence, nats per position"
    of_caches = caches(units(gm)[1])
    measured = Measure(gm, flat, caches=of_caches, outputs=found.outputs)
    predicted, real = [], []
    for unit in made.units:
        for text, score in made.score()[unit.name].items():
            predicted.append(score)
            real.append(measured.single(unit, Format.parse(text)))
    logs = torch.tensor([math.log(r / p) for p, r in zip(predicted, real, strict=True)])
    assert abs(float(logs.mean())) < 0.15
    assert float(logs.std()) < 0.5
    assert float(torch.corrcoef(torch.tensor([predicted, real]).log())[0, 1]) > 0.97


@pytest.mark.parametrize(
    "name", ["bert", "gpt2", "falcon", *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "mixtral", "gpt_oss"))]
)
def test_models_of_many_kinds(name: str) -> None:
    """Encoders, encoder-decoders, packed qkv, experts, one key head for all: every unit has a score that falls."""
    gm, flat, found = of_zoo(name)
    made, _ = score_graph(gm, flat, Options("all", TEXTS, measure=0), outputs=found.outputs, progress=False)
    scored = made.score("quant-fisher")
    assert set(scored) == {unit.name for unit in made.units}
    for row in scored.values():
        values = [row[text] for text in (TEXTS if TEXTS[0] in row else ("u2/tok", "u4/tok", "i8/tok"))]
        assert all(math.isfinite(v) and v >= 0 for v in values)
        assert values == sorted(values, reverse=True)
    assert sum(row[TEXTS[0]] > 0 for row in scored.values() if TEXTS[0] in row) > 0.9 * len(units(gm)[0])
    heads = {unit.name for unit in made.units if unit.kind in ("q", "k", "v", "o")}
    assert set(made.score("outlier")) == heads
    assert set(made.score("weight-error")) == {unit.name for unit in made.units if not unit.kind.startswith("cache")}


@torch.enable_grad()
def by_hand(gm: fx.GraphModule, flat: list[Any], main: fx.Node) -> dict[str, torch.Tensor]:
    """The gradient of every linear's weight for one sample by autograd itself: fqn -> [N, K]."""
    program, weights = Program(gm), Weights(gm, units(gm)[0])
    placed = {
        node: program.look(operand, {}).clone().requires_grad_()
        for views in weights.readers.values()
        for operand, nodes in views.items()
        for node in nodes
    }
    env = dict(zip(program.inputs, flat, strict=True))
    for node in program.nodes:
        env[node] = program.step(node, env, placed, rounded=False)
    loss, _ = General(0, is_logits=True, masks=[None])([env[main]], 0, 1)
    loss.backward()
    names = {node: fqn for fqn, views in weights.readers.items() for nodes in views.values() for node in nodes}
    return {names[node]: value.grad for node, value in placed.items() if value.grad is not None}


def test_gathered_sums_are_those_of_autograd() -> None:
    """fisher: the squares, sample by sample; gradient: the sum; taylor: |w . gradient|; energy: what is read."""
    model, _ = causal()
    gm, flat, found = captured(model, [{"input_ids": ids(2, 6), "use_cache": False}])
    _, main = main_output(gm, found.outputs)
    every = units(gm)[0]
    weights, single = Weights(gm, every), []
    general = General(0, is_logits=True, masks=[None])
    together = gather(weights, Program(gm), flat, [main], general, first_order=True)
    random = torch.Generator().manual_seed(0)
    logits = next(iter(Measure(gm, flat, outputs=found.outputs).outputs({})))
    labels = torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=random)[:, 0].view(2, -1)
    for row in range(2):
        drawn = labels[row]

        def loss(outputs: torch.Tensor, batch: Any, drawn: torch.Tensor = drawn) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs[0], drawn, reduction="sum")

        one = [value[row : row + 1] if isinstance(value, torch.Tensor) else value for value in flat[0]]
        single.append(gather(weights, Program(gm), [one], [main], Task(loss, [None], ()), first_order=True))
    for fqn in ("model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"):
        torch.testing.assert_close(together.fisher[fqn], sum(s.fisher[fqn] for s in single), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(together.gradient[fqn], sum(s.gradient[fqn] for s in single), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(single[0].fisher[fqn], single[0].gradient[fqn] ** 2)
    name = "model.layers.0.self_attn.o_proj.o1"
    unit = weights.units[name]
    change = [
        (s.gradient[unit.fqn] * model.get_parameter(f"{unit.fqn}.weight").detach())[:, unit.start :].sum().abs()
        for s in single
    ]
    assert together.taylor[name] == pytest.approx(float(sum(change)), rel=1e-3)
    assert together.weight == 12 and together.samples == 2
    own = by_hand(gm, flat[0], main)
    torch.testing.assert_close(together.gradient["lm_head"], own["lm_head"], rtol=1e-3, atol=1e-6)
    fqn = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(together.gradient[fqn], own[fqn], rtol=1e-3, atol=1e-6)
    assert together.rows[fqn] == 12 and together.energy[fqn].shape == (32,)


@pytest.mark.parametrize("rounding", ["mse", "rtn", "hqq"])
def test_units_of_one_weight_are_scored_together_as_each_alone(rounding: str) -> None:
    """Bit by bit, rows and columns of heads, groups that a head fills up, and formats of one scale for several rows."""
    gm, flat, found = prepared()
    _, main = main_output(gm, found.outputs)
    every = [*units(gm)[0], *wholes(units(gm)[0])]
    weights = Weights(gm, every, rounding=rounding)
    seen = gather(weights, Program(gm), flat, [main], General(0, is_logits=True, masks=[None] * len(flat)))
    formats = [Format.parse(text) for text in ("u3/g16", "u4/g32/f16", "i8/ch", "i4", "f4e2m1/g16/e4m3")]
    formats = formats[:3] if rounding == "hqq" else formats
    together = scores(weights, every, formats, ["quant-fisher", "weight-error"], seen)
    for unit in every:
        alone = scores(weights, [unit], formats, ["quant-fisher", "weight-error"], seen)
        for method, own in alone.items():
            assert own[unit.name] == together[method][unit.name]
    assert list(together["weight-error"]) == [unit.name for unit in every]


def test_each_score_is_its_formula() -> None:
    gm, flat, found = prepared()
    _, main = main_output(gm, found.outputs)
    every = units(gm)[0]
    weights = Weights(gm, every)
    general = General(0, is_logits=True, masks=[None] * len(flat))
    seen = gather(weights, Program(gm), flat, [main], general, first_order=True)
    unit = weights.units["model.layers.0.self_attn.o_proj.o1"]
    made = scores(weights, [unit], FORMATS[:1], list(METHODS), seen, outliers={unit.name: 0.25})
    w, back = weights.part(unit, FORMATS[0])
    e = back - w
    fisher, gradient = (held[unit.fqn][:, unit.start : unit.stop] for held in (seen.fisher, seen.gradient))
    energy = seen.energy[unit.fqn][unit.start : unit.stop] / seen.rows[unit.fqn]
    relative = e.square().sum() / w.square().sum()
    wanted = {
        "quant-fisher": (fisher * e * e).sum() / 2 / seen.weight,
        "michel": (seen.taylor[unit.name] / seen.samples) ** 2 * relative,
        "tacq": (gradient * e * w).abs().sum() / seen.samples,
        "outlier": 0.25 * relative,
        "activation-norm": (energy * e * e).sum(),
        "weight-error": e.square().sum(),
    }
    for method, value in wanted.items():
        assert made[method][unit.name][TEXTS[0]] == pytest.approx(float(value), rel=1e-5), method


def test_rows_of_a_large_unit_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gm, flat, found = prepared()
    _, main = main_output(gm, found.outputs)
    every = units(gm)[0]
    weights = Weights(gm, every)
    seen = gather(weights, Program(gm), flat, [main], General(0, is_logits=True, masks=[None] * 2))
    whole = scores(weights, every, FORMATS, ["quant-fisher"], seen)["quant-fisher"]
    monkeypatch.setattr("qfx.analysis.scores._LARGEST", 512)
    some = scores(weights, every, FORMATS, ["quant-fisher"], seen)["quant-fisher"]
    assert some != whole
    for name, row in some.items():
        for text, value in row.items():
            assert value == pytest.approx(whole[name][text], rel=0.35), (name, text)


def test_a_task_weighs_what_its_loss_reads() -> None:
    """A loss of the first token's logits alone: the gradient of everything else is zero."""
    gm, flat, found = of_zoo("bert")
    batches = [{"labels": torch.zeros(2)}]

    def loss(outputs: Any, batch: Any) -> torch.Tensor:
        assert set(batch) == {"labels"}
        states: torch.Tensor = outputs.last_hidden_state
        energy: torch.Tensor = states[:, 0].square().sum(-1) + batch["labels"]
        return energy

    options = Options(formats=TEXTS, measure=0, heads=False, caches=False)
    general, notes = score_graph(gm, flat, options, outputs=found.outputs, progress=False)
    only, _ = score_graph(gm, flat, options, outputs=found.outputs, loss=loss, labelled=batches, progress=False)
    assert [note.node for note in notes if "no gradient reaches it" in note.reason] == ["pooler.dense"]
    assert only.score()["pooler.dense"] == dict.fromkeys(TEXTS, 0.0)
    half = Options(formats=TEXTS, measure=0, heads=False, caches=False, task_weight=0.5)
    mixed, _ = score_graph(gm, flat, half, outputs=found.outputs, loss=loss, labelled=batches, progress=False)
    name = "encoder.layer.0.attention.self.query.q0"
    three = [made.score()[name][TEXTS[0]] for made in (only, mixed, general)]
    assert len(set(three)) == 3 and all(v > 0 for v in three)


def test_measurements_bring_scores_to_scale() -> None:
    gm, flat, found = prepared()
    made, _ = score_graph(
        gm, flat, Options("weight-error", ("u2/g16", "u4/g16"), measure=2), outputs=found.outputs, progress=False
    )
    assert {Format.parse(t).bits for row in made.measured.values() for t in row} == {2, 4}
    kinds = {unit.kind for unit in made.units if unit.name in made.measured}
    assert kinds == {"embedding", "q", "k", "v", "o", "linear", "lm_head"}
    calibrated, raw = made.calibrated(), made.score()
    for name, row in made.measured.items():
        for text, value in row.items():
            assert calibrated[name][text] <= value
    rows = {(r.kind, r.bits): r for r in made.predictions() if r.kind == EVERY}
    before = rows[EVERY, 4].ratio
    assert before > 0 and abs(math.log(before)) > 1, "a squared error is no divergence"
    after = [calibrated[n][t] / v for n, row in made.measured.items() for t, v in row.items()]
    assert max(after) <= 1 + 1e-9 and min(after) > 0.5
    assert raw != calibrated


def test_scores_are_the_same_every_time() -> None:
    gm, flat, found = prepared()
    options = Options(formats=TEXTS, measure=1)
    first, again = (score_graph(gm, flat, options, outputs=found.outputs, progress=False)[0] for _ in range(2))
    assert first.to_json() == again.to_json()
    other = score_graph(gm, flat, Options(formats=TEXTS, measure=1, seed=1), outputs=found.outputs, progress=False)[0]
    assert other.scores != first.scores, "other labels are drawn"


def test_caches_are_rounded_head_by_head() -> None:
    gm, flat, found = prepared()
    _, attentions, _ = units(gm)
    of_caches = caches(attentions)
    assert [c.unit.kind for c in of_caches] == ["cache_k", "cache_v"]  # one key head for two query heads
    assert of_caches[0].unit.shape == (16,)
    measured = Measure(gm, flat, caches=of_caches, outputs=found.outputs)
    k, v = (c.unit.name for c in of_caches)
    losses = [measured.single(k, Format.parse(text)) for text in ("u2/tok", "u4/tok", "i8/tok")]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0
    assert measured.kld({k: Format.parse("u2/tok"), v: Format.parse("u2/tok")}) > losses[0]
    assert measured.kld({}) == 0, "no format stays behind"
    assert isinstance(measured.program, CachedProgram)


def test_bad_input() -> None:
    gm, flat, found = prepared()
    for kwargs, message in (
        ({"method": "fisher"}, "no method 'fisher', did you mean 'quant-fisher'"),
        ({"task_weight": 1.5}, "task_weight must be from 0 to 1, found 1.5"),
        ({"measure": -1}, "measure must be 0 or more"),
        ({"by": "blocks"}, "units are 'heads' or 'layers', found 'blocks'"),
        ({"formats": ()}, "at least one format"),
        ({"formats": ("i8/tok",)}, "'i8/tok' is no format of a weight"),
        ({"formats": ("x4",)}, "bad format 'x4'"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**kwargs)
    with pytest.raises(ValueError, match="a labelled batch for each batch, found 0 for 2"):
        score_graph(gm, flat, outputs=found.outputs, loss="causal-lm", progress=False)
    with pytest.raises(ValueError, match="no weight that could have a format"):
        score_graph(gm, flat, outputs=found.outputs, skip=[u.fqn for u in units(gm)[0]], progress=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda o, b: o.logits.sum() * math.nan, "loss of batch 1 is nan"),
        (lambda o, b: o.logits.exp().exp().exp().exp().sum(), "loss of batch 1 is inf"),
        (lambda o, b: o.logits, "cannot be differentiated"),
        (lambda o, b: torch.zeros(()), "without a gradient"),
        (lambda o, b: 1.0, "found: float"),
        (lambda o, b: o.states, "no output 'states'"),
    ],
)
def test_bad_losses(value: Any, message: str) -> None:
    gm, flat, found = prepared()
    options = Options(formats=TEXTS, measure=0, heads=False)
    with pytest.raises((ValueError, AttributeError), match=message):
        score_graph(gm, flat, options, outputs=found.outputs, loss=value, labelled=[None, None], progress=False)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model, batches = causal()
    gm, flat, found = captured(model, batches)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj"):
        score_graph(gm, flat, Options(formats=TEXTS, measure=0), outputs=found.outputs, progress=False)
