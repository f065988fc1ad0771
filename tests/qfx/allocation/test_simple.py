"""qfx.allocation.simple: heads, edges and layers that are lifted to more bits."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import fx, nn

import qfx
from qfx import Format, Plan, Recipe, Rule, annotation, graph
from qfx.allocation.simple import lift
from qfx.analysis.measured import Measure
from qfx.analysis.units import units
from qfx.annotation import Columns
from qfx.errors import QfxWarning, UnsupportedError
from qfx.passes.annotate import annotate
from qfx.rounding.method_options import AllocationOptions, LiftOptions
from tests.qfx.analysis.models import Batch, captured, ids
from tests.zoo import VOCAB, ZOO

LOW, HIGH = Format.parse("u2/g16/f16"), Format.parse("i8/g32/f16")
Prepared = tuple[fx.GraphModule, list[list[Any]], Any]


def model_and_data() -> tuple[nn.Module, list[Batch]]:
    """Two layers, 4 query and 2 KV heads of 16."""
    model, _ = ZOO["llama"]()
    return model, [{"input_ids": ids(seed=i, vocabulary=VOCAB), "use_cache": False} for i in range(2)]


@functools.cache
def prepared() -> Prepared:
    return captured(*model_and_data())


def lifted(*rules: Rule, **options: Any) -> tuple[fx.GraphModule, Plan, list[Any]]:
    gm, batches, found = prepared()
    gm = graph.copy(gm)
    rules = rules or (Rule(target="linear", w=str(LOW)),)
    recipe = Recipe(name="r", rules=rules, rounding="mse", lift=LiftOptions(**options))
    assert annotate(gm, recipe) == []
    plan = Plan(recipe)
    notes = lift(gm, plan, batches, outputs=found.outputs, progress=False)
    return gm, plan, notes


def weights(gm: fx.GraphModule) -> dict[str, Any]:
    found = {graph.fqn_of(n).removeprefix("model."): annotation.get(n).get("w") for n in gm.graph.nodes}
    return {name: fmt for name, fmt in found.items() if fmt is not None}


@pytest.mark.slow
def test_the_heads_that_cost_most() -> None:
    gm, plan, notes = lifted(heads=0.25)
    groups = plan.sensitivities["lift"]["groups"]
    assert notes == [] and len(groups) == 8  # two layers of four query heads
    order = sorted(groups, key=lambda name: -groups[name]["loss"])
    assert [name for name in groups if groups[name]["lifted"]] == sorted(order[:2], key=list(groups).index)
    found = weights(gm)
    assert len(found) == 15 and all(fmt == LOW for name, fmt in found.items() if "self_attn" not in name)
    q = [fmt for name, fmt in found.items() if "q_proj" in name]
    assert sum(list(annotation.each(fmt)).count(HIGH) for fmt in q) == 2
    assert all(isinstance(found[n], Columns) == isinstance(found[n.replace("o_proj", "q_proj")], tuple)
               for n in found if "o_proj" in n)  # fmt: skip
    named = {name.removeprefix("model."): roles["w"] for name, roles in plan.annotations.items()}
    assert named == {name: annotation.to_json(fmt) for name, fmt in found.items() if fmt != LOW}
    # heads of one format lie together
    assert all(sum(a != b for a, b in itertools.pairwise(q)) <= 1 for q in map(annotation.each, q))


def test_the_loss_of_a_head_is_that_of_its_rows_and_columns() -> None:
    _, plan, _ = lifted(heads=0.25)
    gm, batches, found = prepared()
    own, attentions, _ = units(gm)
    measure = Measure(gm, batches, outputs=found.outputs)
    wanted = {
        u.name: LOW for u in own if u.attention == attentions[1].name and u.head == {"q": 3, "o": 3}.get(u.kind, 1)
    }
    assert len(wanted) == 4
    told = plan.sensitivities["lift"]["groups"][f"{attentions[1].name}.3"]["loss"]
    assert told == pytest.approx(measure.kld(wanted), rel=1e-4) and told > 1e-4


def test_critical_heads_beat_the_others() -> None:
    """Negative control: the same number of heads, those that cost least."""
    _, plan, _ = lifted(heads=0.5)
    groups = plan.sensitivities["lift"]["groups"]
    gm, batches, found = prepared()
    own, attentions, _ = units(gm)
    measure = Measure(gm, batches, outputs=found.outputs)
    low = {u.name: LOW for u in own if u.kind not in ("embedding",)}
    chosen = dict(low)
    for name in (name for name, told in groups.items() if not told["lifted"]):
        attention, head = name.rsplit(".", 1)
        chosen |= {
            u.name: HIGH for u in own
            if u.attention == attention and u.head == (int(head) if u.kind in "qo" else int(head) // 2)
        }  # fmt: skip
    assert plan.sensitivities["lift"]["measured"] < measure.kld(chosen) < measure.kld(low)
    assert attentions


def test_all_heads() -> None:
    gm, _, _ = lifted(heads=1.0)
    assert {fmt for name, fmt in weights(gm).items() if "self_attn" in name} == {HIGH}


def test_edges() -> None:
    gm, plan, notes = lifted(edges=1)
    (note,) = notes
    assert note.minor and note.reason == "edges=1 are all of its 2 layers"
    assert {name: fmt for name, fmt in weights(gm).items() if fmt == LOW} == {"lm_head": LOW}
    assert plan.sensitivities["lift"]["groups"]["lm_head"] == {"loss": None, "lifted": False}


def test_layers_until_perplexity_rises_by_less() -> None:
    gm, plan, notes = lifted(max_loss=1e9)
    assert notes == [] and set(weights(gm).values()) == {LOW} and plan.sensitivities["lift"]["rise"] < 1e9
    free = plan.sensitivities["lift"]["rise"]
    gm, plan, notes = lifted(max_loss=free * 0.75)
    told = plan.sensitivities["lift"]
    chosen = [name for name, group in told["groups"].items() if group["lifted"]]
    assert notes == [] and 0 < told["rise"] <= free * 0.75 and 0 < len(chosen) < 3
    order = sorted(told["groups"], key=lambda name: -told["groups"][name]["loss"])
    assert set(chosen) == set(order[: len(chosen)])
    lifted_names = {name for name, fmt in weights(gm).items() if fmt == HIGH}
    assert lifted_names == {
        name for name in weights(gm) if any(f"model.{name}".startswith(f"{c}.") or name == c for c in chosen)
    }


def test_what_cannot_be_reached_is_told() -> None:
    _, plan, (note,) = lifted(max_loss=1e-6, format="u3/g16/f16")
    assert note.reason.endswith("% with every layer in u3/g16/f16, 1e-06 % were allowed") and not note.minor
    assert all(group["lifted"] for group in plan.sensitivities["lift"]["groups"].values())


def test_weights_with_as_many_bits_or_several_formats_stay() -> None:
    mix = ["u2/g16/f16", "u4/g16/f16"]
    gm, plan, _ = lifted(
        Rule(target="*q_proj", w=str(LOW)),
        Rule(target="*up_proj", w="i8/ch"),
        Rule(target="*down_proj", w=mix),
        edges=1,
    )
    found = weights(gm)
    assert {str(fmt) for name, fmt in found.items() if "up_proj" in name} == {"i8/ch"}
    assert {annotation.show(fmt) for name, fmt in found.items() if "down" in name} == {"[u2/g16/f16,u4/g16/f16]"}
    assert {fmt for name, fmt in found.items() if "q_proj" in name} == {HIGH}
    assert list(plan.sensitivities["lift"]["groups"]) == ["model.layers.0", "model.layers.1"]


def test_given_scores_decide() -> None:
    gm, batches, found = prepared()
    own, attentions, _ = units(gm)
    scores = {u.name: {str(LOW): float(u.attention == attentions[0].name and u.head == 0)} for u in own}
    gm = graph.copy(gm)
    recipe = Recipe(name="r", rules=(Rule(target="linear", w=str(LOW)),), lift=LiftOptions(heads=0.125))
    annotate(gm, recipe)
    plan = Plan(recipe)
    lift(gm, plan, batches, outputs=found.outputs, scores=scores, progress=False)
    groups = plan.sensitivities["lift"]["groups"]
    assert [name for name, told in groups.items() if told["lifted"]] == [f"{attentions[0].name}.0"]


# Bad input


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "none"),
        ({"heads": 0.3, "edges": 1}, "heads=0.3 and edges=1"),
        ({"edges": 2, "max_loss": 1.0}, "edges=2 and"),
    ],
)
def test_one_way_is_needed(options: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=f"one of heads, edges and max_loss says what is lifted, found {found}"):
        LiftOptions(**options)


@pytest.mark.parametrize("options", [{"heads": 0}, {"heads": 1.5}, {"edges": 0}, {"max_loss": -1}, {"head": 0.3}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LiftOptions(**options)
    with pytest.raises(ValueError, match="is no format of a weight"):
        LiftOptions(edges=1, format="i8/tok")


def test_conflicts_name_both() -> None:
    fields: dict[str, Any] = {"name": "r", "rules": (Rule(target="linear", w=str(LOW)),), "lift": LiftOptions(edges=1)}
    with pytest.raises(ValueError, match="lift and allocation both change formats"):
        Recipe(**fields, allocation=AllocationOptions())
    with pytest.raises(ValueError, match="lift and outliers both change formats"):
        Recipe(**fields, outliers=6.0)


def test_nothing_to_lift() -> None:
    with pytest.raises(ValueError, match=r"(?s)nothing to lift to 'i8/g32/f16'.*a rule gives one format of fewer bits"):
        lifted(Rule(target="linear", w="i8/ch"), edges=1)
    with pytest.raises(ValueError, match=r"heads whose projections"):
        lifted(Rule(target="*up_proj", w=str(LOW)), heads=0.3)


@pytest.mark.slow
def test_a_model_without_perplexity() -> None:
    model, inputs = ZOO["bert"]()
    recipe = Recipe.parse("w4a16-lift")
    with pytest.raises(ValueError, match="max_loss is a rise of perplexity, which this model does not have"):
        qfx.plan(model, recipe, [inputs])


# Presets


def test_presets_need_data() -> None:
    for name in ("heads-top30", "w4a16-edges", "w4a16-lift"):
        assert Recipe.parse(name).needs_data and Recipe.parse(Recipe.parse(name).to_dict()) == Recipe.parse(name)
    with pytest.raises(ValueError, match="data"):
        qfx.plan(ZOO["bert"]()[0], "heads-top30")


@pytest.mark.slow
@torch.no_grad()
def test_heads_top30(tmp_path: Any) -> None:
    """From the preset to a saved plan and a live model, smaller than 8 bits throughout and nearer than 4 bits."""
    model, data = model_and_data()
    wanted = model(**data[0]).logits
    recipe = Recipe.parse("heads-top30").override(rounding="mse")  # these are too few data for GPTQ
    plan = qfx.plan(model, recipe, data)
    assert sum(told["lifted"] for told in plan.sensitivities["lift"]["groups"].values()) == 2  # 30 % of 8
    plan.save(tmp_path / "plan")
    quantized = qfx.quantize(model, Plan.load(tmp_path / "plan"))
    near = float((quantized(**data[0]).logits - wanted).square().mean())
    other, _ = model_and_data()
    plain = qfx.quantize(other, recipe.override(lift=None))
    assert 0 < near < float((plain(**data[0]).logits - wanted).square().mean())


def test_a_model_without_a_graph_is_refused() -> None:
    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum().item() > 0 else x

    with pytest.raises(UnsupportedError, match="allocated on the model's graph, which cannot be had"):
        qfx.plan(Free(), "w4a16-edges", [torch.ones(2, 32)])


@pytest.mark.slow
def test_refused_layers_are_warned_about() -> None:
    model, data = model_and_data()
    options = LiftOptions(max_loss=1e-6, format="u3/g16/f16")
    rules = (Rule(target="linear", w=str(LOW)),)
    recipe = Recipe.parse("w4a16-lift").override(rules=rules, lift=options, rounding="mse")
    with pytest.warns(QfxWarning, match=r"lift: perplexity rises by .* % with every layer in u3/g16/f16"):
        qfx.plan(model, recipe, data)
