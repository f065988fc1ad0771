"""qfx.pipeline: from a captured graph to a quantized one, and what is said on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qfx
from qfx import graph
from qfx.errors import Note, QfxWarning, UnsupportedError
from qfx.measuring.measure import sqnr_db
from qfx.pipeline import alike, annotate_from, apply_plan, prepare, told
from qfx.plan import Plan
from qfx.recipe import Recipe
from qfx.text import dump
from tests.graphs import Function, capture, counts, error

GOLDEN = """\
%inputs_0: i64[2,3] = input
%embedding: f32[2,3,4] = qfx.embedding(%inputs_0, @embed.w_codes, @embed.w_scale, None, i8/ch, 4, f32)  # w=i8/ch
%linear: f32[2,3,8] = qfx.linear(%embedding, @up.w_codes, @up.w_scale, None, @up.bias, None, None, None, i8/tok, i8/ch)  # x=i8/tok w=i8/ch
%gelu: f32[2,3,8] = aten.gelu(%linear)
%linear_1: f32[2,3,4] = qfx.linear(%gelu, @down.w_codes, @down.w_scale, None, @down.bias, None, None, None, i8/tok, i8/ch)  # x=i8/tok w=i8/ch
return [%linear_1]
"""  # noqa: E501


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = {"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}
    return Function(lambda own, ids: own.down(nn.functional.gelu(own.up(own.embed(ids)))), **layers)


def prepared() -> fx.GraphModule:
    gm = capture(mlp(), torch.ones(2, 3, dtype=torch.int64))
    prepare(gm)
    return gm


def test_a_recipe_without_data() -> None:
    gm = prepared()
    plain = graph.copy(gm)
    assert apply_plan(gm, None, Recipe.parse("w8a8")) == []
    assert dump(gm).rstrip() == GOLDEN.rstrip()
    ids = torch.tensor([[1, 2, 3], [4, 5, 8]])
    with torch.no_grad():
        assert 0 < error(plain(ids), gm(ids)) < 0.05
    assert counts(plain)["linear"] == 2 and "qfx" not in dump(plain), "the copy is not touched"


def test_a_plan() -> None:
    gm = prepared()
    tensors = {"down/x_scale": torch.tensor(0.01), "down/x_zero": torch.tensor(120, dtype=torch.uint8)}
    plan = Plan(
        recipe=Recipe.parse("w8a8-static"),
        annotations={"down": {"x": "u8", "w": "i8/ch"}, "of_another_part": {"w": "i8/ch"}},
        tensors=tensors,
    )
    assert apply_plan(gm, plan, plan.recipe) == []
    line = next(line for line in dump(gm).splitlines() if line.startswith("%linear_1"))
    assert "@down.x_scale, @down.x_zero, None, u8, i8/ch" in line
    assert "%linear: f32[2,3,8] = aten.linear" in dump(gm)


def test_a_plan_without_the_scale_that_it_asks_for() -> None:
    plan = Plan(recipe=Recipe.parse("w8a8-static"), annotations={"down": {"x": "u8", "w": "i8/ch"}})
    with pytest.raises(UnsupportedError, match=r"needs a calibrated scale[\s\S]*'down'[\s\S]*next step") as refused:
        apply_plan(prepared(), plan, plan.recipe)
    assert any("in pass 'quantize'" in note for note in refused.value.__notes__)


def test_formats_of_a_plan_reach_only_their_nodes() -> None:
    gm = prepared()
    annotate_from(gm, Plan(recipe=Recipe.parse("w8a8"), annotations={"up": {"w": "i4/g16"}}))
    assert [line.partition("  # ")[2] for line in dump(gm).splitlines() if "linear(" in line] == ["w=i4/g16", ""]


class Turned(nn.Module):
    """Reads the weight of one of its layers [N, K] as [K, N], too (a factored table in a model's head)."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mid = nn.Linear(narrow, wide, bias=False), nn.Linear(wide, wide)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, narrow] -> [rows, narrow]"""
        return torch.as_tensor(self.mid(self.up(x)) @ self.up.weight)


RECIPES: list[tuple[str, dict[str, Any], float]] = [
    ("w8a8", {}, 35),
    ("w8a8-static", {}, 33),
    ("w8a8-smooth", {}, 33),
    ("w4a16-gptq", {}, 15),
    ("w4a16-awq", {}, 15),
    ("w4a16-learned", {"learned": {"steps": 5}}, 12),
    ("w4a16-gptq", {"bias_correction": True}, 15),
    ("w4a16", {"low_rank": 4}, 15),
    ("w4a4-rotate", {}, 12),
    ("int8-outliers", {"outliers": 2.0}, 33),
    ("w4a16", {"rounding": "mse", "weighting": "energy"}, 15),
]


@pytest.mark.filterwarnings("ignore:(?!.*the other way round):qfx.QfxWarning")
@pytest.mark.parametrize("narrow", [32, 64], ids=["oblong", "square"])
@pytest.mark.parametrize(("recipe", "fields", "least"), RECIPES, ids=str)
def test_a_weight_that_is_read_both_ways_round(
    recipe: str, fields: dict[str, Any], least: float, narrow: int, fresh_dynamo: None
) -> None:
    """Statistics, rounded values and scales are of the way in which it is stored: of a square one no shape tells."""
    model, x = Turned(narrow, 64).eval(), torch.randn(64, narrow)
    wanted = model(x).detach()
    with pytest.warns(QfxWarning, match=r"up\.transposed: it reads up\.weight the other way round than"):
        plan = qfx.plan(model, recipe, [x], **fields)
    assert plan.layouts["up"] == "linear+read" and "up.transposed" not in plan.annotations
    live = qfx.quantize(Turned(narrow, 64).eval(), plan)
    options: dict[str, Any] = {"plan": plan, "backend": "reference"}
    fast = torch.compile(model, backend="qfx", options=options)
    with torch.no_grad(), pytest.warns(QfxWarning, match="the other way round"):
        found = fast(x)
    assert sqnr_db(wanted, found) > least and sqnr_db(wanted, live(x)) > least


HERE = f"{__file__}:12, in forward: self.fc(x)"
MAJOR = Note("fc", "its weight is computed", "bake the weight in", HERE)
MINOR = Note("fc", "computed in f32", "none needed", HERE, minor=True)


def test_a_note_is_said_once_and_points_to_the_users_line() -> None:
    with pytest.warns(QfxWarning) as said:
        told([MAJOR, MAJOR], strict=False)
    assert len(said) == 1 and (said[0].filename, said[0].lineno) == (__file__, 12)
    assert str(said[0].message) == f"fc: its weight is computed (at {HERE}); next step: bake the weight in"


def test_a_note_without_a_line_points_to_the_caller() -> None:
    for where in ("", "/venv/lib/site-packages/lib.py:3, in forward: y"):
        with pytest.warns(QfxWarning, match="fc: no") as said:
            told([Note("fc", "no", "nothing", where)], strict=False)
        assert len(said) == 1 and said[0].lineno != 3


def test_minor_notes_with_one_reason_are_one_warning() -> None:
    notes = [MINOR, Note("up", MINOR.reason, MINOR.next_step, minor=True), Note("up", "other", "none", minor=True)]
    with pytest.warns(QfxWarning) as said:
        told([*notes, MAJOR], strict=False)
    texts = [str(warning.message).partition(" (at")[0].partition(";")[0] for warning in said]
    assert texts == ["fc, up (2 nodes): computed in f32", "up: other", "fc: its weight is computed"]


def test_notes_that_differ_in_their_nodes_are_one_warning_and_one_line_of_an_error() -> None:
    notes = [Note(f"h.{i}.{name}", "no op", "leave it", HERE) for i in range(40) for name in ("up", "down")]
    said = "h.0-39.up, h.0-39.down (80 nodes): no op"
    elsewhere = Note("h.40.up", "no op", "leave it", HERE.replace("12", "13"))
    with pytest.warns(QfxWarning) as warned:
        told([*notes, elsewhere], strict=False)
    assert [str(w.message).partition(" (at")[0] for w in warned] == [said, "h.40.up: no op"], "each line by itself"
    with pytest.raises(UnsupportedError) as refused:
        told([*notes, MAJOR, MINOR], strict=True)
    assert [line.partition(" (at")[0] for line in str(refused.value).splitlines()[1:]] == [
        said,
        str(MAJOR).partition(" (at")[0],
    ]


def test_a_layer_that_is_called_twice_is_named_once() -> None:
    calls = ((0, HERE), (1, HERE), (1, HERE.replace("12", "13")))
    (note,) = alike(Note(f"h.{i}.up", "no op", "leave it", where, minor=True) for i, where in calls)
    assert note.node == "h.0-1.up (3 nodes)"


def test_strict_refuses_what_is_not_as_asked_and_nothing_else() -> None:
    with pytest.raises(UnsupportedError, match=r"not everything can be had as asked:\nfc: its weight is computed"):
        told([MINOR, MAJOR], strict=True)
    with pytest.warns(QfxWarning, match="computed in f32"):
        told([MINOR], strict=True)
    told([], strict=True)


def test_a_strict_error_names_all_nodes() -> None:
    notes = [Note(name, "no", "nothing") for name in ("embed", "up", "down", "h.0.fc", "h.1.fc", "head")]
    with pytest.raises(UnsupportedError, match=r"\nembed, up, down, h\.0-1\.fc, head \(6 nodes\): no"):
        told(notes, strict=True)
    with pytest.warns(QfxWarning, match=r"embed, up, down and 2 more \(6 nodes\): no"):
        told(notes, strict=False)
