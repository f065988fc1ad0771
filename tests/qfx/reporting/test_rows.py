"""qfx.reporting.rows: what every node asked for, its bytes and its work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qfx.ops.floats  # noqa: F401  (registers torch.ops.qfx.grouped_linear)
from qfx import annotation, graph, run
from qfx.errors import Note
from qfx.format import Format
from qfx.passes.quantize import quantize
from qfx.reporting.rows import KINDS, Row, graph_rows
from tests.graphs import Function, capture

IDS = torch.tensor([[0, 8, 3], [1, 1, 7]])


class Tied(nn.Module):
    """An embedding, a linear, and an lm_head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.lm_head = nn.Embedding(9, 32), nn.Linear(32, 32), nn.Linear(32, 9, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.lm_head(self.fc(self.embed(ids)))
        return out


def rows(gm: fx.GraphModule, *notes: Note) -> list[Row]:
    return graph_rows(gm, {n.name: f"kernel of {n.name}" for n in gm.graph.nodes}, notes)


def quantized(gm: fx.GraphModule, **formats: str) -> fx.GraphModule:
    """Formats by FQN: "x=i8/tok w=i8/ch"."""
    for node in gm.graph.nodes:
        for word in formats.get(graph.fqn_of(node), "").split() if node.op == "call_function" else ():
            role, _, fmt = word.partition("=")
            annotation.set(node, role, Format.parse(fmt))
    run.run(gm, [lambda g: quantize(g, tensors={})])
    return gm


def one(function: Any, *inputs: Tensor, **tensors: Any) -> Row:
    (row,) = rows(capture(Function(function, **tensors), *inputs))
    return row


def test_a_float_graph() -> None:
    assert rows(capture(Tied(), IDS)) == [
        Row("embed", "embedding", "", "kernel of embedding", "", 288, 1152, 1152, 0),
        Row("fc", "linear", "", "kernel of linear", "", 1024, 4096, 4096, 6 * 1024),
        Row("lm_head", "linear", "", "kernel of linear_1", "", 288, 1152, 1152, 6 * 288, shared=True),
    ]


def test_a_quantized_graph() -> None:
    gm = quantized(capture(Tied(), IDS), embed="w=i8/ch", fc="x=i8/tok w=i4/g16", lm_head="x=i8/tok w=i8/ch")
    table, fc = 9 * 32 + 9 * 4, 32 * 16 + 32 * 2 * 4
    assert rows(gm) == [
        Row("embed", "embedding", "w=i8/ch", "kernel of embedding", "", 288, 1152, table, 0),
        Row("fc", "linear", "x=i8/tok w=i4/g16", "kernel of linear", "", 1024, 4096, fc, 6 * 1024),
        Row("lm_head", "linear", "x=i8/tok w=i8/ch", "kernel of linear_1", "", 288, 1152, table, 6 * 288, shared=True),
    ]
    assert all(row.quantized for row in rows(gm))
    for node in gm.graph.nodes:  # of a model that was quantized before, the ops alone say what was asked
        annotation.clear(node)
    assert [row.asked for row in rows(gm)] == ["w=i8/ch", "x=i8/tok w=i4/g16", "x=i8/tok w=i8/ch"]


def test_bytes_before_are_those_of_the_activations_type() -> None:
    gm = quantized(capture(Tied().to(torch.bfloat16), IDS), fc="w=i8/ch")
    assert [(row.bytes_before, row.bytes_after) for row in rows(gm)] == [(576, 576), (2048, 1024 + 128), (576, 576)]


def test_reasons() -> None:
    gm = quantized(capture(Tied(), IDS), fc="w=i8/ch", embed="w=i8/ch")
    embed, fc, head = rows(gm, Note("fc", "runs in torch", "nothing"), Note("other", "is elsewhere", "nothing"))
    assert (embed.reason, fc.reason, head.reason) == ("", "runs in torch", "")
    assert (embed.quantized, fc.quantized, head.quantized) == (True, True, False)  # fc is packed, wherever it runs
    minor, major = Note("fc", "takes longer", "nothing", minor=True), Note("fc", "runs in torch", "nothing")
    found = {row.node: row for row in rows(gm, minor)}["fc"]
    assert found.reason == "takes longer" and found.quantized
    found = {row.node: row for row in rows(gm, minor, major)}["fc"]
    assert found.reason == "runs in torch" and found.quantized


WORK: dict[str, tuple[Any, tuple[int, ...], int]] = {  # of x [2, 4, 12] with a weight
    "linear": (lambda own, x: F.linear(x, own.w), (5, 12), 8 * 5 * 12),
    "linear transposed": (lambda own, x: F.linear(x, own.w.t()), (12, 5), 8 * 5 * 12),
    "conv1d": (lambda own, x: F.conv1d(x, own.w, stride=2, padding=1), (6, 4, 3), 2 * 6 * 6 * 4 * 3),
    "conv1d in groups": (lambda own, x: F.conv1d(x, own.w, groups=2), (6, 2, 3), 2 * 10 * 6 * 2 * 3),
    "conv2d": (lambda own, x: F.conv2d(x[None], own.w), (3, 2, 2, 2), 3 * 11 * 3 * 2 * 2 * 2),
    "conv_transpose1d": (lambda own, x: F.conv_transpose1d(x, own.w, stride=3), (4, 6, 5), 2 * 12 * 4 * 6 * 5),
    "matmul": (lambda own, x: x @ own.w, (12, 5), 8 * 12 * 5),
    "matmul from the left": (lambda own, x: own.w @ x, (5, 4), 2 * 5 * 4 * 12),
    "matmul transposed": (lambda own, x: x @ own.w.t(), (5, 12), 8 * 12 * 5),
    "mm": (lambda own, x: torch.mm(x[0], own.w), (12, 5), 4 * 12 * 5),
    "mv": (lambda own, x: torch.mv(x[0], own.w), (12,), 4 * 12),
    "bmm": (lambda own, x: torch.bmm(x, own.w), (2, 12, 5), 8 * 12 * 5),
    "addmm": (lambda own, x: torch.addmm(x[0, :, :5], x[1], own.w), (12, 5), 4 * 12 * 5),
    "baddbmm": (lambda own, x: torch.baddbmm(x[:, :, :5], x, own.w), (2, 12, 5), 8 * 12 * 5),
}


@pytest.mark.parametrize("name", WORK)
def test_work(name: str) -> None:
    function, shape, macs = WORK[name]
    row = one(function, torch.randn(2, 4, 12), w=torch.randn(shape))
    assert row.macs == macs
    assert row.elements == torch.Size(shape).numel() and row.bytes_before == row.bytes_after == 4 * row.elements


def test_work_of_an_einsum_is_not_known() -> None:
    row = one(lambda own, x: torch.einsum("bsk,kn->bsn", x, own.w), torch.randn(2, 4, 12), w=torch.randn(12, 5))
    assert (row.op, row.macs, row.elements) == ("matmul", 0, 60)


@pytest.mark.parametrize("fmt", ["", "i8/ch"])
def test_each_row_meets_one_expert(fmt: str) -> None:
    offs = torch.tensor([2, 3, 6], dtype=torch.int32)
    model = Function(lambda own, x: torch.ops.qfx.grouped_linear(x, own.w, offs), w=torch.randn(3, 5, 4))
    gm = capture(model, torch.randn(6, 4))
    (row,) = rows(quantized(gm, w=f"w={fmt}") if fmt else gm)
    assert (row.op, row.elements, row.macs) == ("experts", 60, 6 * 5 * 4)
    assert row.bytes_after == (60 + 15 * 4 if fmt else 240)


def test_work_at_the_traced_sizes() -> None:
    model = Function(lambda own, x: F.linear(x, own.w), w=torch.randn(5, 12))
    (row,) = rows(capture(model, torch.randn(3, 7, 12), dynamic=True))
    assert row.macs == 3 * 7 * 5 * 12


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: x @ x.mT,
        lambda own, x: torch.addmm(own.w, x[0], x[1].t()),
        lambda own, x: x + own.w.sum(),
        lambda own, x: torch.einsum("bik,bjk->bij", x, x),
    ],
)
def test_products_of_activations_have_no_row(function: Any) -> None:
    assert rows(capture(Function(function, w=torch.randn(4, 4)), torch.randn(2, 4, 12))) == []


