"""qfx.text: one node a line, equal graphs print equally."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfx import annotation, graph
from qfx.format import Format
from qfx.text import DTYPES, dump, type_text
from tests.graphs import Function, capture, node_of

GOLDEN = """\
%inputs_0: f32[s0,4] = input
%inputs_1: i64[s1] = input
%sym_size: int s0 = aten.sym_size.int(%inputs_0, 0)
%linear: f32[s0,3] = aten.linear(%inputs_0, @fc.weight, @fc.bias)
%index_select: f32[s1,3] = aten.index_select(%linear, 0, %inputs_1)
%cat: f32[s0+s1,3] = aten.cat([%linear, %index_select])
%slice_1: f32[s0+s1-1,3] = aten.slice.Tensor(%cat, 0, 1, end)
%_to_copy: f64[s0+s1-1,3] = aten._to_copy(%slice_1, dtype=f64)
%topk: (f64[s0+s1-1,1], i64[s0+s1-1,1]) = aten.topk(%_to_copy, 1)
%getitem: f64[s0+s1-1,1] = getitem(%topk, 0)
%mul: int 2*s0 = mul(2, %sym_size)
%full: f32[2*s0] = aten.full([%mul], 0.5, device=cpu, dtype=f32, pin_memory=False)
return [%getitem, %full]
"""


def _many(own: Any, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    y = own.fc(x)
    rows = torch.cat([y, y.index_select(0, ids)])[1:].double()
    return rows.topk(1)[0], torch.full((2 * x.shape[0],), 0.5, dtype=torch.float32, device="cpu")


def many() -> nn.Module:
    torch.manual_seed(0)
    return Function(_many, fc=nn.Linear(4, 3))


def inputs(rows: int = 5, ids: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.zeros(ids, dtype=torch.int64)


def test_golden_text() -> None:
    assert dump(capture(many(), *inputs(), dynamic=True)) == GOLDEN


@settings(deadline=None, max_examples=5)
@given(rows=st.integers(3, 9), ids=st.integers(2, 9))
def test_equal_graphs_print_equally(rows: int, ids: int) -> None:
    """Symbols have other names in each capture; the text does not tell."""
    assert dump(capture(many(), *inputs(rows, ids), dynamic=True)) == GOLDEN


def test_different_graphs_print_differently() -> None:
    texts = {
        dump(capture(Function(function, w=torch.ones(4, 4)), torch.randn(2, 4)))
        for function in (
            lambda own, x: x @ own.w,
            lambda own, x: x @ own.w.t(),
            lambda own, x: x - own.w[0],
            lambda own, x: own.w[0] - x,
            lambda own, x: (x.softmax(-1), x),
            lambda own, x: (x, x.softmax(-1)),
            lambda own, x: x.softmax(0),
            lambda own, x: x.softmax(-1, dtype=torch.float64),
        )
    }
    assert len(texts) == 8


def test_annotations_stand_behind_the_nodes() -> None:
    gm = capture(Function(lambda own, x: torch.relu(own.fc(x)), fc=nn.Linear(4, 3)), torch.randn(2, 4))
    node = node_of(gm, "linear")
    annotation.set(node, "w", Format.parse("i4/g128"))
    annotation.set(node, "x", (Format.parse("i8/tok"), Format.parse("i4")))
    assert annotation.text(node) == "x=[i8/tok,i4] w=i4/g128"
    lines = dump(gm).splitlines()
    assert lines[1].endswith("(%inputs_0, @fc.weight, @fc.bias)  # x=[i8/tok,i4] w=i4/g128")
    assert [line.count("#") for line in lines] == [0, 1, 0, 0]


def test_text_does_not_depend_on_former_names() -> None:
    gm = capture(many(), *inputs(), dynamic=True)
    for i, node in enumerate(gm.graph.nodes):
        node.name = f"n{99 - i}"
    graph.rename(gm)
    assert dump(gm) == GOLDEN


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "f32[2,3]"),
        (torch.zeros(()), "f32[]"),
        (torch.zeros(2, dtype=torch.bool), "b1[2]"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64[2]"),
        (7, "int 7"),
        (True, "bool"),
        (None, "NoneType"),
        (1.5, "float"),
        ([torch.zeros(1), 3], "(f32[1], int 3)"),
    ],
)
def test_types(value: object, text: str) -> None:
    assert type_text(value) == text


def test_names_of_dtypes_are_short_and_different() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
    assert all(re.fullmatch(r"[a-z]+\d+(e\dm\d)?", name) for name in DTYPES.values())
