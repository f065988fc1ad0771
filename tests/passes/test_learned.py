"""qfx.passes.learned: the search over a block function, and as a method over blocks of a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

import qfx
from qfx.errors import QfxWarning
from qfx.format import Format
from qfx.numerics import QParams
from qfx.passes.learned import Learned, first_rate, learn
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.rounding.nearest import round_weight
from qfx.rounding.offsets import Offsets
from qfx.rounding.scales import search
from tests.zoo import ZOO


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Rows whose channels go together, as activations do: there rounding to nearest is far from the best."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn((*shape[:-1], max(2, shape[-1] // 8)), generator=generator)
    mix = torch.randn((few.shape[-1], shape[-1]), generator=torch.Generator().manual_seed(99))
    return few @ mix + 0.1 * torch.randn(shape, generator=generator)


def test_inference_mode_is_told() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    with torch.inference_mode(), pytest.raises(ValueError, match=r"(?s)'learned' needs gradients.*outside"):
        qfx.quantize(model, "w4a16", [rows(4, 16)], rounding="learned")
    assert isinstance(model[0], nn.Linear)


class TwoLayers:
    """y = relu(x A^T) B^T and what it gives in float, for some batches."""

    def __init__(self, batches: int = 4, dtype: torch.dtype = torch.float32) -> None:
        self.weights = {"a": rows(24, 32, seed=1).to(dtype), "b": rows(16, 24, seed=2).to(dtype)}
        self.inputs = [rows(2, 16, 32, seed=10 + i).to(dtype) for i in range(batches)]
        self.wanted = [self.forward(self.weights, i) for i in range(batches)]

    def forward(self, weights: Mapping[str, Tensor], batch: int) -> Sequence[Tensor]:
        x = self.inputs[batch]
        return (linear(relu(linear(x, weights["a"].to(x.dtype))), weights["b"].to(x.dtype)),)

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Squared error relative to the squares, over all batches."""
        found = [self.forward(weights, i)[0] for i in range(len(self.inputs))]
        noise = sum(float((f - w[0]).float().square().sum()) for f, w in zip(found, self.wanted, strict=True))
        return noise / sum(float(w[0].float().square().sum()) for w in self.wanted)

    def learn(
        self, fmt: str, steps: int = 60, *, optimizer: str = "adam", reach: float = 0.5, rate: float | None = None,
        params: Mapping[str, QParams] | None = None, **options: Any,
    ) -> Learned:  # fmt: skip
        asked = {
            name: Offsets(w, Format.parse(fmt), params=(params or {}).get(name), optimizer=optimizer, reach=reach)
            for name, w in self.weights.items()
        }
        rate = rate or first_rate(optimizer, steps)
        return learn(self.forward, asked, self.wanted, steps=steps, rate=rate, **options)

    def rounded(self, fmt: str, method: str) -> dict[str, Tensor]:
        return {n: round_weight(w, Format.parse(fmt), method, name=n).dequantize() for n, w in self.weights.items()}


def test_weights_that_may_move_further_fit_better() -> None:
    """Block-wise training, on data that was not trained on, too; by half a step it is rounding."""
    block, other = TwoLayers(8), TwoLayers()
    other.inputs = [rows(2, 16, 32, seed=100 + i) for i in range(4)]
    other.wanted = [other.forward(other.weights, i) for i in range(4)]
    fmt = Format.parse("u2/g16")
    params = {name: search(w, fmt) for name, w in block.weights.items()}
    errors = []
    for reach in (0.5, 1.0):
        found = block.learn(str(fmt), steps=150, rate=0.05, batches=2, reach=reach, params=params)
        errors.append(other.error({name: packed.dequantize() for name, packed in found.packed.items()}))
    print(f"{errors[0]:.2e} -> {errors[1]:.2e}")
    assert errors[1] < 0.85 * errors[0]
    with pytest.raises(ValueError, match="LearnedOptions.reach"):
        Recipe.parse({"rules": [], "learned": {"reach": 0.4}})


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
def test_a_descent_that_leads_away_leaves_the_weights_of_its_start(optimizer: str) -> None:
    block = TwoLayers()
    started = block.learn("i8/ch", steps=0)
    assert block.learn("i8/ch", steps=60, optimizer=optimizer).after < started.after  # negative control
    found = block.learn("i8/ch", steps=2, rate=1.0, optimizer=optimizer)
    assert found.before == found.after == started.after and found.clipped == started.clipped
    for name, packed in found.packed.items():
        assert torch.equal(packed.dequantize(), started.packed[name].dequantize())


