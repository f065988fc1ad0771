"""qfx.passes.annotate: a recipe's formats on the nodes that can take them, reasons for the others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from qfx import annotation, graph
from qfx.format import Format
from qfx.layouts import is_transposed, layout_of
from qfx.passes.annotate import annotate, kind_of, one_of_each_name
from qfx.passes.normalize import normalize
from qfx.pipeline import prepare
from qfx.recipe import Recipe, Rule
from qfx.text import dump
from tests.graphs import Function, capture

GOLDEN = """\
%inputs_0: i64[2,3] = input
%embedding: f32[2,3,4] = aten.embedding(@embed.weight, %inputs_0)  # w=i8/ch
%linear: f32[2,3,8] = aten.linear(%embedding, @up.weight, @up.bias)  # x=u8 w=i8/ch
%gelu: f32[2,3,8] = aten.gelu(%linear)
%linear_1: f32[2,3,4] = aten.linear(%gelu, @down.weight, @down.bias)  # w=i4/g128
return [%linear_1]
"""


def recipe(*rules: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe(name="test", rules=tuple(Rule(**rule) for rule in rules), **fields)


def mlp() -> nn.Module:
    layers = {"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}
    return Function(lambda own, ids: own.down(nn.functional.gelu(own.up(own.embed(ids)))), **layers)


def test_golden_text() -> None:
    gm = capture(mlp(), torch.ones(2, 3, dtype=torch.int64))
    asked = recipe(
        {"target": "linear", "x": "u8", "w": "i8/ch"},
        {"target": "down", "x": "none", "w": "i4/g128"},
        {"target": "embedding", "w": "i8/ch"},
    )
    assert annotate(gm, asked) == []
    assert dump(gm) == GOLDEN
    assert annotate(gm, asked) == [] and dump(gm) == GOLDEN
    assert annotate(gm, recipe({"target": "nothing", "w": "i8/ch"})) == []
    assert "#" not in dump(gm)


def test_groups_that_fit_the_columns() -> None:
    """Columns are those that are multiplied, however the weight is stored: experts and kernels of patches, too."""

    def forward(own: Any, x: torch.Tensor) -> Any:
        sums = own.wide(x), x @ own.turned, own.patch(x.reshape(1, 6, 8, 8)), own.named(x)
        return *sums, torch._grouped_mm(x.bfloat16(), own.experts, torch.tensor([2, 4], dtype=torch.int32))

    layers = {"wide": nn.Linear(96, 64), "named": nn.Linear(96, 8), "patch": nn.Conv2d(6, 8, 4, stride=4)}
    model = Function(forward, **layers)
    model.turned = nn.Parameter(torch.randn(96, 128))
    model.experts = nn.Parameter(torch.randn(2, 96, 64).bfloat16())
    gm = capture(model, torch.ones(4, 96))
    normalize(gm)
    fitting = [{"target": kind, "w": "u4/g128/f16", "fit_groups": True} for kind in ("linear", "experts")]
    assert annotate(gm, recipe(*fitting, {"target": "named", "w": "u4/g128/f16"})) == []
    asked = {graph.fqn_of(n): str(annotation.get(n)["w"]) for n in gm.graph.nodes if "w" in annotation.get(n)}
    assert asked == {
        **dict.fromkeys(("wide", "turned", "experts", "patch"), "u4/g32/f16"),
        "named": "u4/g128/f16",
    }


def test_of_one_weight_read_both_ways_round_the_one_that_lies_keeps_its_formats() -> None:
    def forward(own: Any, x: torch.Tensor) -> Any:
        return x @ own.up.weight, own.up(x), x @ own.down.weight.transpose(0, 1), x @ own.lone

    layers = {"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}
    model = Function(forward, **layers)
    model.lone = nn.Parameter(torch.randn(4, 4))  # transposed, but by all that read it
    gm = capture(model, torch.ones(2, 4))
    normalize(gm)
    assert annotate(gm, recipe({"target": "linear", "w": "i8/ch", "x": "i8/tok"})) == []
    (note,) = one_of_each_name(gm, {})
    assert note.node == "up.transposed" and "up.weight the other way round than it is stored" in note.reason
    lines = [line for line in dump(gm).splitlines() if "aten.linear" in line]
    assert [line.partition("  # ")[2] for line in lines] == ["", *["x=i8/tok w=i8/ch"] * 3]
    assert one_of_each_name(gm, {}) == []


def test_the_way_round_is_that_of_the_module_or_of_the_plan() -> None:
    def forward(own: Any, x: torch.Tensor) -> Any:
        return x @ own.up.weight + own.up(x)

    for layouts, stored in (({}, "linear"), ({"up": "transposed"}, "mm")):
        gm = capture(Function(forward, up=nn.Linear(4, 4)), torch.randn(2, 4))
        normalize(gm)
        for node in gm.graph.nodes:
            if graph.schema_name(node) == "aten::linear":
                annotation.set(node, "w", Format.parse("i8/ch"))
        (note,) = one_of_each_name(gm, layouts)
        assert note.node == "up.transposed" and not note.minor and "test_annotate.py" in note.where
        kept = [n for n in gm.graph.nodes if "w" in annotation.get(n)]
        assert len(kept) == 1 and graph.fqn_of(kept[0]) == "up"
        assert is_transposed(layout_of(kept[0])) == (stored == "mm")
    gm = capture(Function(lambda own, x: own.up(own.up(x)), up=nn.Linear(4, 4)), torch.randn(2, 4))
    normalize(gm)
    assert one_of_each_name(gm, {}) == [], "a shared layer is read one way"


def test_a_kernel_that_is_reshaped_and_read_the_other_way_round_stays_in_float() -> None:
    def forward(own: Any, x: torch.Tensor) -> Any:
        return own.conv(x.transpose(1, 2)).transpose(1, 2) @ own.conv.weight.reshape(8, 8)

    gm = capture(Function(forward, conv=nn.Conv1d(8, 8, 1, bias=False)), torch.randn(2, 3, 8))
    prepare(gm)
    annotate(gm, recipe({"target": "*", "w": "i8/ch"}))
    assert [layout_of(n) for n in gm.graph.nodes if "w" in annotation.get(n)] == ["patch", "unknown"]
    (note,) = one_of_each_name(gm, {"conv": "patch"})
    assert note.node == "conv.transposed" and "the other way round" in note.reason
    assert [graph.fqn_of(n) for n in gm.graph.nodes if "w" in annotation.get(n)] == ["conv"]


def test_of_two_ways_that_another_module_reads_the_first_is_kept() -> None:
    def forward(own: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, own.held.weight), own.held.weight.t())

    gm = capture(Function(forward, held=nn.Linear(4, 4)), torch.randn(2, 4))
    normalize(gm)
    annotate(gm, recipe({"target": "linear", "w": "i8/ch"}))
    assert len(one_of_each_name(gm, {})) == 1
    assert [layout_of(n) for n in gm.graph.nodes if "w" in annotation.get(n)] == ["linear-read"]


def test_a_name_stands_for_one_weight() -> None:
    class Both(nn.Linear):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__(4, 4)
            self.other = [other]  # not a module of its own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.other[0].weight) + super().forward(x)

    first = nn.Linear(4, 4)
    gm = capture(nn.Sequential(first, Both(first)), torch.ones(2, 4))
    assert annotate(gm, recipe({"target": "linear", "w": "i8/ch"})) == []
    (note,) = one_of_each_name(gm, {})
    assert note.node == "0.weight" and "it reads 0.weight, and another node of this name 1.weight" in note.reason
    assert dump(gm).count("# w=i8/ch") == 2 and "@1.weight, @1.bias)  # w=i8/ch" in dump(gm)
    assert one_of_each_name(gm, {}) == []


def test_ignored_nodes_stay() -> None:
    gm = capture(mlp(), torch.ones(2, 3, dtype=torch.int64))
    annotate(gm, recipe({"target": "linear", "w": "i8/ch"}, ignore=("up",)))
    assert dump(gm).count("# w=i8/ch") == 1


def test_tied_means_a_table_that_a_linear_reads() -> None:
    def forward(own: Any, ids: torch.Tensor) -> Any:
        x = own.embed(ids)
        return own.up(x), nn.functional.linear(x, own.embed.weight), own.other(ids)

    layers = {"embed": nn.Embedding(9, 4), "up": nn.Linear(4, 8), "other": nn.Embedding(9, 4)}
    gm = capture(Function(forward, **layers), torch.ones(2, 3, dtype=torch.int64))
    asked = recipe(
        {"target": "linear", "w": "i8/ch"}, {"target": "embedding", "w": "i8/ch"}, {"target": "tied", "w": "u4/g4"}
    )
    assert annotate(gm, asked) == []
    lines = [line for line in dump(gm).splitlines() if "#" in line]
    assert [line.rpartition("w=")[2] for line in lines if "embed.weight" in line] == ["u4/g4"] * 2
    assert [line.rpartition("w=")[2] for line in lines if "embed.weight" not in line] == ["i8/ch"] * 2


def test_kinds() -> None:
    def forward(own: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(*[own.conv(x).unsqueeze(1)] * 3)

    gm = capture(Function(forward, conv=nn.Conv1d(3, 3, 1)), torch.randn(2, 3, 5))
    kinds = [kind for node in gm.graph.nodes if (kind := kind_of(node)) is not None]
    assert kinds == ["conv", "attention"]
    asked = recipe({"target": "attention", "k": "i8/head", "p": "u8"}, {"target": "conv", "x": "i8/dyn", "w": "i8/ch"})
    assert annotate(gm, asked) == []
    assert "# x=i8/dyn w=i8/ch" in dump(gm) and "# k=i8/head p=u8" in dump(gm)


def test_a_computed_weight_gets_a_note() -> None:
    model = Function(lambda own, x: nn.functional.linear(x, own.w * 2), w=torch.randn(3, 4))
    gm = capture(model, torch.randn(2, 4))
    notes = annotate(gm, recipe({"target": "linear", "w": "i8/ch"}))
    assert len(notes) == 1 and "computed in the graph" in notes[0].reason and "ignore" in notes[0].next_step
    assert "return self.function(self, *inputs)" in notes[0].where
    assert "#" not in dump(gm)


@pytest.mark.parametrize(
    ("dtype", "state"), [(torch.complex64, "torch.complex64, which no format holds"), (torch.int8, "quantized already")]
)
def test_a_weight_that_is_no_float_says_what_it_is(dtype: torch.dtype, state: str) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 8).to(dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.get_buffer("weight"))

    notes = annotate(capture(Product(), torch.ones(2, 8).to(dtype)), recipe({"target": "linear", "w": "i8/ch"}))
    assert [state in str(note) for note in notes] == [True]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"x": "i8/tok", "w": "i8/tok"}, "not found at run time"),
        ({"w": "i8/head"}, "no axis of heads"),
        ({"x": "i8/head", "w": "i8/ch"}, "only attention"),
        ({"x": "i8/g32", "w": "i8/ch"}, "in groups"),
    ],
)
def test_formats_that_do_not_fit(rule: dict[str, str], reason: str) -> None:
    gm = capture(Function(lambda own, x: own.fc(x), fc=nn.Linear(64, 4)), torch.randn(2, 64))
    notes = annotate(gm, recipe({"target": "linear", **rule}))
    assert [note.node for note in notes] == ["fc"] and reason in notes[0].reason
    assert "#" not in dump(gm)


MIXED = """\
%inputs_0: i64[2,3] = input
%embedding: f32[2,3,4] = aten.embedding(@embed.weight, %inputs_0)
%linear: f32[2,3,8] = aten.linear(%embedding, @up.weight, @up.bias)  # w=[i8/ch,i4/g2,i4/g2,i4/g2]
%gelu: f32[2,3,8] = aten.gelu(%linear)
%linear_1: f32[2,3,4] = aten.linear(%gelu, @down.weight, @down.bias)  # x=i8/tok w=columns[i8/ch,i4/g2]
return [%linear_1]
"""


def test_several_formats() -> None:
    gm = capture(mlp(), torch.ones(2, 3, dtype=torch.int64))
    up = {"target": "up", "w": ["i8/ch", "i4/g2", "i4/g2", "i4/g2"]}
    down = {"target": "down", "x": "i8/tok", "w": ["i8/ch", "i4/g2"], "along": "columns"}
    assert annotate(gm, recipe(up, down)) == []
    assert dump(gm) == MIXED


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"target": "up", "w": ["i8/ch", "i4/ch", "i4/ch"]}, "8 output rows of 'up' cannot be cut into 3"),
        ({"target": "up", "w": ["i8/ch", "i4/ch"] * 8}, "8 output rows of 'up' cannot be cut into 16"),
        ({"target": "down", "w": ["i8/ch"] * 3, "along": "columns"}, "8 input columns of 'down' cannot be cut into 3"),
    ],
)
def test_parts_that_do_not_fit_are_refused(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annotate(capture(mlp(), torch.ones(2, 3, dtype=torch.int64)), recipe(rule))


def test_several_formats_where_one_is_taken_are_told() -> None:
    gm = capture(mlp(), torch.ones(2, 3, dtype=torch.int64))
    (note,) = annotate(gm, recipe({"target": "embed", "w": ["i8/ch", "i4/ch"]}))
    assert note.node == "embed" and note.where
    assert note.reason == "w=[i8/ch,i4/ch] was asked, but only the weight of a linear takes several formats"
    (note,) = annotate(gm, recipe({"target": "up", "w": ["i8/ch", "i4/tok"]}))
    assert note.reason == "w=[i8/ch,i4/tok] was asked, but a weight's scale is not found at run time"
    assert "#" not in dump(gm)


def others(own: Any, x: torch.Tensor) -> Any:
    image = x[:, :, None, None] * torch.ones(3, 4, 2, 2)
    y = nn.functional.bilinear(x, x, own.pair)
    return own.up(own.lstm(x)[0]), torch.baddbmm(x[None], x[None], own.square[None].exp()), own.spread(image), y


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ["bilinear", "lstm", "conv_transpose2d"]),
        ({"ignore": ("*lstm", "spread")}, ["bilinear"]),
        ({"only": "linear"}, ["bilinear", "lstm"]),
        ({"only": "embedding"}, []),
    ],
)
def test_products_without_a_packed_form_are_told(fields: dict[str, Any], told: list[str]) -> None:
    layers = {"up": nn.Linear(4, 8), "lstm": nn.LSTM(4, 4), "spread": nn.ConvTranspose2d(4, 2, 2)}
    tensors = {"pair": torch.randn(3, 4, 4), "square": torch.randn(4, 4)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes self.lstm")  # torch.export's, of weights in a list
        gm = capture(Function(others, **layers, **tensors), torch.randn(3, 4))
    kinds = [fields.pop("only")] if "only" in fields else ["linear", "conv"]
    notes = annotate(gm, recipe(*({"target": kind, "w": "i8/ch"} for kind in kinds), **fields))
    assert [note.reason.split(" ")[0] for note in notes] == told
    assert all("stays in float" in note.reason and note.next_step and note.where for note in notes)


def tables(own: Any, x: torch.Tensor) -> Any:
    """Matrices that are read whole, cut, added; beside some that have a packed form."""
    rows = torch.arange(3, device=x.device)
    y = own.up(nn.functional.layer_norm(own.whole.weight, [4])) + own.looked(rows)[:, :1].sum()
    return y, own.cut.weight[:2] + x[:2], own.tied(rows) @ own.tied.weight.t(), own.norm(x) + own.plain[:3]


TABLES: dict[str, Any] = {
    "whole": nn.Embedding(5, 4), "cut": nn.Embedding(5, 4), "looked": nn.Embedding(5, 4), "tied": nn.Embedding(5, 4),
    "norm": nn.LayerNorm(4), "up": nn.Linear(4, 8), "plain": torch.randn(5, 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {"whole": "layer_norm", "cut": "slice"}),
        ({"ignore": ("whole",)}, {"cut": "slice"}),
        ({"rules": ({"target": "attention", "q": "i8/tok"},)}, {}),
    ],
)
def test_tables_that_are_read_as_plain_tensors_are_told(fields: dict[str, Any], told: dict[str, str]) -> None:
    gm = capture(Function(tables, **TABLES), torch.randn(3, 4))
    normalize(gm)
    rules = fields.pop("rules", ({"target": "embedding", "w": "i8/ch"},))
    notes = annotate(gm, recipe(*rules, **fields))
    assert {note.node: note.reason.partition("(by ")[2].partition(")")[0] for note in notes} == told
    assert all(note.reason.endswith("stays in float") and not note.minor and note.where for note in notes)
