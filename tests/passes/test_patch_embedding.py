"""qfx.passes.patch_embedding: convolutions over patches become linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qfx.passes.patch_embedding import patch_embedding
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[s0,3,4,8] = input
%sym_size: int s0 = aten.sym_size.int(%inputs_0, 0)
%reshape: f32[s0,3,2,2,2,4] = aten.reshape(%inputs_0, [%sym_size, 3, 2, 2, 2, 4])
%permute: f32[s0,2,2,3,2,4] = aten.permute(%reshape, [0, 2, 4, 1, 3, 5])
%reshape_1: f32[s0,4,24] = aten.reshape(%permute, [%sym_size, 4, 24])
%reshape_2: f32[5,24] = aten.reshape(@w, [5, 24])
%linear: f32[s0,4,5] = aten.linear(%reshape_1, %reshape_2, @b)
return [%linear]
"""


def _patches(own: Any, x: torch.Tensor) -> torch.Tensor:
    assert x.shape[2:] == (4, 8)
    return F.conv2d(x, own.w, own.b, stride=(2, 4)).flatten(2).transpose(1, 2)


def test_golden_text() -> None:
    model = Function(_patches, w=torch.randn(5, 3, 2, 4), b=torch.randn(5))
    gm, count = after(patch_embedding, model, torch.randn(2, 3, 4, 8), dynamic=True)
    assert count == 1
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("kernel", "image"),
    [((4,), (12,)), ((2, 4), (4, 8)), ((2, 4), (5, 11)), ((2, 2, 3), (4, 2, 6))],
    ids=["1d", "2d", "2d with a rest", "3d"],
)
def test_same_function(kernel: tuple[int, ...], image: tuple[int, ...], dynamic: bool) -> None:
    torch.manual_seed(0)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    model = Function(
        lambda own, x: convolution(x, own.w, own.b, stride=kernel), w=torch.randn(5, 3, *kernel), b=torch.randn(5)
    )
    assert same(patch_embedding, model, torch.randn(2, 3, *image), dynamic=dynamic) == 1


@pytest.mark.parametrize(("padding", "matches"), [("valid", 1), ("same", 0)])
def test_padding_by_name(padding: str, matches: int) -> None:
    model = Function(lambda own, x: F.conv2d(x, own.w, stride=1, padding=padding), w=torch.randn(5, 3, 1, 1))
    assert same(patch_embedding, model, torch.randn(2, 3, 4, 4)) == matches


def test_without_bias_and_in_half_precision() -> None:
    model = Function(lambda own, x: F.conv2d(x, own.w, stride=4), w=torch.randn(5, 3, 4, 4, dtype=torch.bfloat16))
    assert same(patch_embedding, model, torch.randn(2, 3, 8, 8, dtype=torch.bfloat16), limit=2e-2) == 1


@pytest.mark.parametrize(
    "options",
    [{"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "dilation": 2}, {"stride": 2, "groups": 3}],
    ids=str,
)
def test_near_misses_stay(options: dict[str, Any]) -> None:
    width = 1 if "groups" in options else 3
    model = Function(lambda own, x: F.conv2d(x, own.w, **options), w=torch.randn(6, width, 2, 2))
    gm, count = after(patch_embedding, model, torch.randn(2, 3, 8, 8))
    assert count == 0
    assert counts(gm) == {"conv2d": 1}


def test_a_transposed_convolution_stays() -> None:
    model = Function(lambda own, x: F.conv_transpose2d(x, own.w, stride=2), w=torch.randn(3, 6, 2, 2))
    _, count = after(patch_embedding, model, torch.randn(2, 3, 8, 8))
    assert count == 0