@pytest.mark.parametrize("fmt", ["u2/g16", "i3/ch", "u4/g8", "i4/g16", "nf4/g16", "f4e2m1/g16/e8m0", "f4e2m1/g16/e4m3"])
def test_error_is_well_below_rounding_by_itself(fmt: str) -> None:
    block = TwoLayers()
    params = {name: search(w, Format.parse(fmt)) for name, w in block.weights.items()}
    found = block.learn(fmt, params=params)
    learned = block.error({name: packed.dequantize() for name, packed in found.packed.items()})
    plain = min(block.error(block.rounded(fmt, method)) for method in ("rtn", "mse"))
    print(f"{fmt}: {plain:.2e} -> {learned:.2e}")
    assert learned < 0.8 * plain
    assert found.after == pytest.approx(learned, rel=1e-4)
    assert found.before == pytest.approx(block.error(block.rounded(fmt, "mse")), rel=1e-4)


def test_without_a_step_it_is_rounding_to_nearest() -> None:
    block = TwoLayers()
    found, nearest = block.learn("u3/g16", steps=0), block.rounded("u3/g16", "rtn")
    assert all(torch.equal(found.packed[name].dequantize(), nearest[name]) for name in nearest)
    assert found.before == found.after


def test_the_seed_alone_says_what_is_found() -> None:
    block = TwoLayers()
    first, again, other = (block.learn("u3/g16", steps=20, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first.packed[n].data, again.packed[n].data) for n in first.packed)
    assert all(torch.equal(first.packed[n].scale, again.packed[n].scale) for n in first.packed)
    assert not all(torch.equal(first.packed[n].data, other.packed[n].data) for n in first.packed)


def test_a_step_may_look_at_several_batches() -> None:
    """All four batches in one step: order does not count, whatever the seed."""
    block = TwoLayers()
    first, other = (block.learn("u3/g16", steps=20, batches=4, seed=seed) for seed in (0, 1))
    assert first.after == pytest.approx(other.after, rel=0.05)
    assert block.learn("u3/g16", steps=20, batches=9).after == pytest.approx(first.after, rel=0.05)


def test_half_precision_blocks_are_learned() -> None:
    block = TwoLayers(dtype=torch.bfloat16)
    found = block.learn("u4/g16")
    assert found.after < 0.8 * found.before


def test_several_formats_and_one_that_no_result_depends_on() -> None:
    block = TwoLayers()
    idle = (torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), Format.parse("i4/g16"))
    asked = {
        "a": Offsets(block.weights["a"], Format.parse("i4/g16")),
        "b": Offsets(block.weights["b"], Format.parse("u2/g8")),
        "idle": Offsets(*idle),
    }
    found = learn(block.forward, asked, block.wanted, steps=20, rate=first_rate("adam", 20))
    assert {name: str(packed.format) for name, packed in found.packed.items()} == {
        "a": "i4/g16", "b": "u2/g8", "idle": "i4/g16",
    }  # fmt: skip
    assert torch.equal(found.packed["idle"].data, round_weight(*idle, "rtn", name="idle").data)


def test_results_that_are_not_finite_are_refused() -> None:
    block = TwoLayers()
    block.inputs[2][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"(?s)results of layers\.3 hold NaN or Inf.*expected: finite"):
        block.learn("i4/g16", name="layers.3")


