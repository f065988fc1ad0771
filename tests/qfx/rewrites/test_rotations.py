"""Rotations by recipe: exact in live models and graphs, recorded as seed and size, saved, compiled and exported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Plan, QfxWarning, Recipe, Rule, UnsupportedError
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear
from tests.qfx.rewrites.test_transform import error
from tests.quantized import call
from tests.zoo import ZOO, Inputs

FLOAT = tuple(Rule(target=kind, w="f32") for kind in ("linear", "experts", "embedding"))
ROTATED = ("rotate", "rotate-down")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def planned(name: str, rewrites: tuple[str, ...], **fields: Any) -> tuple[nn.Module, Inputs, Plan]:
    model, inputs = ZOO[name]()
    rules = fields.pop("rules", FLOAT)
    return model, inputs, qfx.plan(model, Recipe(name="r", rules=rules, rewrites=rewrites, **fields))


@pytest.mark.parametrize(
    ("name", "records"),
    [
        ("llama", ["norm-fold", "rotate", "rotate-heads", "rotate-down"]),
        ("gpt2", ["untie", "norm-fold", "centre", "rotate", "rotate-heads", "rotate-down"]),
        *(
            pytest.param(name, None, marks=pytest.mark.slow)
            for name in ("opt", "mixtral", "qwen3", "gpt_neox", "vit", "whisper")
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
def test_the_live_function_stays(name: str, records: list[str] | None, tmp_path: Path) -> None:
    """Planned, saved and read as a plan, written into the model, saved and loaded as a model."""
    model, inputs, plan = planned(name, ROTATED)
    wanted, float_model = call(model, inputs), copy.deepcopy(model)
    assert records is None or list(dict.fromkeys(r["name"] for r in plan.rewrites)) == records
    plan.save(tmp_path / "plan")
    assert not plan.tensors, "a rotation is recorded as its size and seed"
    model = qfx.quantize(model, Plan.load(tmp_path / "plan"))
    assert error(wanted, call(model, inputs)) <= 1e-5
    qfx.save(model, tmp_path / "model")
    again = call(qfx.load(tmp_path / "model", float_model), inputs)
    assert all(torch.equal(a, b) for a, b in zip(call(model, inputs), again, strict=True))


def test_the_packed_linear_rotates_its_input() -> None:
    model, _, plan = planned("llama", ("rotate-down",), rotation_seed=5)
    before = model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert isinstance(before, Tensor)
    expected = before.detach().clone()
    model = qfx.quantize(model, plan)
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, QuantLinear) and down.rotation == (96, 5)
    assert "rotation=(96, 5)" in repr(down)
    torch.testing.assert_close(down.weight, expected, rtol=0, atol=1e-6)  # as other code reads it
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(up, QuantLinear) and up.rotation is None


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_a_weight_of_several_formats(along: Any, tmp_path: Path) -> None:
    down = Rule(target="*.down_proj", w=["f32", "bf16"], along=along)
    model, inputs, plan = planned("llama", ("rotate-down",), rules=(*FLOAT, down))
    wanted, float_model = call(model, inputs), copy.deepcopy(model)
    model = qfx.quantize(model, plan)
    mixed = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(mixed, QuantMixed) and mixed.rotation == (96, 0)
    assert error(wanted, call(model, inputs)) < 3e-3
    qfx.save(model, tmp_path)
    again = qfx.load(tmp_path, float_model)
    assert error(call(model, inputs), call(again, inputs)) == 0
    before = float_model.get_submodule("model.layers.1.mlp.down_proj").weight
    assert isinstance(before, Tensor) and mixed.weight.shape == before.shape


@pytest.mark.slow
def test_both_doors_give_the_same() -> None:
    """By recipe in torch.compile, by plan in torch.compile, and compiled after qfx.quantize."""
    model, inputs = ZOO["llama"]()
    recipe = Recipe(name="r", rules=(Rule(target="linear", x="i8/tok", w="i8/ch"),), rewrites=ROTATED)
    plan = qfx.plan(model, recipe)
    live = qfx.quantize(copy.deepcopy(model), plan)
    wanted = call(live, inputs)
    for target, options in ((model, {"recipe": recipe}), (model, {"plan": plan}), (live, {})):
        torch._dynamo.reset()
        how: Any = {**options, "strict": True, "cache": False}
        compiled: Any = torch.compile(target, backend="qfx", options=how)
        with torch.no_grad():
            found = [compiled(**inputs).logits]
        assert error(wanted, found) < 2e-2
        assert sum(row.op == "hadamard" for row in qfx.report(compiled)) in (0, 2)


@pytest.mark.slow
def test_exported(tmp_path: Path) -> None:
    model, inputs = ZOO["gpt2"]()
    recipe = Recipe(name="r", rules=(Rule(target="linear", x="i8/tok", w="i8/ch"),), rewrites=ROTATED)
    live = qfx.quantize(copy.deepcopy(model), recipe)
    wanted = call(live, inputs)[0]
    args = {"input_ids": inputs["input_ids"]}
    for number, (source, asked) in enumerate([(live, None), (model, recipe)]):
        path = tmp_path / f"{number}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QfxWarning)
            qfx.export_onnx(source, args, path, recipe=asked)
        session = onnxruntime.InferenceSession(path)
        found = session.run(None, {"input_ids": args["input_ids"].numpy()})[0]
        assert error([wanted], [torch.from_numpy(found)]) < 2e-2


def notes_of(model: nn.Module, recipe: Recipe) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qfx.plan(model, recipe)
    return [str(w.message) for w in caught if issubclass(w.category, QfxWarning)]


@pytest.mark.slow
def test_post_norm_models_are_told_and_refused_under_strict() -> None:
    model, _ = ZOO["gemma3"]()
    recipe = Recipe(name="r", rules=FLOAT, rewrites=("rotate",))
    said = notes_of(model, recipe)
    assert len(said) == 1 and "the residual stream cannot be rotated" in said[0] and "post-norm model" in said[0]
    with pytest.raises(UnsupportedError, match="post-norm model"):
        qfx.plan(model, recipe, strict=True)
    plan = _quiet(model, recipe)
    assert {record["name"] for record in plan.rewrites} == {"rotate-heads"}, "nothing was untied or folded in vain"


def _quiet(model: nn.Module, recipe: Recipe) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        return qfx.plan(model, recipe)


def test_nothing_to_rotate_is_told() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    recipe = Recipe(name="r", rules=FLOAT, rewrites=("rotate",))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        qfx.plan(model, recipe, [(torch.randn(2, 8),)])
    assert any("no residual stream was found" in str(w.message) for w in caught)


def test_experts_keep_their_inputs_and_say_so() -> None:
    model, _ = ZOO["mixtral"]()
    said = notes_of(model, Recipe(name="r", rules=FLOAT, rewrites=("rotate-down",)))
    assert said and all("experts read their weights" in line for line in said)


def test_a_size_without_hadamard_matrix_is_told() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 22), nn.ReLU(), nn.Linear(22, 4))
    recipe = Recipe(name="r", rules=FLOAT, rewrites=("rotate-down",))
    x = torch.randn(3, 8)
    wanted = model(x).detach()
    with pytest.warns(QfxWarning, match="no Hadamard matrix of order 22 is known here: a factor of order 11 is random"):
        plan = qfx.plan(model, recipe, [(x,)])
    assert error([wanted], [qfx.quantize(model, plan)(x).detach()]) < 1e-6


def test_linears_that_stay_in_float_are_not_rotated() -> None:
    model, _, plan = planned("llama", ("rotate-down",), rules=(Rule(target="*.up_proj", w="i8/ch"),))
    assert plan.rewrites == []
    assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj"), nn.Linear)


@pytest.mark.parametrize(
    ("w", "asked", "block"), [("f4e2m1/g32/e8m0", "auto", 32), ("i4/g32", "auto", 64), ("i4/ch", 16, 16)]
)
def test_blocks(w: str, asked: Any, block: int) -> None:
    """FP4 groups keep their outliers: the rotation stays inside them."""
    rules = (Rule(target="linear", w=w),)
    _, _, plan = planned("llama", ROTATED, rules=rules, rotation_block=asked)
    found = {record["name"]: record["block"] for record in plan.rewrites if "block" in record}
    assert found["rotate"] == block
    assert found["rotate-heads"] == 16
    assert found["rotate-down"] == (96 if block == 64 else block)


def test_a_plan_that_rotates_what_the_model_cannot() -> None:
    model, _, plan = planned("llama", ("rotate-down",))
    down = model.get_submodule("model.layers.0.mlp.down_proj")
    down.forward = lambda x: nn.functional.linear(x, down.weight)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"the plan rotates the input of 'model\.layers\.0\.mlp\.down_proj'"):
        qfx.quantize(model, plan)


def test_queries_and_keys_are_rotated_in_graphs_alone() -> None:
    with pytest.warns(QfxWarning, match="left out of live models where attention runs in float"):
        model, inputs, plan = planned("llama", ("rotate-qk",))
    wanted = call(model, inputs)
    assert [record["name"] for record in plan.rewrites] == ["rotate-qk"] * 2
    assert error(wanted, call(qfx.quantize(model, plan), inputs)) < 1e-6
