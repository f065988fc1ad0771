"""qfx.passes.awq: factors by what the weights meet, chosen on the result of rounded weights, folded exactly."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import Recipe, Rule, annotation, graph
from qfx.calibration.importance import Importance
from qfx.format import Format
from qfx.numerics import fake_quantize
from qfx.passes import awq, smooth
from qfx.passes.calibrate import calibrate
from qfx.passes.observe import insert_observers, remove_observers
from qfx.rounding.scales import rounded, search
from tests.graphs import Function
from tests.quantized import call
from tests.rewriting import cleaned
from tests.zoo import ZOO

LOUD = (3, 17)


def layers() -> Any:
    torch.manual_seed(0)
    norm = nn.LayerNorm(32)
    with torch.no_grad():
        norm.weight[list(LOUD)] = 40
    return Function(
        lambda own, x: own.a(own.norm(x)) + own.b(own.norm(x)), norm=norm, a=nn.Linear(32, 24), b=nn.Linear(32, 24)
    )


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def watched(gm: fx.GraphModule, x: Tensor, w: str = "i3/g16") -> dict[str, Any]:
    for node in gm.graph.nodes:
        if graph.op_name(node) == "linear":
            annotation.set(node, "w", Format.parse(w))
    observers = insert_observers(gm, awq.watch)
    calibrate(gm, [[x]], observers)
    remove_observers(gm)
    return {fqn: observer for (fqn, _), observer in observers.items()}


def test_channels_that_carry_much_are_scaled_up() -> None:
    x = rows(64, 32)
    gm = cleaned(layers(), x)
    stats = watched(gm, x)
    assert stats["a"] is stats["b"], "both read one value"
    ((site, factor),) = smooth.smooth(gm, stats, chooser=awq.choose)[0]
    assert {w.name for w in site.linears} == {"a", "b"} and factor.shape == (32,)
    rest = [i for i in range(32) if i not in LOUD]
    assert float(factor[list(LOUD)].min()) > 1.5 * float(factor[rest].max())
    assert float(factor.max() * factor.min()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("searched", [False, True])
def test_the_factor_is_the_best_of_the_grid(searched: bool) -> None:
    """Against errors computed here: quantized weights, the float inputs."""
    x = rows(64, 32)
    model = layers()
    gm = cleaned(model, x)
    stats = watched(gm, x)
    ((_, factor),) = smooth.smooth(gm, stats, chooser=functools.partial(awq.choose, searched=searched))[0]
    inputs: Tensor = model.norm(x).detach()
    fmt = Format.parse("i3/g16")

    def stored(w: Tensor, energy: Tensor) -> Tensor:
        if not searched:
            return fake_quantize(w, fmt)
        return rounded(w, fmt, search(w, fmt, Importance(energy)))

    def error(f: Tensor) -> float:
        total = 0.0
        for linear in (model.a, model.b):
            w: Tensor = linear.weight.detach()
            exact = inputs @ w.T
            found = (inputs / f) @ stored(w * f, (inputs / f).square().mean(0)).T
            total += float((found - exact).square().sum() / exact.square().sum())
        return total

    size = inputs.abs().mean(0)
    errors = [error(torch.ones(32)), *(error(awq.factor_of(size, e)) for e in awq.GRID)]
    assert error(factor) == pytest.approx(min(errors), rel=1e-3) and min(errors) < 0.8 * errors[0]


def test_the_recipe_says_how_factors_are_judged() -> None:
    """With scales that are searched other factors are best than with those of the extremes."""
    x, chosen = rows(64, 32), {}
    for rounding in ("rtn", "mse"):
        rule = Rule(target="linear", w="i3/g16")
        plan = qfx.plan(layers(), Recipe(name="r", rules=(rule,), rewrites=("awq",), rounding=rounding), [x])
        (record,) = plan.rewrites
        chosen[rounding] = plan.tensors[record["factor"]]
    gm = cleaned(layers(), x)
    stats = watched(gm, x)
    for rounding, factor in chosen.items():
        chooser = functools.partial(awq.choose, searched=rounding == "mse")
        ((_, own),) = smooth.smooth(gm, stats, chooser=chooser)[0]
        assert torch.allclose(own, factor, rtol=1e-5)
    assert not torch.equal(chosen["rtn"], chosen["mse"])


def test_nothing_is_chosen_where_nothing_helps() -> None:
    x = rows(64, 32)
    gm = cleaned(layers(), x)
    stats = watched(gm, x, "f32")
    assert smooth.smooth(gm, stats, chooser=awq.choose) == ([], [])
    for node in gm.graph.nodes:
        annotation.clear(node)
    assert smooth.smooth(gm, stats, chooser=awq.choose) == ([], [])


def test_factor_of() -> None:
    size = torch.tensor([0.0, 1.0, 4.0, 16.0])
    found = awq.factor_of(size, 0.5)
    assert found[0] == 1 and found[3] / found[1] == pytest.approx(4)
    assert torch.equal(awq.factor_of(torch.zeros(3), 0.5), torch.ones(3))
    assert torch.allclose(awq.factor_of(torch.tensor([2.0, 8.0]), 0.5), torch.tensor([0.5, 2.0]).sqrt())


FLOAT = tuple(Rule(target=kind, w="i4/g16") for kind in ("linear", "experts"))


@pytest.mark.filterwarnings("ignore::qfx.QfxWarning")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", {"smooth", "v-o", "up-down"}),
        pytest.param("gpt2", {"smooth", "v-o"}, marks=pytest.mark.slow),
        pytest.param("mixtral", {"smooth", "v-o", "up-down"}, marks=pytest.mark.slow),
    ],
)
def test_the_function_stays_in_float(name: str, found: set[str]) -> None:
    """Factors are chosen for 4 bits; without the rounding nothing changes. They are folded: no input is divided."""
    model, inputs = ZOO[name]()
    wanted = call(model, inputs)
    plan = qfx.plan(model, Recipe(name="r", rules=FLOAT, rewrites=("awq",)), [inputs])
    assert {record["name"] for record in plan.rewrites} == found
    assert not any(key.endswith("/smooth") for key in plan.tensors)
    plan.annotations.clear()
    for a, b in zip(wanted, call(qfx.quantize(model, plan), inputs), strict=True):
        assert float((a - b).norm() / a.norm()) <= 1e-5


@torch.no_grad()
def test_it_helps_and_both_doors_agree() -> None:
    x = rows(64, 32)
    wanted = layers()(x)
    errors = {}
    for rewrites in ((), ("awq",)):
        recipe = Recipe(name="r", rules=(Rule(target="linear", w="i3/g16"),), rewrites=rewrites)
        plan = qfx.plan(layers().eval(), recipe, [x])
        found = qfx.quantize(layers().eval(), plan)(x)
        errors[rewrites] = float((found - wanted).norm() / wanted.norm())
        torch._dynamo.reset()
        options: dict[str, Any] = {"plan": plan, "backend": "reference"}
        compiled: Any = torch.compile(layers().eval(), backend="qfx", options=options)
        assert float((compiled(x) - found).norm() / wanted.norm()) < 1e-5
    assert errors[("awq",)] < 0.8 * errors[()]


def test_some_channels_of_the_experts_choose_as_well_as_all() -> None:
    """48 experts of 64 channels: with 8 of each the factor is as good, measured on all of them."""
    generator = torch.Generator().manual_seed(0)
    w, fmt = torch.randn(48, 64, 64, generator=generator), Format.parse("u4/g16")
    loud = torch.exp(1.5 * torch.randn(64, generator=generator))
    x = torch.randn(256, 64, generator=generator) * loud
    size, ends = x.abs().mean(0), (x.amin(0), x.amax(0))
    whole = smooth.Layer(w, None, fmt, "minmax", 100.0)
    some = smooth.Layer(smooth._some(w, 0), None, fmt, "minmax", 100.0)
    assert some.weight.shape == (48, 8, 64)
    errors = {}
    for layer in (whole, some):
        energy = layer.energy(x)
        errors[layer] = [layer.error(x, *ends, awq.factor_of(size, e), energy) for e in (0.0, *awq.GRID)]
    best = min(range(len(errors[some])), key=errors[some].__getitem__)
    assert errors[whole][best] < 1.01 * min(errors[whole])
    assert min(errors[whole]) < 0.8 * errors[whole][0], "there was something to choose"
