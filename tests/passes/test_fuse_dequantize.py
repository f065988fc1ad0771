"""qfx.passes.fuse_dequantize: packed parameters that a module reads as weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qfx.ops.floats  # noqa: F401  (registers torch.ops.qfx.grouped_linear)
from qfx import graph, run
from qfx.format import Format
from qfx.live.parameters import pack_parameter
from qfx.packing import pack_weight
from qfx.passes.fuse_dequantize import fuse_dequantize
from tests.graphs import Function, after, capture, counts, same, text

BEFORE = """\
%inputs_0: i64[3] = input
%dequantize: f32[9,4] = qfx.dequantize(@table.weight_w_codes, @table.weight_w_scale, None, i8/ch, 4, f32)
%embedding: f32[3,4] = aten.embedding(%dequantize, %inputs_0)
%dequantize_1: f32[9,4] = qfx.dequantize(@table.weight_w_codes, @table.weight_w_scale, None, i8/ch, 4, f32)
%linear: f32[3,9] = aten.linear(%embedding, %dequantize_1)
return [%linear]
"""
AFTER = """\
%inputs_0: i64[3] = input
%embedding: f32[3,4] = qfx.embedding(%inputs_0, @table.weight_w_codes, @table.weight_w_scale, None, i8/ch, 4, f32)
%linear: f32[3,9] = qfx.linear(%embedding, @table.weight_w_codes, @table.weight_w_scale, None, None, None, None, None, \
, i8/ch)
return [%linear]
"""


class Holder(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))


def packed(function: Any, *shape: int, fmt: str = "i8/ch", transposed: bool = False) -> nn.Module:
    """A model whose `table.weight` is stored packed; with `transposed` the module sees it turned."""
    torch.manual_seed(0)
    model = Function(function, table=Holder(*shape))
    held = model.table
    assert isinstance(held, Holder)
    weight = held.weight.mT if transposed else held.weight
    pack_parameter(held, "weight", pack_weight(weight, Format.parse(fmt)), transposed=transposed)
    return model


def tied(own: Any, ids: Tensor) -> Tensor:
    return F.linear(F.embedding(ids, own.table.weight), own.table.weight)


def test_golden_text() -> None:
    model, ids = packed(tied, 9, 4), torch.tensor([0, 8, 3])
    gm = capture(model, ids)
    assert text(gm) == BEFORE
    run.run(gm, [fuse_dequantize])
    assert text(gm) == AFTER
    assert {graph.fqn_of(n) for n in gm.graph.nodes if n.op == "call_function"} == {"table"}


@pytest.mark.parametrize("fmt", ["i8/ch", "i4/g16", "u4/g16", "i8", "nf4/g16", "f4e2m1/g16/e4m3", "f16"])
def test_it_computes_the_same(fmt: str) -> None:
    model = packed(tied, 9, 32, fmt=fmt)
    gm, count = after(fuse_dequantize, model, torch.tensor([0, 8, 3]))
    assert count == 2 and counts(gm) == {"embedding": 1, "linear": 1}
    assert same(fuse_dequantize, model, torch.tensor([0, 8, 3])) == 2


def test_transposes_that_cancel_out() -> None:
    functions = {
        "linear": lambda own, x: F.linear(x, own.table.weight.t()),
        "twice": lambda own, x: F.linear(x, own.table.weight.t().t().transpose(-1, -2)),
        "matmul": lambda own, x: F.linear(x, own.table.weight.transpose(0, 1)),
    }
    for function in functions.values():
        assert same(fuse_dequantize, packed(function, 4, 6, transposed=True), torch.randn(3, 4)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: F.linear(x, own.table.weight.t()),
        lambda own, x: F.linear(x, own.table.weight + 1),
        lambda own, x: F.linear(x, own.table.weight.reshape(2, 8)[:, :4]),
        lambda own, x: F.linear(own.table.weight, x),
        lambda own, x: x @ own.table.weight,
        lambda own, x: x + own.table.weight,
    ],
)
def test_near_misses_stay(function: Any) -> None:
    gm, count = after(fuse_dequantize, packed(function, 4, 4), torch.randn(4, 4))
    assert count == 0 and counts(gm)["dequantize"] == 1


def test_other_readers_keep_the_weight() -> None:
    model = packed(lambda own, x: (F.linear(x, own.table.weight), own.table.weight.norm()), 5, 4)
    gm, count = after(fuse_dequantize, model, torch.randn(3, 4))
    assert count == 1 and counts(gm)["dequantize"] == 1
    assert same(fuse_dequantize, model, torch.randn(3, 4)) == 1


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fmt", ["i8/ch", "i4/g16"])
def test_experts(transposed: bool, fmt: str) -> None:
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)

    def forward(own: Any, x: Tensor) -> Tensor:
        w = own.table.weight.transpose(1, 2) if transposed else own.table.weight
        out: Tensor = torch.ops.qfx.grouped_linear(x, w, offs)
        return out

    shape = (3, 16, 6) if transposed else (3, 6, 16)
    model = packed(forward, *shape, fmt=fmt, transposed=transposed)
    assert same(fuse_dequantize, model, torch.randn(5, 16)) == 1


def test_a_weight_turned_on_other_axes_stays() -> None:
    offs = torch.tensor([2, 5, 6], dtype=torch.int32)

    def forward(own: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.qfx.grouped_linear(x, own.table.weight.transpose(0, 1), offs)
        return out

    gm, count = after(fuse_dequantize, packed(forward, 3, 3, 16), torch.randn(6, 16))
    assert count == 0 and counts(gm)["grouped_linear"] == 1
