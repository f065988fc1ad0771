"""qfx.live.walk: models whose graph cannot be had are quantized by the types of their modules, and that is told."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import qfx
from qfx import QfxWarning, Recipe, Rule, UnsupportedError
from qfx.live.modules import QuantConv, QuantEmbedding, QuantLinear
from qfx.live.walk import walk
from qfx.measuring.measure import sqnr_db


class Model(nn.Module):
    """One of each, and two parameters that no module type tells about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.fc, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight
        self.patch, self.wide = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.one, self.other = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] -> [batch, length, 9]; the way depends on the values."""
        x = self.fc(self.table(ids))
        x = self.attention(x, x, x)[0] if bool(x.sum() > 0) else F.linear(x, self.one)
        found: Tensor = self.head(x)
        return found


IDS = torch.arange(6).reshape(2, 3)


@torch.no_grad()
def test_what_can_be_seen_is_quantized_and_the_rest_is_told() -> None:
    model = Model().eval()
    wanted = model(IDS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: Any = qfx.quantize(model, "w8a8", [IDS])
    told = [str(w.message) for w in caught if "graph cannot be had" in str(w.message)]
    assert len(told) == 1 and all(issubclass(w.category, QfxWarning) for w in caught)
    assert "torch.export" in told[0] and "not seen: one, other, wide.weight and 1 more" in told[0]
    assert isinstance(found.table, QuantEmbedding) and isinstance(found.fc, QuantLinear)
    assert found.fc.x_format == "i8/tok" and isinstance(found.patch, QuantConv) and type(found.wide) is nn.Conv2d
    assert found.head.w_codes.data_ptr() == found.table.w_codes.data_ptr()
    assert found.attention.out_proj.x_format == "", "attention reads it itself"
    assert sqnr_db(wanted, found(IDS)) > 25


def test_names_and_kinds_are_those_of_the_recipe() -> None:
    recipe = Recipe(
        name="some",
        rules=(Rule(target="linear", w="i8/ch"), Rule(target="fc", w="i4/g8"), Rule(target="embedding", w="none")),
        ignore=("patch",),
    )
    plan, notes = walk(Model(), recipe, "no reason", "none")
    assert plan.annotations["fc"] == {"w": "i4/g8"} and "patch" not in plan.annotations
    assert plan.layouts["head"] == "linear" and "table" not in plan.annotations
    assert plan.layouts["attention.out_proj"] == "linear-read"
    assert plan.fingerprint and len(notes) == 1 and notes[0].node == "Model"


def test_a_tied_table_has_one_format() -> None:
    rules = (Rule(target="linear", w="i8/ch"), Rule(target="embedding", w="i8/ch"), Rule(target="tied", w="u4/g16"))
    plan, _ = walk(Model(), Recipe(name="tied", rules=rules), "no reason", "none")
    assert plan.annotations["table"] == plan.annotations["head"] == {"w": "u4/g16"}
    assert plan.annotations["fc"] == plan.annotations["patch"] == {"w": "i8/ch"}


def test_groups_that_fit_are_those_of_the_graph() -> None:
    torch.manual_seed(0)
    layers = [Conv1D(64, 96), nn.GELU(), nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 128), nn.Linear(128, 8)]
    model = nn.Sequential(*layers).eval()
    recipe = Recipe(name="fit", rules=(Rule(target="linear", w="u4/g128/f16", fit_groups=True),))
    plan, _ = walk(model, recipe, "no reason", "none")
    assert {name: roles["w"] for name, roles in plan.annotations.items()} == {
        "0": "u4/g32/f16", "2": "u4/g64/f16", "4": "u4/g64/f16", "5": "u4/g128/f16",
    }  # fmt: skip
    assert plan.annotations == qfx.plan(model, recipe, [torch.randn(2, 96)]).annotations
    patch, _ = walk(nn.Sequential(nn.Conv2d(6, 8, 4, stride=4)), recipe, "no reason", "none")
    assert patch.annotations["0"] == {"w": "u4/g32/f16"}, "96 columns"


def test_targets_of_nothing_are_told_here_too() -> None:
    recipe = Recipe(name="typo", rules=(Rule(target="linear", w="i8/ch"), Rule(target="fcc", w="i4/g8")))
    typo = pytest.warns(QfxWarning, match="'fcc': this target of the recipe matches no node")
    with typo, pytest.warns(QfxWarning, match="graph cannot be had"):
        qfx.plan(Model(), recipe)


def test_without_inputs_the_types_serve() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(3, 8)
    wanted = model(x)
    with pytest.warns(QfxWarning, match=r"no example of its inputs is known(.|\n)*pass data=\[batch\]"):
        found = qfx.quantize(model)
    assert sqnr_db(wanted, found(x)) > 25
    with pytest.warns(QfxWarning, match="graph cannot be had"):
        assert isinstance(qfx.quantize(nn.Linear(4, 2).eval()), QuantLinear)


class Video(nn.Module):
    """Takes frames [B, T, 3, H, W], which its configuration does not tell; `branches`: images, by data."""

    main_input_name = "pixel_values"

    def __init__(self, *, branches: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_size=4)
        self.branches = branches
        self.fc = nn.Linear(48, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not self.branches:
            _, _, _, height, width = pixel_values.shape
            assert height == width
        elif (pixel_values + torch.rand(())).sum() > 1e9:
            return pixel_values
        found: Tensor = self.fc(pixel_values.flatten(-3))
        return found


def test_an_example_that_does_not_fit_is_told_as_such() -> None:
    """The guess is wrong, not the model: data= is the next step, and then the graph is there."""
    unfit = (
        r"the example that qfx makes of its inputs does not fit it: ValueError: not enough values(.|\n)*data=\[batch"
    )
    with pytest.warns(QfxWarning, match=unfit):
        found: Any = qfx.quantize(Video().eval(), "w8a8")
    assert isinstance(found.fc, QuantLinear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = qfx.quantize(Video().eval(), "w8a8", [torch.randn(2, 5, 3, 4, 4)])
    assert isinstance(found.fc, QuantLinear)


def test_a_model_that_takes_the_example_is_told_what_tracing_says() -> None:
    model, before = Video(branches=True).eval(), torch.get_rng_state()
    with pytest.warns(QfxWarning, match=r"cannot be had \(torch.export: (.|\n)*torch.compile") as told:
        qfx.quantize(model, "w8a8")
    assert torch.equal(torch.get_rng_state(), before), "looking is no call that the user sees"
    assert not any("does not fit" in str(w.message) for w in told)


@pytest.mark.parametrize(("recipe", "fields"), [("w8a8-static", {}), ("w8a8", {"rewrites": ("norm-fold",)})])
def test_recipes_that_need_the_graph_are_refused(recipe: str, fields: dict[str, Any]) -> None:
    asked = Recipe.parse(recipe).override(**fields)
    with pytest.raises(UnsupportedError, match=r"needs the graph of the model(.|\n)*the reason(.|\n)*next step: do it"):
        walk(Model(), asked, "the reason", "do it")


def test_strict_refuses_the_walk() -> None:
    with pytest.raises(UnsupportedError, match="graph cannot be had"):
        qfx.quantize(Model(), "w8a8", [IDS], strict=True)
