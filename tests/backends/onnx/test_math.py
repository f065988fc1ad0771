"""Element-wise operators against torch: values, dtypes, promotion, signs of integer division."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.onnx.checks import Case, check, floats, integers

F64, I32, I8, U8 = torch.float64, torch.int32, torch.int8, torch.uint8


def xy(n: int) -> list[Tensor]:
    return [floats(n, 4, seed=1), floats(n, 4, seed=2)]


def positive(n: int) -> list[Tensor]:
    return [floats(n, 4).abs() + 0.1]


def unit(n: int) -> list[Tensor]:
    return [floats(n, 4).tanh() * 0.9]


def whole(n: int) -> list[Tensor]:
    divisor = integers(n, 4, seed=2)
    return [integers(n, 4, seed=1), torch.where(divisor == 0, 3, divisor)]


def special(n: int) -> list[Tensor]:
    return [torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.5]).repeat(n, 1)]


def halves(n: int) -> list[Tensor]:
    return [torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.7]).repeat(n, 1)]


def bools(n: int) -> list[Tensor]:
    return [floats(n, 4, seed=1) > 0, floats(n, 4, seed=2) > 0]


def narrow(n: int) -> list[Tensor]:
    return [integers(n, 4, seed=1, dtype=I8), integers(n, 4, low=1, seed=2, dtype=I8)]


UNARY = [
    *(
        "abs",
        "neg",
        "exp",
        "sin",
        "cos",
        "tan",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "tanh",
        "sigmoid",
        "erf",
        "erfc",
        "relu",
    ),
    *("sign", "floor", "ceil", "trunc", "square", "expm1", "reciprocal", "frac", "exp2", "positive"),
]
CASES: list[Case] = [
    *[(name, getattr(torch.Tensor, name), lambda n: [floats(n, 4)]) for name in UNARY],
    *[(name, getattr(torch, name), positive) for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt")],
    *[(name, getattr(torch, name), unit) for name in ("asin", "acos", "atanh")],
    ("acosh", torch.acosh, lambda n: [floats(n, 4).abs() + 1.1]),
    ("round", torch.round, halves),
    ("round decimals", lambda x: torch.round(x, decimals=1), lambda n: [floats(n, 4)]),
    ("log1p near zero", torch.log1p, lambda n: [floats(n, 4) * 1e-6]),
    ("expm1 far below zero", lambda x: torch.expm1(-x.abs() * 1000), special),
    ("expm1 of large negative numbers", torch.expm1, lambda n: [floats(n, 4).abs() * -500]),
    ("expm1 near zero", torch.expm1, lambda n: [floats(n, 4) * 1e-6]),
    *[
        (name, getattr(torch, name), special)
        for name in ("isnan", "isinf", "isfinite", "nan_to_num", "relu", "sigmoid")
    ],
    ("nan_to_num values", lambda x: torch.nan_to_num(x, 1.0, 2.0, 3.0), special),
    ("add", torch.add, xy),
    ("add alpha", lambda x, y: torch.add(x, y, alpha=2), xy),
    ("sub alpha", lambda x, y: torch.sub(x, y, alpha=0.5), xy),
    ("rsub", lambda x, y: 3 - x + torch.rsub(x, y, alpha=2), xy),
    ("mul scalar", lambda x, y: x * 2.5 * y, xy),
    ("broadcast", lambda x, y: x + y[:, :1], xy),
    ("div", torch.div, xy),
    ("div floor", lambda x, y: torch.div(x, y, rounding_mode="floor"), xy),
    ("div trunc", lambda x, y: torch.div(x, y, rounding_mode="trunc"), xy),
    ("remainder", torch.remainder, xy),
    ("fmod", torch.fmod, xy),
    ("floor_divide", lambda x, y: x // y, xy),
    ("floor by zero", lambda x: x // 0.0, lambda n: [floats(n, 4)]),
    ("true divide of integers", torch.true_divide, whole),
    ("integer floor division", lambda x, y: x // y, whole),
    ("integer floor division by number", lambda x, y: (x // 4, x // -4), whole),
    ("integer trunc division", lambda x, y: torch.div(x, y, rounding_mode="trunc"), whole),
    ("integer remainder", lambda x, y: (x % y, x % 5, x % -5, torch.fmod(x, y)), whole),
    ("int8 wraps around", lambda x, y: (x * 100 + y, x // y, x % y), narrow),
    ("uint8 wraps around", lambda x: (x - 4, x * 200), lambda n: [integers(n, 4, low=0, dtype=U8)]),
    ("integer and number", lambda x, y: (x + 2, x * 1.5, x / 2), whole),
    ("int32 and int64", lambda x: x + torch.ones(4, dtype=torch.int64), lambda n: [integers(n, 4, dtype=I32)]),
    ("float and 0-dim double", lambda x: x * torch.tensor(2.0, dtype=F64), lambda n: [floats(n, 4)]),
    ("pow numbers", lambda x: (x**2, x**3, x**0.5, x**-0.5, x**-1, x**1, x**2.7, 2**x), positive),
    ("pow tensors", torch.pow, lambda n: [floats(n, 4).abs(), floats(n, 4, seed=3)]),
    ("pow integers", lambda x, y: (x**2, x**3, x.abs() ** 4), whole),
    ("clamp", lambda x, y: (x.clamp(-0.5, 0.5), x.clamp(min=0), x.clamp(max=0.1), x.clamp(0.5, -0.5)), xy),
    ("clamp tensors", lambda x, y: (torch.clamp(x, min=y), torch.clamp_min(x, 0.2), torch.clamp_max(x, 0.2)), xy),
    ("clamp integers", lambda x, y: (x.clamp(-2, 3), x.clamp(min=0.5)), whole),
    ("maximum", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y), torch.min(x, y)), xy),
    ("maximum of integers", lambda x, y: (torch.maximum(x, y), torch.minimum(x, y)), whole),
    ("compare", lambda x, y: (x < y, x <= y, x > y, x >= y, x == y, x != y), xy),
    ("compare numbers", lambda x, y: (x < 0.5, x <= 0, x > 1, x >= -1, x == 0, x != 0), xy),
    ("compare integers with a fraction", lambda x, y: (x < 1.5, x == 2.0, x >= -0.5), whole),
    ("compare bools", lambda x, y: (x == y, x != y, x < y, x == 1), bools),
    ("logic", lambda x, y: (x & y, x | y, x ^ y, ~x, torch.logical_and(x, y), torch.logical_not(x)), bools),
    ("logic of numbers", lambda x, y: (torch.logical_or(x, y), torch.logical_xor(x, y), torch.logical_not(x)), whole),
    ("bits", lambda x, y: (x & y, x | y, x ^ y, ~x, x & 3, x << 2, x >> 1), whole),
    ("add bools", lambda x, y: (x + y, x * y), bools),
    ("where", lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, x, 0.0), torch.where(x > 0, 1, y)), xy),
    ("where numbers", lambda x, y: torch.where(x > 0, 1.0, -torch.inf), xy),
    ("where bools", lambda x, y: torch.where(x, y, False), bools),
    ("where integers", lambda x, y: torch.where(x > 0, x, y), whole),
    ("masked_fill", lambda x, y: (x.masked_fill(y > 0, -torch.inf), x.masked_fill(y > 0, y[0, 0])), xy),
    ("lerp", lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, y.abs())), xy),
    ("addcmul", lambda x, y: (torch.addcmul(x, x, y, value=0.5), torch.addcdiv(x, y, y.abs() + 1)), xy),
    ("atan2", torch.atan2, xy),
    ("f64", lambda x, y: (x.double() * 1.0000000001 + y, x.double().exp(), x.double() > y.double()), xy),
    ("0-dimensional", lambda x, y: (x[0, 0] + 1, x[0, 0] * y[0, 0], x[0, 0] + y), xy),
    ("einsum", lambda x, y: torch.einsum("ij,kj->ik", x, y), xy),
    ("addr by decomposition", lambda x, y: torch.addr(x, x[:, 0], y[0]), xy),
    ("xlogy by decomposition", lambda x, y: torch.xlogy(x, y.abs()), xy),
    ("logit by decomposition", torch.logit, lambda n: [torch.sigmoid(floats(n, 4))]),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("function", "make"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_matches_torch(function: Any, make: Any, dynamic: bool) -> None:
    check(function, make, dynamic=dynamic)


ACTIVATIONS: list[Case] = [
    *[
        (name, getattr(torch.nn.functional, name), lambda n: [floats(n, 8) * 4])
        for name in ("gelu", "silu", "softplus", "hardtanh", "hardsigmoid", "hardswish", "elu", "leaky_relu", "mish")
    ],
    *[
        (name, getattr(torch.nn.functional, name), lambda n: [floats(n, 8) * 4])
        for name in ("logsigmoid", "relu6", "celu", "selu", "softsign", "tanhshrink")
    ],
    ("gelu tanh", lambda x: torch.nn.functional.gelu(x, approximate="tanh"), lambda n: [floats(n, 8) * 4]),
    ("softplus beta", lambda x: torch.nn.functional.softplus(x, 2.0, 3.0), lambda n: [floats(n, 8) * 4]),
    ("elu alpha", lambda x: torch.nn.functional.elu(x, 0.7), lambda n: [floats(n, 8) * 4]),
    ("glu", torch.nn.functional.glu, lambda n: [floats(n, 8)]),
    ("quick_gelu", torch.ops.qfx.quick_gelu, lambda n: [floats(n, 8)]),
]


@pytest.mark.parametrize(("function", "make"), [c[1:] for c in ACTIVATIONS], ids=[c[0] for c in ACTIVATIONS])
def test_activation_matches_torch(function: Any, make: Any) -> None:
    check(function, make)


def test_f64_without_a_kernel_is_computed_in_f32_and_told() -> None:
    lowered = check(lambda x: torch.erf(x.double()), lambda n: [floats(n, 4)], tolerance=1e-6)
    assert [note.reason for note in lowered.notes] == ["Erf is computed in f32 instead of f64"]


def test_the_comparison_sees_a_wrong_result() -> None:
    """Negative control of the helper that every test here uses."""
    with pytest.raises(AssertionError, match="not close"):
        check(lambda x: x.floor() if type(x) is Tensor else x.ceil(), lambda n: [floats(n, 4)])