class Stack(nn.Module):
    """Blocks `layers.<i>` of two linears each, and a head."""

    def __init__(self, layers: int = 2, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        block = [nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(layers)]
        self.layers = nn.ModuleList(block)
        self.head = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def recipe(*rules: dict[str, Any], steps: int = 30, **fields: Any) -> Recipe:
    asked = rules or ({"target": "linear", "w": "u3/g8"},)
    return Recipe.parse({"rules": list(asked), "rounding": "learned", "learned": {"steps": steps, "batch": 4}} | fields)


DATA = [rows(2, 16, seed=i) for i in range(8)]


def noise(model: Any, wanted: Tensor) -> float:
    with torch.no_grad():
        return float((torch.cat([model(x) for x in DATA]) - wanted).square().sum() / wanted.square().sum())


@torch.no_grad()
def test_blocks_of_a_model_are_learned_one_behind_the_other() -> None:
    model = Stack().eval()
    wanted = torch.cat([model(x) for x in DATA])
    found = {
        name: noise(qfx.quantize(deepcopy(model), recipe(rounding=name), DATA), wanted) for name in ("mse", "learned")
    }
    print(found)
    assert found["learned"] < 0.6 * found["mse"]


def test_what_is_told_about_each_weight() -> None:
    plan = qfx.plan(Stack().eval(), recipe(), DATA)
    told = plan.sensitivities["rounding"]
    assert list(told) == ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2", "head"]
    assert all(set(one) == {"error_before", "error_after", "clipped", "seconds"} for one in told.values())
    assert all(one["error_after"] < one["error_before"] for one in told.values())
    assert told["layers.0.0"]["error_after"] == told["layers.0.2"]["error_after"] != told["head"]["error_after"]


def test_both_doors_take_what_was_learned(tmp_path: Path) -> None:
    model, asked = Stack(layers=1, width=32).eval(), recipe({"target": "linear", "w": "i4/g32", "x": "f32"}, steps=5)
    data = [rows(2, 32, seed=i) for i in range(4)]
    plan = qfx.plan(model, asked, data)
    plan.save(tmp_path / "plan")
    held = qfx.quantize(deepcopy(model), Plan.load(tmp_path / "plan"))
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(model, backend="qfx", options=options)
    with torch.no_grad():
        torch.testing.assert_close(compiled(data[0]), held(data[0]), rtol=1e-5, atol=1e-5)
    again = qfx.plan(model, asked, data).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in plan.tensors.items())


def test_segments_inputs_in_8_bit_and_float_weights_among_them() -> None:
    rules = (
        {"target": "linear", "w": "u3/g8", "x": "i8/tok"},
        {"target": "layers.0.0", "w": ["u2/g8", "i4/g8"]},
        {"target": "layers.0.2", "w": ["u4/g8", "u3/g8"], "along": "columns"},
        {"target": "layers.1.0", "w": "f16", "x": "none"},
    )
    model = Stack().eval()
    plan = qfx.plan(model, recipe(*rules), DATA)
    assert {name.rpartition("/")[0] for name in plan.tensors if name.endswith("/codes")} == {
        *(f"layers.0.0.rows{i}" for i in (0, 1)), *(f"layers.0.2.columns{i}" for i in (0, 1)),
        "layers.1.0", "layers.1.2", "head",
    }  # fmt: skip
    with torch.no_grad():
        wanted = torch.cat([model(x) for x in DATA])
        nearest = qfx.quantize(deepcopy(model), recipe(*rules, rounding="rtn"), DATA)
        assert noise(qfx.quantize(model, plan), wanted) < 0.7 * noise(nearest, wanted)


@torch.no_grad()
def test_weights_of_experts_are_learned() -> None:
    model, inputs = ZOO["mixtral"]()
    rules = {"target": "experts", "w": "u3/g16"}
    plan = qfx.plan(model, recipe(rules, steps=3), [inputs])
    stored = [name for name in plan.tensors if name.endswith("/codes")]
    assert stored and all(plan.tensors[name].dim() == 3 for name in stored)


def test_a_block_that_gives_no_floats_is_rounded_and_told() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).argmax(-1)  # type: ignore[no-any-return]

    with pytest.warns(QfxWarning, match="head: its block gives nothing in floating point.*next step.*gptq"):
        plan = qfx.plan(Choice().eval(), recipe(), DATA)
    assert "head/codes" in plan.tensors
