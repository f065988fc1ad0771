from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import qfx
from qfx.allocation.allocate import problem_of
from qfx.allocation.problem import Choice
from qfx.analysis.units import Unit
from qfx.annotation import each, from_json
from qfx.errors import QfxWarning, UnsupportedError
from qfx.format import Format
from qfx.measuring import measure
from qfx.rounding.method_options import AllocationOptions
from tests.qfx.analysis.models import causal
from tests.zoo import ZOO

FAST: dict[str, Any] = {
    "formats": ("u2/g16/f16", "u3/g16/f16", "u4/g16/f16", "i8/ch"),
    "probe": "u3/g16/f16",
    "refine": 8,
}
FAST |= {"embeddings": FAST["formats"]}
KINDS = [{"target": t, "w": "u4/g16/f16"} for t in ("linear", "embedding", "tied")]


def recipe(**allocation: Any) -> qfx.Recipe:
    return qfx.Recipe.parse({"name": "mix", "rules": KINDS, "rounding": "mse", "allocation": {**FAST, **allocation}})


def stored(model: nn.Module, plan: qfx.Plan) -> int:
    """Bytes of the weights that have formats in the model quantized by the plan."""
    report = qfx.report(qfx.quantize(copy.deepcopy(model), plan))
    return sum(row.bytes_after for row in report if row.quantized and not row.shared)


@pytest.mark.parametrize(
    ("kind", "units"),
    [
        *(("tied", "heads"), ("llama", "layers")),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("llama", "heads"), ("tied", "layers"))),
    ],
)
def test_a_plan_keeps_its_budget_and_tells_it(kind: str, units: Any) -> None:
    model, data = causal(kind)
    made = qfx.plan(model, recipe(), data, units=units, avg_bits=4)
    told = made.sensitivities["allocation"]
    elements = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert told["budget"] == {"avg_bits": 4.0, "bytes": elements // 2}
    assert stored(model, made) == told["bytes"] <= elements // 2
    assert told["average_bits"] == pytest.approx(8 * told["bytes"] / elements)
    assert told["bytes"] > 0.9 * elements / 2, "most of it is used"
    assert len({row["format"] for row in told["units"].values()}) > 1
    assert any(row["head"] is not None for row in told["units"].values()) == (units == "heads")
    assert told["measured"] <= told["measured_before"]
    assert told["predicted"] > 0


@pytest.mark.slow
def test_heads_begin_where_whole_weights_end() -> None:
    """What `judged` compares: the plan of whole weights, and the same with weights cut by heads. Here on other data."""
    model, data = causal(batches=4)
    few = recipe(samples=36)
    heads, layers = (qfx.plan(model, few, data, units=units, avg_bits=3.5) for units in ("heads", "layers"))
    judged = heads.sensitivities["allocation"]["judged"]
    assert judged["on"] == "data kept apart"
    assert {fqn: layers.annotations[fqn]["w"] for fqn in judged["whole"]} == judged["whole"]
    cut = any(isinstance(roles["w"], list | dict) for roles in heads.annotations.values())
    assert cut == (judged["better"] == "heads")
    assert not cut or judged["heads"] < judged["layers"]
    assert "judged" not in layers.sensitivities["allocation"]


@pytest.mark.parametrize("weighting", ["uniform", "energy"])
def test_what_is_measured_is_what_the_quantized_model_loses(weighting: Literal["uniform", "energy"]) -> None:
    model, data = causal()
    asked = recipe(samples=10**6).override(weighting=weighting)
    made = qfx.plan(model, asked, data, avg_bits=3.5)
    quantized = qfx.quantize(copy.deepcopy(model), made)
    with torch.no_grad():
        pairs = [(model(**batch).logits, quantized(**batch).logits) for batch in data]
    found = measure.kld(*(torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in (0, 1)))
    assert made.sensitivities["allocation"]["measured"] == pytest.approx(found, rel=5e-3)


@pytest.mark.slow
def test_it_is_the_same_each_time_and_survives_a_file(tmp_path: Path) -> None:
    model, data = causal()
    first, second = (qfx.plan(model, recipe(), data, avg_bits=4) for _ in range(2))
    assert first == second
    first.save(tmp_path)
    again = qfx.Plan.load(tmp_path)
    assert again == first
    assert again.recipe.allocation == AllocationOptions(**FAST, avg_bits=4)
    outputs = [qfx.quantize(copy.deepcopy(model), plan)(**data[0]).logits for plan in (first, again)]
    assert torch.equal(*outputs)


@pytest.mark.slow
def test_quantize_takes_a_budget_and_equal_heads_lie_together() -> None:
    model, data = causal()
    quantized = qfx.quantize(copy.deepcopy(model), recipe(), data, avg_bits=4)
    assert qfx.report(quantized).totals["bytes_after"] < 0.3 * qfx.report(quantized).totals["bytes_before"]
    made = qfx.plan(model, recipe(), data, avg_bits=4)
    for roles in made.annotations.values():
        assert len(formats := each(from_json(roles["w"]))) == 1 or len(set(formats)) > 1


@pytest.mark.slow
def test_memory_of_a_device_leaves_room_for_caches() -> None:
    """Keys and values of the layers in f32, at the batch and the context; an 8-bit cache leaves more to the weights."""
    model, data = causal()
    config: Any = model.config
    layers, width = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    sizes = []
    for context, fields in ((64, {}), (128, {}), (128, {"cache": "i8/ch"})):
        asked = recipe(refine=0, **fields)
        made = qfx.plan(model, asked, data, max_memory=26_000, batch=1, context=context)
        sizes.append(made.sensitivities["allocation"]["budget"]["bytes"])
    assert sizes[0] - sizes[1] == 2 * layers * width * 64 * 4
    assert sizes[2] > sizes[1]
    heads, head = config.num_key_value_heads, config.head_dim
    asked = recipe(refine=0)
    asked = asked.override(rules=(*asked.rules, qfx.Rule(target="cache", k="i8", v="i8", residual=0)))
    made = qfx.plan(model, asked, data, max_memory=26_000, batch=1, context=128)
    less = layers * heads * 129 * 2 * (4 * head - (head + 2))  # one token more, its scale in f16
    assert made.sensitivities["allocation"]["budget"]["bytes"] - sizes[1] == less
    with pytest.raises(ValueError, match="max_memory=1000 is too small"):
        qfx.plan(model, recipe(refine=0), data, max_memory=1000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "most"), [({"ratio": 0.25}, 2 * 0.25), ({"max_bytes": 12_000}, None), ({"max_loss": 2}, None)]
)
def test_budgets_of_other_kinds(budget: dict[str, Any], most: float | None) -> None:
    model, data = causal()
    made = qfx.plan(model, recipe(refine=0), data, **budget)
    elements = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    size = stored(model, made)
    if most is not None:
        assert size <= most * elements
    if "max_bytes" in budget:
        report = qfx.report(qfx.quantize(copy.deepcopy(model), made))
        assert report.totals["bytes_after"] <= 12_000, "norms are counted there"
    if "max_loss" in budget:
        assert size < elements, "no 8 bits for everything are needed"
        ids = torch.cat([batch["input_ids"] for batch in data])
        models = model, qfx.quantize(copy.deepcopy(model), made)
        with torch.no_grad():
            before, after = (measure.perplexity(torch.cat([m(**b).logits for b in data]), ids) for m in models)
        assert after / before - 1 <= 0.0201