def test_attention_and_computed_weights() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        out: Tensor = F.linear(F.scaled_dot_product_attention(x, x, x), own.w * 2)
        return out

    attention, linear = rows(capture(Function(forward, w=torch.randn(5, 12)), torch.randn(2, 4, 12)))
    assert (attention.node, attention.op) == ("scaled_dot_product_attention", "attention")
    assert (attention.elements, attention.macs, attention.bytes_after) == (0, 0, 0)
    assert (linear.op, linear.elements, linear.bytes_before, linear.macs) == ("linear", 0, 0, 8 * 5 * 12)


def test_packed_parameters_that_stay() -> None:
    def forward(own: Any, x: Tensor) -> Tensor:
        w = torch.ops.qfx.dequantize(own.held.w_codes, own.held.w_scale, None, "i8/ch", 12, torch.float32)
        out: Tensor = x @ w.mT.exp()
        return out

    held = nn.Module()
    held.register_buffer("w_codes", torch.zeros(5, 12, dtype=torch.int8))
    held.register_buffer("w_scale", torch.ones(5, 1))
    (row,) = rows(capture(Function(forward, held=held), torch.randn(4, 12)))
    assert (row.node, row.op, row.asked) == ("held", "dequantize", "w=i8/ch")
    assert (row.elements, row.bytes_before, row.bytes_after) == (60, 240, 80)


def test_every_kind_is_an_operator() -> None:
    for name in KINDS:
        namespace, op = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), op)
