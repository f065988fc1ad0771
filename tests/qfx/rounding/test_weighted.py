"""Weights rounded by what errors cost for the inputs: into the plan, told, better on the data than blind rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Plan, QfxWarning, Recipe, Rule
from qfx.format import Format
from qfx.rounding.rounded import get


class Two(nn.Module):
    """Linears behind inputs whose channels differ in energy and go together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.out = nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.fc(x)))
        return found


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(256, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    return mixed * torch.linspace(0.2, 3, 64)


def recipe(weighting: Any, w: Any = "i3/g16", **rule: Any) -> Recipe:
    return Recipe(name="r", rules=(Rule(target="linear", w=w, **rule),), rounding="mse", weighting=weighting)


def error(plan: Plan, x: Tensor) -> float:
    """Relative squared error of fc's result on the data."""
    w = Two().fc.weight.detach()
    packed = get(plan.tensors, "fc", Format.parse("i3/g16"), (32, 64))
    found = w if packed is None else packed.dequantize()
    return float(((found - w) @ x.T).square().sum() / (w @ x.T).square().sum())


def test_the_more_is_known_the_less_is_lost() -> None:
    x = data()
    plans = {kind: qfx.plan(Two().eval(), recipe(kind), [x]) for kind in ("energy", "covariance")}
    blind = qfx.quantize(Two().eval(), recipe("uniform"), [x]).fc.weight - Two().fc.weight.detach()  # type: ignore[union-attr, operator]
    w = Two().fc.weight.detach()
    lost = float((blind @ x.T).square().sum() / (w @ x.T).square().sum())
    energy, covariance = error(plans["energy"], x), error(plans["covariance"], x)
    assert covariance < 0.8 * energy and covariance < 0.8 * lost


def test_what_is_told_is_the_error_within_blocks() -> None:
    x = data()
    made = qfx.plan(Two().eval(), recipe("covariance"), [x])
    told = made.sensitivities["rounding"]
    assert told.keys() == {"fc", "out"}
    for one in told.values():
        assert 0 < one["error_after"] < one["error_before"] and one["seconds"] >= 0
    packed = get(made.tensors, "fc", Format.parse("i3/g16"), (32, 64))
    assert packed is not None
    w = Two().fc.weight.detach()
    d, blocks = (packed.dequantize() - w), range(0, 64, 16)

    def energy(m: Tensor) -> float:
        return sum(float((x[:, i : i + 16] @ m[:, i : i + 16].T).square().sum()) for i in blocks)

    assert told["fc"]["error_after"] == pytest.approx(energy(d) / energy(w), rel=1e-3)


@torch.no_grad()
def test_both_doors_take_the_plan(tmp_path: Any) -> None:
    x = data()
    plan = qfx.plan(Two().eval(), recipe("covariance"), [x])
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    live: Any = qfx.quantize(Two().eval(), plan)
    assert torch.equal(live.fc.w_codes, plan.tensors["fc/codes"])
    torch._dynamo.reset()
    options: dict[str, Any] = {"plan": plan, "backend": "reference"}
    compiled: Any = torch.compile(Two().eval(), backend="qfx", options=options)
    assert torch.allclose(compiled(x), live(x), atol=1e-5)


@pytest.mark.parametrize("weighting", ["energy", "covariance"])
@pytest.mark.parametrize("along", ["rows", "columns"])
def test_weights_of_several_formats(weighting: str, along: Any) -> None:
    x = data()
    plan = qfx.plan(Two().eval(), recipe(weighting, ["i8/ch", "i3/g8", "i2/g16", "i8/ch"], along=along), [x])
    names = {key.partition("/")[0] for key in plan.tensors}
    assert {n for n in names if n.startswith("fc")} >= {f"fc.{along}{i}" for i in range(3)}
    live: Any = qfx.quantize(Two().eval(), plan)
    assert torch.equal(getattr(live.fc, f"{along}1_codes"), plan.tensors[f"fc.{along}1/codes"])


class Tied(nn.Module):
    """A table that a linear reads, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.table(ids).sin() * 3)
        return found


def test_a_tied_table_is_rounded_for_its_linear() -> None:
    ids = torch.arange(32).reshape(4, 8)
    made = Recipe(name="r", rules=(Rule(target="tied", w="u3/g16"),), rounding="mse", weighting="energy")
    plan = qfx.plan(Tied().eval(), made, [ids])
    assert torch.equal(plan.tensors["head/codes"], plan.tensors["table/codes"])
    live: Any = qfx.quantize(Tied().eval(), plan)
    assert torch.equal(live.head.w_codes, plan.tensors["head/codes"])
    assert live.head.w_codes.data_ptr() == live.table.w_codes.data_ptr()


def test_no_data_is_a_value_error_and_none_that_reaches_a_layer_is_told() -> None:
    with pytest.raises(ValueError, match="needs calibration data"):
        qfx.plan(Two().eval(), recipe("energy"))
    with pytest.warns(QfxWarning, match=r"no calibration data reached its 'w'"):
        plan = qfx.plan(Two().eval(), recipe("energy"), [data()[:0]])
    assert "fc/codes" not in plan.tensors


def test_bad_data_is_named() -> None:
    x = data()
    x[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"(?s)not finite in batch 1.*fc w"):
        qfx.plan(Two().eval(), recipe("energy"), [x])