def test_a_rule_for_a_name_holds() -> None:
    model, data = causal()
    held = recipe().override(
        rules=(*recipe().rules, qfx.Recipe.parse("w8a16").rules[0].model_copy(update={"target": "lm_head"}))
    )
    made = qfx.plan(model, held, data, avg_bits=4.5)
    assert made.annotations["lm_head"] == {"w": "i8/ch"}
    assert "lm_head" not in made.sensitivities["allocation"]["units"]
    assert stored(model, made) == made.sensitivities["allocation"]["bytes"]
    with pytest.raises(ValueError, match=r"avg_bits=2.9 is too small[\s\S]*the rule for 'lm_head', w=i8/ch, holds"):
        qfx.plan(model, held, data, avg_bits=2.9)


def test_constraints_of_the_options_are_kept() -> None:
    model, data = causal()
    made = qfx.plan(model, recipe(ties=("qkv",), classes=2, tile=32), data, avg_bits=4)
    rows = made.sensitivities["allocation"]["units"].values()
    assert len({row["format"] for row in rows if row["kind"] in "qkv"}) == 1
    assert len({Format.parse(row["format"]).bits for row in rows if row["layer"]}) <= 2


@pytest.mark.parametrize("method", ["measured", "weight-error"])
def test_scores_of_an_analysis(method: str) -> None:
    model, data = causal()
    made = qfx.plan(model, recipe(method=method), data, avg_bits=4)
    assert made.sensitivities["allocation"]["method"] == method
    assert made.sensitivities["allocation"]["bytes"] <= made.sensitivities["allocation"]["budget"]["bytes"]


@pytest.mark.slow
def test_a_sensitivity_is_taken_with_the_formats_that_it_has() -> None:
    model, data = causal()
    found = qfx.analyze(model, data, formats=("u2/g16/f16", "u4/g16/f16"), measure=1, progress=False)
    made = qfx.plan(model, recipe(), data, avg_bits=4, sensitivity=found)
    told = made.sensitivities["allocation"]
    assert told["method"] == "sensitivity"
    assert {row["format"] for row in told["units"].values()} <= {"u2/g16/f16", "u4/g16/f16"}
    other = qfx.analyze(model, data, formats=("u2/g16/f16",), units="layers", measure=0, progress=False)
    with pytest.raises(ValueError, match=r"the sensitivity has no score of 'model.layers.0"):
        qfx.plan(model, recipe(), data, avg_bits=4, sensitivity=other)


