"""One graph as one file: plans of an order, names of outputs, what the file tells."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.backends.onnx import lowering
from qfx.errors import QfxWarning, UnsupportedError
from qfx.exported import Order
from qfx.recipe import Recipe


def order(**fields: Any) -> Order:
    given = {"recipe": None, "plan": None, "data": None, "runtime": "onnxruntime", "prefill": False, "strict": False}
    return Order(**{**given, "external_bytes": None, "beside": (), **fields})


class Answers(nn.Module):
    """One result twice, a number, and another result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """x [.., 8]."""
        y = self.fc(x)
        return {"first": y, "again": y, "number": 3, "last": y + 1}


def test_an_order_without_anything_to_plan() -> None:
    model = nn.Linear(8, 8)
    assert order().planned(model) == order()
    by_recipe = order(recipe=Recipe.parse("w8a8"))
    assert by_recipe.planned(model) == by_recipe  # it needs no data: each graph is quantized as it comes


def test_a_recipe_that_needs_data_becomes_a_plan() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    found = order(recipe=Recipe.parse("w8a8-static"), data=[x]).planned(model)
    assert found.plan is not None and found.plan.tensors.keys() == qfx.plan(model, "w8a8-static", [x]).tensors.keys()


def test_a_plan_of_another_model_is_refused() -> None:
    other = qfx.plan(nn.Linear(4, 4), "w8a8-static", [torch.randn(2, 4)])
    with pytest.raises(ValueError, match="the plan was made for another model"):
        order(plan=other, strict=True).planned(nn.Linear(8, 8))
    with pytest.warns(QfxWarning, match="the plan was made for another model"):
        assert order(plan=other).planned(nn.Linear(8, 8)).plan is other


@pytest.mark.parametrize("runtime", ["onnxruntime", "standard"])
def test_each_result_has_its_name_and_place(tmp_path: Path, runtime: str) -> None:
    """One tensor under two names, too: who reads results by their place would take the next one for it."""
    model, x = Answers().eval(), torch.randn(2, 8)
    written = qfx.export_onnx(model, x, tmp_path / "m.onnx", recipe="w8a8", runtime=runtime)
    assert written.outputs == ("first", "again", "last") and not written.shared_cache
    session = ort.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    first, again, last = session.run(None, {"x": x.numpy()})
    assert (first == again).all() and (last == first + 1).all()


def test_results_that_are_weights(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.unread = nn.Linear(8, 4), nn.Parameter(torch.rand(300))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.fc(x), "table": self.fc.weight, "again": self.fc.weight.t(), "alone": self.unread}

    model, x = Own().eval(), torch.randn(2, 8)
    written = qfx.export_onnx(model, x, tmp_path / "m.onnx")
    assert written.outputs == ("y", "table", "again", "alone")
    results = ort.InferenceSession(str(written.path)).run(None, {"x": x.numpy()})
    for found, expected in zip(results, model(x).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), expected.detach())


def test_a_model_that_returns_no_tensor(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> int:
            return 3

    with pytest.raises(UnsupportedError, match="expected a model that returns tensors"):
        qfx.export_onnx(Nothing(), torch.randn(2, 8), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_holds(tmp_path: Path) -> None:
    written = qfx.export_onnx(Answers().eval(), torch.randn(2, 8), tmp_path / "m.onnx", recipe="w8a8")
    told = {entry.key: entry.value for entry in onnx.load(str(written.path)).metadata_props}
    assert json.loads(told["qfx.formats"]) == written.formats == {"fc": {"x": "i8/tok", "w": "i8/ch"}}
    assert json.loads(told["qfx.notes"]) == [str(note) for note in written.notes]
    assert told["qfx.runtime"] == "onnxruntime" and "qfx.cache" not in told


def test_a_float_copy_beside_codes_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that no quantized weight lies in a file as float32 sees one that does."""

    build = lowering.build

    def spoiled(gm: Any, **options: Any) -> Any:
        builder, built = build(gm, **options)
        weight = next(n for n in gm.graph.nodes if n.op == "get_attr")
        builder.nodes[0].input[0] = f"{weight.target}.f32"
        return builder, built

    monkeypatch.setattr(lowering, "build", spoiled)
    with pytest.raises(AssertionError, match="float copies of quantized weights"):
        qfx.export_onnx(nn.Linear(8, 8), torch.ones(2, 8), tmp_path / "m.onnx", recipe="w8a8")


class Spread(nn.Module):
    """A linear layer and a convolution that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.spread = nn.Linear(8, 8), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 8, 8]"""
        return torch.as_tensor(self.spread(self.fc(x)[:, None]))


def test_what_was_warned_of_when_the_plan_was_made_stands_in_the_file(tmp_path: Path) -> None:
    model, x = Spread().eval(), torch.randn(2, 8, 8)
    rule = {"rules": [{"target": "linear", "x": "u8", "w": "i8/ch"}, {"target": "conv", "x": "u8", "w": "i8/ch"}]}
    with pytest.warns(QfxWarning, match="a convolution whose windows overlap") as told:
        written = qfx.export_onnx(model, x, tmp_path / "m.onnx", recipe=rule, data=[x])
    (note,) = [note for note in written.notes if "a convolution whose windows overlap" in note.reason]
    assert note.node == "spread" and note.next_step
    assert len([w for w in told if "windows overlap" in str(w.message)]) == 1
    metadata = {entry.key: entry.value for entry in onnx.load(written.path).metadata_props}
    assert json.loads(metadata["qfx.notes"]) == [str(note) for note in written.notes]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(32, 16), nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.table(ids)))


@pytest.mark.parametrize(("asked", "left"), [("linear", "table"), ("embedding", "head")])
def test_a_tie_of_which_one_reader_is_asked_for_is_stored_twice_and_told(tmp_path: Path, asked: str, left: str) -> None:
    rule = {"rules": [{"target": asked, "w": "i8/ch", **({"x": "i8/tok"} if asked == "linear" else {})}]}
    with pytest.warns(QfxWarning, match=rf"{left}: its weight is tied to '\w+', which is packed, .* stored twice"):
        written = qfx.export_onnx(Tied().eval(), torch.arange(6).view(2, 3), tmp_path / "m.onnx", recipe=rule)
    assert list(written.formats) == [asked.replace("linear", "head").replace("embedding", "table")]


@pytest.mark.parametrize("recipe", [{"rules": [{"target": "tied", "w": "i8/ch"}]}, None])
def test_a_tie_with_one_format_or_none_is_stored_once(tmp_path: Path, recipe: Any) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        qfx.export_onnx(Tied().eval(), torch.arange(6).view(2, 3), tmp_path / "m.onnx", recipe=recipe)
    assert not any("stored twice" in str(warning.message) for warning in told)
