"""qfx.passes.einsum: einsums of two tensors become matmul or aten.linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.passes.einsum import einsum
from qfx.passes.normalize import normalize
from tests.graphs import Function, after, capture, counts, same, text

GOLDEN = """\
%inputs_0: f32[2,7,64] = input
%permute: f32[4,16,64] = aten.permute(@w, [1, 2, 0])
%reshape: f32[64,64] = aten.reshape(%permute, [64, 64])
%linear: f32[2,7,64] = aten.linear(%inputs_0, %reshape)
%reshape_1: f32[2,7,4,16] = aten.reshape(%linear, [2, 7, 4, 16])
return [%reshape_1]
"""
SIZES = {"a": 2, "b": 2, "s": 5, "t": 6, "d": 4, "h": 3, "k": 7, "n": 8}


def sized(letters: str) -> tuple[int, ...]:
    return tuple(SIZES[c] for c in letters.replace("...", "a"))


def test_golden_text() -> None:
    model = Function(lambda own, x: torch.einsum("bsd,dhk->bshk", x, own.w), w=torch.randn(64, 4, 16))
    gm, count = after(einsum, model, torch.randn(2, 7, 64))
    assert count == 1
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "equation",
    [
        "bd,nd->bn",
        "bsd,dn->bsn",
        "bsd,dhk->bshk",
        "bsd,hdk->bhsk",
        "bhsk,hkd->bsd",
        "bsd,d->bs",
        "...d,nd->...n",
        "nd,bd->bn",
    ],
)
def test_a_parameter_makes_it_linear(equation: str, dynamic: bool) -> None:
    left, right = equation.split("->", maxsplit=1)[0].split(",")
    turned = left == "nd"
    if turned:
        left, right = right, left

    def function(own: Any, x: Tensor) -> Tensor:
        return torch.einsum(equation, own.w, x) if turned else torch.einsum(equation, x, own.w)

    model = Function(function, w=torch.randn(sized(right)))
    gm, _ = after(einsum, model, torch.randn(sized(left)))
    assert counts(gm)["linear"] == 1
    assert same(einsum, model, torch.randn(sized(left)), dynamic=dynamic) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "equation",
    [
        "bhsd,bhtd->bhst",
        "bhst,bhtd->bhsd",
        "bshd,bthd->bhst",
        "sd,td->st",
        "bsd,bd->bs",
        "bhsd,bhtd->bst",
        "...sd,...td->...st",
    ],
)
def test_activations_make_it_matmul(equation: str, dynamic: bool) -> None:
    left, right = equation.split("->", maxsplit=1)[0].split(",")
    model = Function(lambda own, x, y: torch.einsum(equation, x, y))
    x = (torch.randn(sized(left)), torch.randn(sized(right)))
    gm, _ = after(einsum, model, *x)
    assert counts(gm)["matmul"] == 1
    assert same(einsum, model, *x, dynamic=dynamic) == 1


@pytest.mark.parametrize("equation", ["bs,bs->bs", "bs,td->bstd", "bs,bd->d", "bb,bd->bd", "bsd,bsd->b"])
def test_other_einsums_stay_or_keep_their_value(equation: str) -> None:
    left, right = equation.split("->", maxsplit=1)[0].split(",")
    model = Function(lambda own, x, y: torch.einsum(equation, x, y))
    x = (torch.randn(sized(left)), torch.randn(sized(right)))
    assert same(einsum, model, *x) == (1 if equation == "bsd,bsd->b" else 0)


def test_sizes_that_broadcast_stay() -> None:
    model = Function(lambda own, x, y: torch.einsum("bsd,btd->bst", x, y))
    assert same(einsum, model, torch.randn(2, 3, 4), torch.randn(1, 5, 4)) == 0


def test_attention_and_projections_in_einsums_are_recognized() -> None:
    def function(own: Any, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bsd,dhk->bhsk", x, w) for w in (own.q, own.k, own.v))
        weights = (torch.einsum("bhik,bhjk->bhij", q, k) * 0.25).softmax(-1)
        return torch.einsum("bhij,bhjk->bhik", weights, v)

    weights = {name: torch.randn(64, 4, 16) for name in "qkv"}
    gm = capture(Function(function, **weights), torch.randn(2, 7, 64))
    normalize(gm)
    found = counts(gm)
    assert (found["linear"], found["scaled_dot_product_attention"]) == (3, 1)


def test_one_matrix_for_each_head_is_a_grouped_linear() -> None:
    model = Function(lambda own, x: torch.einsum("bhsk,hkd->bhsd", x, own.w), w=torch.randn(3, 7, 4))
    gm = capture(model, torch.randn(2, 3, 5, 7), dynamic=True)
    normalize(gm)
    assert counts(gm)["grouped_linear"] == 1
