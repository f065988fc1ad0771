"""qfx.rounding.correct: corrections after rounding are found, recorded, and taken by both doors, files and exports."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
import qfx.onnx
from qfx.errors import QfxWarning
from qfx.live.modules import QuantLinear
from qfx.plan import Plan
from qfx.recipe import Recipe


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(self.up(x).relu()))  # type: ignore[no-any-return]


DATA = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) + 1 for i in range(6)]
QUIET: dict[str, Any] = {"target": "linear", "w": "i2/g32", "x": "f32"}


def recipe(rule: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    return Recipe.parse({"rules": [rule or QUIET], **fields})


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    return torch.cat([model(x) for x in DATA])


def noise(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("rule", "rounding"),
    [
        pytest.param(rule, rounding, id=f"{name}-{rounding}", marks=[] if quick else pytest.mark.slow)
        for name, rule in (("float", QUIET), ("x", {"target": "linear", "w": "u2/g32", "x": "i8/tok"}))
        for rounding, quick in (("rtn", name == "float"), ("gptq", name == "x"))
    ],
)
def test_the_mean_of_the_result_is_that_of_float(rounding: str, rule: dict[str, Any]) -> None:
    model = Stack().eval()
    wanted = outputs(model)
    found = {
        on: outputs(qfx.quantize(deepcopy(model), recipe(rule, rounding=rounding, bias_correction=on), DATA))
        for on in (False, True)
    }
    shift = {on: float((found[on] - wanted).mean(0).square().mean()) for on in found}
    assert shift[True] < 1e-3 * shift[False]
    assert noise(found[True], wanted) < noise(found[False], wanted)


def test_low_rank_takes_most_of_the_error_away() -> None:
    model = Stack().eval()
    wanted = outputs(model)
    found = [noise(outputs(qfx.quantize(deepcopy(model), recipe(low_rank=rank), DATA)), wanted) for rank in (0, 4, 32)]
    print(found)
    assert found[1] < 0.75 * found[0]
    assert found[2] < 1e-4 * found[0], "of full rank nothing is left"


def both() -> tuple[nn.Module, Plan]:
    model = Stack().eval()
    rule = {"target": "linear", "w": "i4/g32", "x": "f32"}
    return model, qfx.plan(model, recipe(rule, low_rank=2, bias_correction=True, rounding="gptq"), DATA)


def test_both_doors_and_files_take_them(tmp_path: Path) -> None:
    model, plan = both()
    plan.save(tmp_path / "plan")
    held = qfx.quantize(deepcopy(model), Plan.load(tmp_path / "plan"))
    wanted = outputs(held)
    options: dict[str, Any] = {"plan": plan}
    compiled = torch.compile(model, backend="qfx", options=options)
    torch.testing.assert_close(outputs(compiled), wanted, rtol=1e-4, atol=1e-4)
    qfx.save(held, tmp_path / "model")
    again = qfx.load(tmp_path / "model", Stack())
    assert torch.equal(outputs(again), wanted)
    qfx.export_onnx(model, (DATA[0],), tmp_path / "model.onnx", plan=plan)
    exported: Any = qfx.onnx.load(tmp_path / "model.onnx")
    (found,) = exported(x=DATA[0]).values()
    torch.testing.assert_close(found, wanted[:16], rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_live_model() -> None:
    model, plan = both()
    down = qfx.quantize(model, plan).get_submodule("down")
    assert isinstance(down, QuantLinear) and down.bias is not None and down.low is not None
    assert [tuple(t.shape) for t in down.low] == [(2, 64), (32, 2)]
    x = torch.randn(3, 64)
    torch.testing.assert_close(down(x), x @ down.weight.T + down.bias, rtol=1e-4, atol=1e-4)
    row = next(row for row in qfx.report(model) if row.node == "down")
    assert row.bytes_after == 32 * 64 // 2 + 64 * 4 + (2 * 64 + 32 * 2) * 4


def test_what_is_told() -> None:
    _, plan = both()
    told = plan.sensitivities["correction"]
    assert list(told) == ["up", "down", "head"]
    assert all(0 < one["low_rank"] < 1 and one["shift"] > 0 for one in told.values())
    assert [record["name"] for record in plan.rewrites] == ["low-rank", "bias-correction"] * 3


def test_the_error_of_each_node_is_that_with_corrections() -> None:
    model = Stack().eval()
    plain, corrected = (qfx.plan(model, recipe(low_rank=rank), DATA).sensitivities["sqnr_db"] for rank in (0, 16))
    assert all(corrected[name] > plain[name] + 3 for name in plain)


def test_what_cannot_be_corrected_is_told() -> None:
    class Twice(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.head(x)  # type: ignore[no-any-return]

    with pytest.warns(QfxWarning, match="head.*: not corrected: it is called several times"):
        plan = qfx.plan(Twice().eval(), recipe(bias_correction=True), DATA)
    assert [record["linear"] for record in plan.rewrites] == ["up", "down"]


def test_corrections_need_data() -> None:
    for fields in ({"bias_correction": True}, {"low_rank": 2}):
        with pytest.raises(ValueError, match="needs calibration data"):
            qfx.plan(Stack(), recipe(**fields))
