"""How much of their extremes inputs keep: what is found, where it is written, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import Plan, QfxWarning, Recipe
from qfx.calibration.clipping import CLIPS, Errors
from qfx.format import Format
from qfx.live.modules import QuantLinear
from qfx.measuring.measure import sqnr_db

F = Format.parse


class Block(nn.Module):
    """Two linears that read one value, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.gate, self.down = nn.Linear(256, 64), nn.Linear(256, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(self.up(x) * torch.sigmoid(self.gate(x)))
        return found


def rows(seed: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, 256, generator=torch.Generator().manual_seed(seed))


def recipe(x: str = "u4/tok", **fields: Any) -> Recipe:
    rules: Any = [{"target": "linear", "x": x, "w": "i8/ch"}]
    return Recipe.parse({"rules": rules, "clip_inputs": True, **fields})


def test_shares_are_found_and_recorded(tmp_path: Path) -> None:
    plan = qfx.plan(Block().eval(), recipe(), [rows(0), rows(1)])
    told: Any = plan.sensitivities["clip"]
    assert set(told) == {"up", "gate", "down"}
    assert told["up"] == told["gate"], "they read one value"
    for fqn, one in told.items():
        assert plan.annotations[fqn]["x"] == f"u4/tok/c{one['percent']}"
        assert 60 <= one["percent"] < 100 and 0.5 < one["error"] < 1
    assert told["up"]["error"] < 0.95, "normal values"
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan


@torch.no_grad()
@pytest.mark.parametrize("x", ["u4/tok", *(pytest.param(x, marks=pytest.mark.slow) for x in ("i4/tok", "i3/dyn"))])
def test_the_error_is_less_on_other_data(x: str) -> None:
    wanted, unseen = Block().eval()(rows(9)), rows(9)
    clipped = qfx.quantize(Block().eval(), recipe(x), [rows(0), rows(1)])
    whole = qfx.quantize(Block().eval(), recipe(x, clip_inputs=False), [rows()])
    assert sqnr_db(wanted, clipped(unseen)) > sqnr_db(wanted, whole(unseen)) + 0.2


def test_what_lies_at_the_extremes_is_not_clipped() -> None:
    """Inputs of 0 and 1 are exact with the whole range, and lose by every share of it."""
    plan = qfx.plan(Block().eval(), recipe(), [(rows() > 0).float()])
    assert plan.sensitivities["clip"]["up"] == {"percent": 100, "error": 1.0}
    assert plan.annotations["up"]["x"] == "u4/tok"


def test_the_search_takes_the_least_of_the_candidates() -> None:
    weight, x = torch.randn(8, 64), torch.randn(300, 64)
    seen = Errors(F("u4/tok"), [weight], "fc")
    seen.update(x[:100])
    seen.update(x[100:])
    wanted = []
    for clip in CLIPS:
        from qfx.numerics import fake_quantize

        lost = fake_quantize(x, Format("u4", "tok", clip=clip), activation=True) - x
        wanted.append(float((lost @ weight.T).square().sum()))
    assert seen.errors.tolist() == pytest.approx(wanted, rel=1e-4)
    assert seen.clip == CLIPS[wanted.index(min(wanted))]
    with pytest.raises(ValueError, match="fc"):
        seen.update(torch.full((1, 64), torch.nan))


def test_what_the_recipe_says_itself_stays() -> None:
    rules: Any = [
        {"target": "linear", "x": "u4/tok", "w": "i8/ch"}, {"target": "up", "x": "u4/tok/c70"},
        {"target": "down", "x": "f8e4m3/tok"},
    ]  # fmt: skip
    plan = qfx.plan(Block().eval(), Recipe.parse({"rules": rules, "clip_inputs": True}), [rows()])
    assert set(plan.sensitivities["clip"]) == {"gate"}
    assert plan.annotations["up"]["x"] == "u4/tok/c70" and plan.annotations["down"]["x"] == "f8e4m3/tok"


@pytest.mark.filterwarnings("ignore")
def test_columns_of_their_own_are_told_and_left() -> None:
    x = rows()
    x[:, 3] *= 100
    with pytest.warns(QfxWarning) as caught:
        plan = qfx.plan(Block().eval(), recipe("i8/tok", outliers=20.0), [x])
    assert plan.annotations["up"]["x"] == "i8/tok"
    assert "down" in plan.sensitivities["clip"] and "up" not in plan.sensitivities["clip"]
    del caught


def test_nothing_to_clip_is_told() -> None:
    from qfx.calibration.clipping import clip_inputs
    from qfx.capture import capture_export
    from qfx.passes.annotate import annotate
    from qfx.pipeline import prepare

    asked = Recipe.parse({"rules": [{"target": "linear", "w": "i4/ch"}]})
    model = Block().eval()
    gm = capture_export(model, (rows(),)).gm
    prepare(gm)
    annotate(gm, asked)
    (note,) = clip_inputs(gm, Plan.of(model, asked), [[rows()]])
    assert "there is nothing to clip" in note.reason and note.minor


@torch.no_grad()
def test_both_doors_compute_the_same() -> None:
    """The live model, saved and loaded, and ONNX Runtime."""
    model: Any = qfx.quantize(Block().eval(), recipe(), [rows()])
    assert isinstance(model.up, QuantLinear) and model.up.x_format.startswith("u4/tok/c")
    wanted = model(rows(5))
    compiled: Any = torch.compile(model, backend="qfx")
    assert sqnr_db(wanted, compiled(rows(5))) > 50


@torch.no_grad()
def test_gptq_sees_the_clipped_inputs() -> None:
    model: Any = qfx.quantize(Block().eval(), recipe(rounding="gptq"), [rows(count=300)])
    assert model.up.x_format == model.gate.x_format != "u4/tok"
    report = {row.node: row for row in qfx.report(model)}
    assert f"x={model.up.x_format}" in report["up"].asked
