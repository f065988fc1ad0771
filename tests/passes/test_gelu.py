"""qfx.passes.gelu: spelled-out activations become one operator."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.passes.gelu import gelu
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[2,6] = input
%gelu: f32[2,6] = aten.gelu(%inputs_0, approximate=tanh)
return [%gelu]
"""


def new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def bloom(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x)))


def erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def erf_halves(x: Tensor) -> Tensor:
    return (torch.erf(x / 2**0.5) + 1) / 2 * x


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "new": (new, "gelu"),
    "fast": (fast, "gelu"),
    "bloom": (bloom, "gelu"),
    "erf": (erf, "gelu"),
    "erf, halved last": (erf_halves, "gelu"),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
    "silu": (lambda x: x * torch.sigmoid(x), "silu"),
}


def test_golden_text() -> None:
    gm, count = after(gelu, Function(lambda own, x: new(x)), torch.randn(2, 6))
    assert count == 1
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_function(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function, operator = SPELLINGS[name]
    model = Function(lambda own, x: function(x))
    x = (torch.randn(40, 6) * 3).to(dtype)
    gm, _ = after(gelu, model, x)
    assert counts(gm) == {operator: 1}
    assert same(gelu, model, x, limit=1e-5 if dtype == torch.float32 else 1e-2) == 1


def test_up_casts_around_an_activation_go() -> None:
    model = Function(lambda own, x: new(x.float()).to(x.dtype))
    gm, _ = after(gelu, model, torch.randn(2, 6).bfloat16())
    assert counts(gm) == {"gelu": 1}


def test_what_stands_around_an_activation_stays() -> None:
    model = Function(lambda own, x: (new(x * 2 + 1) + 1) * x)
    gm, _ = after(gelu, model, torch.randn(2, 6))
    assert counts(gm) == {"mul": 2, "add": 2, "gelu": 1}
    assert same(gelu, model, torch.randn(2, 6)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: x * torch.sigmoid(1.6 * x),
        lambda own, x: 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))),
        lambda own, x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.05 * x**3))),
        lambda own, x: 0.5 * x * (1.0 + torch.erf(x)),
        lambda own, x: own.w * torch.sigmoid(x),
        lambda own, x: x.sin() * torch.sigmoid(1.702 * x),
        lambda own, x: torch.tanh(x),
    ],
)
def test_near_misses_stay(function: Any) -> None:
    _, count = after(gelu, Function(function, w=torch.randn(6)), torch.randn(2, 6))
    assert count == 0
