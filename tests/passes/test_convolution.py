"""qfx.passes.convolution: overlapping one-dimensional convolutions as linears over windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qfx import graph
from qfx.passes.convolution import LONGEST, convolution
from tests.graphs import Function, after, counts, error, same, text

GOLDEN = """\
%inputs_0: f32[s0,4,s1] = input
%constant_pad_nd: f32[s0,4,s1+2] = aten.constant_pad_nd(%inputs_0, [1, 1])
%slice_1: f32[s0,4,((s1+1)//2)] = aten.slice.Tensor(%constant_pad_nd, 2, 0, -2, 2)
%slice_2: f32[s0,4,((s1+1)//2)] = aten.slice.Tensor(%constant_pad_nd, 2, 1, -1, 2)
%slice_3: f32[s0,4,((s1+1)//2)] = aten.slice.Tensor(%constant_pad_nd, 2, 2, end, 2)
%stack: f32[s0,4,((s1+1)//2),3] = aten.stack([%slice_1, %slice_2, %slice_3], -1)
%transpose: f32[s0,((s1+1)//2),4,3] = aten.transpose.int(%stack, 1, 2)
%sym_size: int s0 = aten.sym_size.int(%transpose, 0)
%sym_size_1: int ((s1+1)//2) = aten.sym_size.int(%transpose, 1)
%reshape: f32[s0,((s1+1)//2),12] = aten.reshape(%transpose, [%sym_size, %sym_size_1, 12])
%reshape_1: f32[8,12] = aten.reshape(@conv.weight, [8, 12])
%linear: f32[s0,((s1+1)//2),8] = aten.linear(%reshape, %reshape_1, @conv.bias)
%transpose_1: f32[s0,8,((s1+1)//2)] = aten.transpose.int(%linear, 1, 2)
return [%transpose_1]
"""
FIXED = """\
%inputs_0: f32[2,4,7] = input
%slice_1: f32[2,4,6] = aten.slice.Tensor(%inputs_0, 2, 0, -1)
%slice_2: f32[2,4,6] = aten.slice.Tensor(%inputs_0, 2, 1, end)
%stack: f32[2,4,6,2] = aten.stack([%slice_1, %slice_2], -1)
%transpose: f32[2,6,4,2] = aten.transpose.int(%stack, 1, 2)
%reshape: f32[2,6,8] = aten.reshape(%transpose, [2, 6, 8])
%reshape_1: f32[5,8] = aten.reshape(@conv.weight, [5, 8])
%linear: f32[2,6,5] = aten.linear(%reshape, %reshape_1)
%transpose_1: f32[2,5,6] = aten.transpose.int(%linear, 1, 2)
return [%transpose_1]
"""


def model(*args: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return Function(lambda own, x: own.conv(x), conv=nn.Conv1d(*args, **kwargs))


def test_golden_text() -> None:
    gm, count = after(convolution, model(4, 8, 3, stride=2, padding=1), torch.randn(3, 4, 12), dynamic=True)
    assert count == 1 and text(gm) == GOLDEN
    gm, count = after(convolution, model(4, 5, 2, bias=False), torch.randn(2, 4, 7))
    assert count == 1 and text(gm) == FIXED
    (linear,) = [n for n in gm.graph.nodes if graph.op_name(n) == "linear"]
    assert graph.fqn_of(linear) == "conv" and linear.meta["stack_trace"]


@torch.no_grad()
def test_sizes_stay_dynamic() -> None:
    conv = model(4, 8, 3, stride=2, padding=1)
    gm, _ = after(convolution, conv, torch.randn(3, 4, 12), dynamic=True)
    for shape in ((1, 4, 1), (2, 4, 9), (5, 4, 30)):
        x = torch.randn(shape)
        assert error(conv(x), gm(x)[0]) < 1e-5


@settings(deadline=None, max_examples=12)
@given(
    channels=st.integers(1, 4),
    out=st.integers(1, 5),
    taps=st.integers(2, LONGEST),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    extra=st.integers(0, 9),
    bias=st.booleans(),
)
def test_same_function(channels: int, out: int, taps: int, stride: int, padding: int, extra: int, bias: bool) -> None:
    conv = model(channels, out, taps, stride=stride, padding=min(padding, taps - 1), bias=bias)
    assert same(convolution, conv, torch.randn(2, channels, taps + extra)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_stay(dtype: torch.dtype) -> None:
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-12
    assert same(convolution, model(4, 8, 3).to(dtype), torch.randn(2, 4, 9, dtype=dtype), limit=limit) == 1


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda own, x: F.conv1d(x, own.w, groups=2), (4, 2, 3)),
        (lambda own, x: F.conv1d(x, own.w, dilation=2), (4, 4, 3)),
        (lambda own, x: F.conv1d(x, own.w, padding="same"), (4, 4, 3)),
        (lambda own, x: F.conv1d(x, own.w * 2), (4, 4, 3)),
        (lambda own, x: F.conv1d(x, own.w), (4, 4, 1)),
        (lambda own, x: F.conv1d(x, own.w), (4, 4, LONGEST + 1)),
        (lambda own, x: F.conv1d(x[0], own.w), (4, 4, 3)),
        (lambda own, x: F.conv_transpose1d(x, own.w), (4, 4, 3)),
        (lambda own, x: F.conv2d(x[None], own.w), (4, 2, 2, 3)),
    ],
)
def test_near_misses_stay(function: Any, shape: tuple[int, ...]) -> None:
    gm, count = after(convolution, Function(function, w=torch.randn(shape)), torch.randn(2, 4, 20))
    assert count == 0 and "linear" not in counts(gm)


def test_several_at_once() -> None:
    def forward(own: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(F.gelu(F.conv1d(x, own.a, own.b, padding=1)), own.a, stride=2)

    twice = Function(forward, a=torch.randn(4, 4, 3), b=torch.randn(4))
    assert same(convolution, twice, torch.randn(2, 4, 9)) == 2