def test_a_task_tells_the_loss() -> None:
    model, data = causal()
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in data]
    made = qfx.plan(model, recipe(), labelled, avg_bits=4, loss="causal-lm")
    told = made.sensitivities["allocation"]
    assert told["method"] == "quant-fisher"
    assert told["what"] == "causal-lm: half the mean squared change of a sample's loss"
    assert told["measured"] <= told["measured_before"]
    with pytest.raises(ValueError, match="method='measured' measures the divergence"):
        qfx.plan(model, recipe(method="measured"), labelled, avg_bits=4, loss="causal-lm")
    with pytest.raises(ValueError, match="labels"):
        qfx.plan(model, recipe(), data, avg_bits=4, loss="classification")


@pytest.mark.slow
def test_a_share_of_a_task_and_the_general_rest() -> None:
    model, data = causal()
    labelled = [{**batch, "labels": batch["input_ids"]} for batch in data]
    mixed = qfx.plan(model, recipe(task_weight=0.5), labelled, avg_bits=4, loss="causal-lm")
    what = mixed.sensitivities["allocation"]["what"]
    assert what.startswith("0.5 of causal-lm") and what.endswith("0.5 of KL divergence, nats per position")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "recipe 'mix' needs a budget"),
        ({"avg_bits": 1.5}, r"the budget avg_bits=1.5 is too small\n  expected: at least avg_bits=\d"),
        ({"avg_bits": 16.5}, "avg_bits=16.5 is above what 16 bits"),
        ({"avg_bits": 4, "ratio": 0.2}, "one budget is needed"),
        ({"avg_bits": 4, "context": 64}, "batch and context are for the budget max_memory"),
        ({"max_memory": 20_000, "context": 4096}, r"caches and activations take \d+"),
    ],
)
def test_bad_budgets_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, data = causal()
    with pytest.raises(ValueError, match=message):
        qfx.plan(model, recipe(), data, **arguments)


def test_data_and_a_graph_are_needed() -> None:
    model, data = causal()
    with pytest.raises(ValueError, match="recipe 'mix' needs calibration data"):
        qfx.plan(model, recipe(), avg_bits=4)
    with pytest.raises(ValueError, match="a loss says where bytes are spent, and there is no budget"):
        qfx.plan(model, "w8a16", data, loss="causal-lm")

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.fc(x) if x.sum().item() > 0 else self.fc(-x)
            return found

    with pytest.raises(UnsupportedError, match="formats of units are allocated on the model's graph"):
        qfx.plan(Broken(), recipe(), [torch.randn(4, 32)], avg_bits=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:pooler.dense. no gradient")
@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral"])
def test_models_of_other_kinds(name: str) -> None:
    """One weight for q, k and v; no logits; experts."""
    model, inputs = ZOO[name]()
    made = qfx.plan(model, recipe(refine=2), [inputs], avg_bits=5)
    told = made.sensitivities["allocation"]
    assert 0.95 * told["budget"]["bytes"] < stored(model, made) == told["bytes"] <= told["budget"]["bytes"]
    assert 0 < told["measured"] < 0.1
    assert told["what"].startswith("relative squared error" if name == "bert" else "KL divergence")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{"rounding": "gptq"}, {"weighting": "energy"}, {"rounding": "learned", "learned": {"steps": 2}}]
)
@pytest.mark.filterwarnings("ignore:.*saw fewer tokens")
def test_the_mix_is_rounded_by_what_the_layers_read(fields: dict[str, Any]) -> None:
    """By methods that see data, in the formats that were allocated."""
    model, data = causal()
    plain = qfx.plan(model, recipe(refine=0), data, avg_bits=4)
    made = qfx.plan(model, recipe(refine=0).override(**fields), data, avg_bits=4)
    assert made.annotations == plain.annotations
    assert stored(model, made) == stored(model, plain)
    assert any(key.endswith("codes") for key in made.tensors)


def test_tiles_are_of_weights_that_heads_cut() -> None:
    units = [Unit(f"q{i}", "q", "q", "", (8, 32), 0, 8 * i, 8 * i + 8, i, "a") for i in range(4)]
    units.append(Unit("fc", "fc", "linear", "", (8, 8)))
    choices = {unit.name: [Choice(unit.name, Format("i8", "ch"), 1, 1.0)] for unit in units}
    (tile,) = problem_of(units, choices, AllocationOptions(avg_bits=4, tile=16)).tiles
    assert (tile.units, tile.multiple) == (("q0", "q1", "q2", "q3"), 2)
    assert problem_of(units, choices, AllocationOptions(avg_bits=4, tile=8)).tiles == []
    whole = problem_of(units, choices, AllocationOptions(avg_bits=4, tile=24))
    assert (whole.tiles, whole.ties) == ([], [("q0", "q1", "q2", "q3")]), "four heads are no whole number of tiles"


@pytest.mark.filterwarnings("ignore::qfx.errors.QfxWarning")
def test_strict_refuses_what_a_table_keeps() -> None:
    model, data = causal("tied")
    with pytest.raises(UnsupportedError, match="its format is not allocated: lm_head"):
        qfx.plan(model, recipe().override(ignore=("lm_head",)), data, avg_bits=5, strict=True)
    assert issubclass(QfxWarning, UserWarning)
