"""Exact rewrites by recipe on live models: the function in fp32 stays, the plan records them, graphs take them, too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import Plan, QfxWarning, Recipe, Rule
from tests.quantized import call
from tests.seeded import randn
from tests.zoo import ZOO, Inputs

FLOAT = tuple(
    Rule(target=kind, x="f32", w="f32") for kind in ("linear", "experts")
)  # annotated, and exact all the same
ALL = ("untie", "norm-fold", "smooth", "smooth-k", "v-o", "up-down")
DATA = {"smooth", "smooth-k", "v-o", "up-down"}

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")


@torch.no_grad()
def error(wanted: list[Tensor], found: list[Tensor]) -> float:
    return max(float((a - b).norm() / a.norm()) for a, b in zip(wanted, found, strict=True))


def rewritten(name: str, *rewrites: str) -> tuple[nn.Module, Plan, float]:
    """The live model, its plan and the relative error of its outputs."""
    model, inputs = ZOO[name]()
    wanted = call(model, inputs)
    plan = qfx.plan(model, Recipe(name="r", rules=FLOAT, rewrites=rewrites), [inputs] if DATA & {*rewrites} else None)
    model = qfx.quantize(model, plan)
    return model, plan, error(wanted, call(model, inputs))


# Rewrites that each architecture has sites for.
HAS = {
    "llama": {"norm-fold", "smooth", "smooth-k", "v-o", "up-down"},
    "gpt2": {"untie", "norm-fold", "smooth", "smooth-k", "v-o"},
    "bert": {"smooth", "smooth-k", "v-o"},
}


@pytest.mark.parametrize("rewrite", ALL)
@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "bert"))])
def test_each_rewrite_keeps_the_function(name: str, rewrite: str) -> None:
    _, plan, found = rewritten(name, rewrite)
    assert found <= 1e-5
    assert {record["name"] for record in plan.rewrites} == ({rewrite} & HAS[name])


@pytest.mark.parametrize(
    "name", [*HAS, *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "mixtral", "t5"))]
)
def test_all_rewrites_together_keep_the_function(name: str) -> None:
    _, plan, found = rewritten(name, *ALL)
    assert found <= 1e-5
    assert {record["name"] for record in plan.rewrites} >= HAS.get(name, set())


@pytest.mark.parametrize(
    "rewrite", ["v-o", *(pytest.param(n, marks=pytest.mark.slow) for n in ("norm-fold", "up-down"))]
)
def test_the_weights_really_changed(rewrite: str) -> None:
    model, inputs = ZOO["llama"]()
    before = copy.deepcopy(model)
    recipe = Recipe(name="r", rules=FLOAT, rewrites=(rewrite,))
    model = qfx.quantize(model, recipe, [inputs] if rewrite in DATA else None)
    name = "model.layers.0.mlp.down_proj" if rewrite == "up-down" else "model.layers.0.self_attn.v_proj"
    old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
    assert isinstance(old, Tensor) and isinstance(new, Tensor)
    assert float((old.detach() - new).abs().max()) > 0.01
    if rewrite == "norm-fold":
        assert bool((model.get_parameter("model.layers.0.input_layernorm.weight") == 1).all())


def test_rewrites_without_any_format() -> None:
    model, inputs = ZOO["llama"]()
    wanted = call(model, inputs)
    before = [type(m) for m in model.modules()]
    model = qfx.quantize(model, Recipe(name="fold", rules=(), rewrites=("norm-fold",)))
    assert [type(m) for m in model.modules()] == before
    assert error(wanted, call(model, inputs)) <= 1e-5
    assert bool((model.get_parameter("model.norm.weight") == 1).all())


def test_an_untied_model_stays_untied(tmp_path: Any) -> None:
    model, _, _ = rewritten("gpt2", "untie", "norm-fold")
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    qfx.save(model, tmp_path)
    loaded = qfx.load(tmp_path)
    inputs: Inputs = ZOO["gpt2"]()[1]
    assert error(call(model, inputs), call(loaded, inputs)) == 0


def test_what_cannot_be_rewritten_is_told_and_an_error_under_strict() -> None:
    model, _ = ZOO["bert"]()
    recipe = Recipe.parse("w8a8").override(rewrites=("norm-fold",))
    with pytest.warns(QfxWarning, match="its norm cannot be folded"):
        qfx.plan(model, recipe)
    with pytest.raises(qfx.UnsupportedError, match="its norm cannot be folded"):
        qfx.plan(model, recipe, strict=True)


def test_the_plan_serves_the_graph_too() -> None:
    torch._dynamo.reset()
    model, inputs = ZOO["llama"]()
    wanted = call(model, inputs)
    plan = qfx.plan(model, Recipe.parse("w8a8-smooth").override(rewrites=("norm-fold", "smooth")), [inputs])
    assert error(wanted, call(model, inputs)) == 0, "planning changes nothing"
    options: dict[str, Any] = {"plan": plan}
    compiled = call(torch.compile(model, backend="qfx", options=options), inputs)
    live = call(qfx.quantize(model, plan), inputs)
    assert error(wanted, live) < 0.1 and error(live, compiled) < 0.01
    torch._dynamo.reset()


class Outlier(nn.Module):
    """A norm of which one channel is large, read by linears; and a linear behind a GELU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[3] = 60

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return found


def test_smoothing_helps_where_channels_are_large() -> None:
    x = randn(64, 16)
    wanted = Outlier().eval()(x)
    errors = {}
    for recipe in ("w8a8-static", "w8a8-smooth"):
        model: Any = qfx.quantize(Outlier().eval(), recipe, [x])
        errors[recipe] = error([wanted], [model(x)])
        if recipe == "w8a8-smooth":
            assert model.up.smooth is None and float(model.norm.weight.detach()[3]) < 60, "the norm takes the factor"
    assert errors["w8a8-smooth"] < 0.7 * errors["w8a8-static"]


def test_an_explicit_factor_is_a_buffer_of_the_linear() -> None:
    x = randn(64, 16)
    model: Any = qfx.quantize(Outlier().eval(), "w8a8-smooth", [x], smooth_alpha=0.5)
    assert model.down.smooth is not None and model.down.smooth.shape == (32,)
    assert error([Outlier().eval()(x)], [model(x)]) < 0.05


class Shared(nn.Module):
    """A weight that another module's forward reads: its input cannot be divided in the live model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.gelu(self.up(x)), self.down.weight, self.down.bias)


def test_inputs_that_nobody_can_divide_are_left() -> None:
    x = randn(64, 16)
    plan = qfx.plan(Shared().eval(), "w8a8-smooth", [x], smooth_alpha=0.5)
    assert "up/smooth" in plan.tensors and "down/smooth" not in plan.tensors
    model = qfx.quantize(Shared().eval(), plan)
    assert error([Shared().eval()(x)], [model(x)]) < 0.05


def test_a_graph_is_recompiled_once_for_all_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever edits many sites does not write out the graph's code for each."""
    counted: list[fx.GraphModule] = []
    recompile = fx.GraphModule.recompile
    monkeypatch.setattr(fx.GraphModule, "recompile", lambda gm: counted.append(gm) or recompile(gm))  # type: ignore[func-returns-value]
    found = []
    for layers in (1, 4):
        model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(8, 8), nn.GELU())), nn.Linear(8, 8)).eval()
        counted.clear()
        plan = qfx.plan(
            model, "w8a8-smooth", [torch.randn(4, 8) * torch.arange(1, 9) for _ in range(2)], smooth_alpha=0.5
        )
        found.append((len(plan.rewrites), len(counted)))
    (few, once), (more, often) = found
    assert more >= few + 3 and once > 0 and often == once
