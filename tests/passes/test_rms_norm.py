"""qfx.passes.rms_norm: spelled-out RMSNorm becomes aten.rms_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qfx.passes.rms_norm import rms_norm
from tests.graphs import Function, after, counts, same, text

GOLDEN = """\
%inputs_0: f32[s0,7,8] = input
%rms_norm: f32[s0,7,8] = aten.rms_norm(%inputs_0, [8], @w, 1e-06)
return [%rms_norm]
"""
GOLDEN_GEMMA = """\
%inputs_0: f32[2,8] = input
%add: f32[8] = aten.add.Tensor(@w, 1.0)
%rms_norm: f32[2,8] = aten.rms_norm(%inputs_0, [8], %add, 1e-06)
return [%rms_norm]
"""


def llama(own: Any, x: Tensor) -> Any:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return own.w * y.to(x.dtype)


def gemma(own: Any, x: Tensor) -> Any:
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (y * (1.0 + own.w.float())).type_as(x)


def t5(own: Any, x: Tensor) -> Any:
    y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
    return own.w * (y.to(own.w.dtype) if own.w.dtype in (torch.float16, torch.bfloat16) else y)


def olmo(own: Any, x: Tensor) -> Any:
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (own.w * y).to(x.dtype)


SPELLINGS: dict[str, Callable[[Any, Tensor], Any]] = {
    "llama": llama,
    "gemma": gemma,
    "t5": t5,
    "olmo": olmo,
    "x * x": lambda own, x: own.w * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)),
    "square": lambda own, x: own.w * (x * torch.rsqrt(1e-6 + x.square().mean(-1, keepdim=True))),
    "division by a root": lambda own, x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * own.w,
    "division by a power": lambda own, x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(0.5) * own.w,
    "negative power": lambda own, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5) * own.w,
    "reciprocal": lambda own, x: x * (1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)) * own.w,
    "no weight": lambda own, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
}


def test_golden_text() -> None:
    gm, count = after(rms_norm, Function(llama, w=torch.randn(8)), torch.randn(2, 7, 8), dynamic=True)
    assert count == 1
    assert text(gm).replace("s0,s1", "s0,7") == GOLDEN


def test_a_computed_weight_stays_a_node() -> None:
    gm, _ = after(rms_norm, Function(gemma, w=torch.randn(8)), torch.randn(2, 8))
    assert text(gm) == GOLDEN_GEMMA


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_function(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Function(SPELLINGS[name], w=torch.randn(8, dtype=dtype))
    x = (torch.randn(2, 7, 8) * 3 + 1).to(dtype)
    assert same(rms_norm, model, x, limit=1e-5 if dtype == torch.float32 else 1e-2) == 1


@pytest.mark.parametrize("name", ["llama", "olmo", "t5"])
def test_casts_around_a_half_precision_norm_go(name: str) -> None:
    gm, _ = after(rms_norm, Function(SPELLINGS[name], w=torch.randn(8).bfloat16()), torch.randn(2, 8).bfloat16())
    assert counts(gm) == {"rms_norm": 1}


def test_a_weight_of_another_dtype_is_cast() -> None:
    model = Function(lambda own, x: own.w * llama(own, x), w=torch.randn(8))
    assert same(rms_norm, model, torch.randn(2, 8).bfloat16(), limit=1e-2) == 1


def test_several_readers_of_one_norm() -> None:
    def function(own: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * own.w, y * 2.0, y

    assert same(rms_norm, Function(function, w=torch.randn(8)), torch.randn(2, 8)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda own, x: own.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),  # no epsilon
        lambda own, x: own.w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6)),  # another dimension
        lambda own, x: own.w * (x.sin() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),  # of another tensor
        lambda own, x: own.w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6)),  # not a square
        lambda own, x: own.w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),  # a sum
        lambda own, x: own.w * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6)),  # no root
    ],
)
def test_near_misses_stay(function: Any) -> None:
    _, count = after(rms_norm, Function(function, w=torch.randn(8)), torch.randn(2, 8, 8))
    assert count == 0


def test_rounding_before_the_square_is_kept() -> None:
    def function(own: Any, x: Tensor) -> Any:
        rounded = x.bfloat16().float()
        return own.w * (x * torch.rsqrt(rounded.pow(2).mean(-1, keepdim=True) + 1e-6))

    _, count = after(rms_norm, Function(function, w=torch.randn(8)), torch.randn(2, 8))
    assert count == 0
