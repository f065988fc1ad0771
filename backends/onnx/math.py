"""Element-wise operators."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import sympy
import torch

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.symbols import floor_divide
from qfx.backends.onnx.values import Value, computed

Emit = Callable[..., Any]
_INTS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def operands(b: Builder, *args: Any, dtype: torch.dtype | None = None) -> list[Value]:
    """Tensors and numbers in one dtype: `dtype`, else the one that torch's promotion gives them."""
    dtype = dtype or promoted(*args)
    return [b.cast(a, dtype) if isinstance(a, Value) else b.scalar(a, dtype) for a in args]


def promoted(*args: Any) -> torch.dtype:
    """The dtype in which torch combines tensors (0-dimensional ones count less) and Python numbers."""
    fakes = [_stand_in(a) for a in args]
    result = fakes[0]
    for other in fakes[1:]:
        dtype = torch.result_type(result, other)
        rank = max((f.dim() for f in (result, other) if isinstance(f, torch.Tensor)), default=0)
        result = torch.empty((1,) * rank, dtype=dtype)
    return computed(result.dtype if isinstance(result, torch.Tensor) else torch.result_type(result, 0))


def _stand_in(value: Any) -> Any:
    if isinstance(value, Value):
        return torch.empty((1,) * value.rank, dtype=value.dtype)
    return 1 if isinstance(value, sympy.Expr) else value


def in_result_type(op_type: str) -> Emit:
    """A node over operands in the dtype of the result."""

    def emit(b: Builder, *args: Any) -> Value:
        return b.op(op_type, *operands(b, *args, dtype=b.out_dtype))

    return emit


def compare(op_type: str, negate: bool = False) -> Emit:
    """A comparison over promoted operands."""

    def emit(b: Builder, left: Any, right: Any) -> Value:
        dtype = promoted(left, right)
        if dtype == torch.bool and op_type != "Equal":
            dtype = torch.int32
        result = b.op(op_type, *operands(b, left, right, dtype=dtype), dtype=torch.bool)
        return b.op("Not", result) if negate else result

    return emit


def add(b: Builder, x: Any, y: Any, alpha: Any = 1) -> Value:
    """x + alpha * y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    if b.out_dtype == torch.bool:
        return b.op("Or", left, right)
    return b.op("Add", left, scaled(b, right, alpha))


def sub(b: Builder, x: Any, y: Any, alpha: Any = 1) -> Value:
    """x - alpha * y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    return b.op("Sub", left, scaled(b, right, alpha))


def rsub(b: Builder, x: Any, y: Any, alpha: Any = 1) -> Value:
    """y - alpha * x."""
    return sub(b, y, x, alpha)


def scaled(b: Builder, value: Value, alpha: Any) -> Value:
    """alpha * value."""
    return value if alpha == 1 else b.op("Mul", value, b.scalar(alpha, value.dtype))


def mul(b: Builder, x: Any, y: Any) -> Value:
    """x * y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    return b.op("And" if b.out_dtype == torch.bool else "Mul", left, right)


def div(b: Builder, x: Any, y: Any, rounding_mode: str | None = None) -> Value:
    """x / y; integers become floats without a rounding mode."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    if rounding_mode is None:
        return b.op("Div", left, right)
    if rounding_mode == "floor":
        return _floor(b, left, right)
    quotient = b.op("Div", left, right)
    return quotient if left.dtype in _INTS else trunc(b, quotient)


def floor_div(b: Builder, x: Any, y: Any) -> Value:
    """x // y rounded to minus infinity."""
    return _floor(b, *operands(b, x, y, dtype=b.out_dtype))


def _floor(b: Builder, left: Value, right: Value) -> Value:
    if left.dtype in _INTS:
        return floor_divide(b, left, right)
    quotient = b.op("Div", left, right)
    exact = b.op("Round", b.op("Div", b.op("Sub", left, _float_remainder(b, left, right)), right))
    by_zero = b.op("Equal", right, b.scalar(0, right.dtype), dtype=torch.bool)
    return b.op("Where", by_zero, quotient, exact)


def remainder(b: Builder, x: Any, y: Any) -> Value:
    """x - y * floor(x / y): the sign of y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    return b.op("Mod", left, right) if left.dtype in _INTS else _float_remainder(b, left, right)


def _float_remainder(b: Builder, left: Value, right: Value) -> Value:
    rest = b.op("Mod", left, right, fmod=1)
    zero = b.scalar(0, left.dtype)
    negative = b.op("Less", b.op("Mul", b.op("Sign", rest), b.op("Sign", right)), zero, dtype=torch.bool)
    return b.op("Where", negative, b.op("Add", rest, right), rest)


def fmod(b: Builder, x: Any, y: Any) -> Value:
    """The remainder with the sign of x."""
    return b.op("Mod", *operands(b, x, y, dtype=b.out_dtype), fmod=1)


def pow_(b: Builder, x: Any, y: Any) -> Value:
    """x ** y; small constant exponents become multiplications and roots."""
    dtype = b.out_dtype
    if isinstance(y, int | float) and isinstance(x, Value):
        base = b.cast(x, dtype)
        if y == 2:
            return b.op("Mul", base, base)
        if y == 3:
            return b.op("Mul", b.op("Mul", base, base), base)
        if y == 1:
            return base
        if dtype.is_floating_point and y in (0.5, -0.5, -1):
            root = base if y == -1 else b.op("Sqrt", base)
            return root if y == 0.5 else b.op("Reciprocal", root)
    if dtype in _INTS and dtype != torch.int64:
        return b.cast(b.op("Pow", *operands(b, x, y, dtype=torch.int64)), dtype)
    return b.op("Pow", *operands(b, x, y, dtype=dtype))


def unary(op_type: str) -> Emit:
    """One node on the input cast to the dtype of the result."""

    def emit(b: Builder, x: Value) -> Value:
        return b.op(op_type, b.cast(x, b.out_dtype))

    return emit


def same(op_type: str) -> Emit:
    """One node on a float input; integers are rounded already and pass."""

    def emit(b: Builder, x: Value) -> Value:
        return b.op(op_type, x) if x.dtype.is_floating_point else x

    return emit


def trunc(b: Builder, x: Value) -> Value:
    """Towards zero."""
    if not x.dtype.is_floating_point:
        return x
    return b.op("Mul", b.op("Sign", x), b.op("Floor", b.op("Abs", x)))


def rsqrt(b: Builder, x: Value) -> Value:
    """1 / sqrt(x)."""
    return b.op("Reciprocal", b.op("Sqrt", b.cast(x, b.out_dtype)))


def clamp(b: Builder, x: Value, low: Any = None, high: Any = None) -> Value:
    """Between two numbers or tensors; the upper wins where they cross."""
    value = b.cast(x, b.out_dtype)
    if low is not None:
        value = b.op("Max", value, *operands(b, low, dtype=b.out_dtype))
    return value if high is None else b.op("Min", value, *operands(b, high, dtype=b.out_dtype))


def clamp_max(b: Builder, x: Value, high: Any) -> Value:
    """Not above `high`."""
    return clamp(b, x, None, high)


def where(b: Builder, condition: Value, x: Any, y: Any) -> Value:
    """x where the condition holds, else y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    chosen = b.cast(condition, torch.bool)
    return b.op("Where", chosen, left, right)


def masked_fill(b: Builder, x: Value, mask: Value, value: Any) -> Value:
    """`value` where the mask holds."""
    return where(b, mask, value, x)


def logical(op_type: str) -> Emit:
    """A bool operator on anything (nonzero is true)."""

    def emit(b: Builder, *args: Any) -> Value:
        return b.op(
            op_type, *[b.cast(a, torch.bool) if isinstance(a, Value) else b.scalar(bool(a), torch.bool) for a in args]
        )

    return emit


def bitwise(op_type: str) -> Emit:
    """A bit operator: logical on bool."""

    def emit(b: Builder, *args: Any) -> Value:
        values = operands(b, *args, dtype=b.out_dtype)
        return b.op(op_type if b.out_dtype == torch.bool else f"Bitwise{op_type}", *values)

    return emit


def shift_left(b: Builder, x: Any, y: Any) -> Value:
    """x * 2**y."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    power = b.cast(b.op("Pow", b.scalar(2, torch.int64), b.cast(right, torch.int64)), left.dtype)
    return b.op("Mul", left, power)


def shift_right(b: Builder, x: Any, y: Any) -> Value:
    """floor(x / 2**y)."""
    left, right = operands(b, x, y, dtype=b.out_dtype)
    power = b.cast(b.op("Pow", b.scalar(2, torch.int64), b.cast(right, torch.int64)), left.dtype)
    return floor_divide(b, left, power)


def lerp(b: Builder, start: Value, end: Value, weight: Any) -> Value:
    """start + weight * (end - start)."""
    first, last, part = operands(b, start, end, weight, dtype=b.out_dtype)
    return b.op("Add", first, b.op("Mul", part, b.op("Sub", last, first)))


def addcmul(b: Builder, x: Value, t1: Value, t2: Value, value: Any = 1, op_type: str = "Mul") -> Value:
    """x + value * t1 * t2 (or t1 / t2)."""
    base, left, right = operands(b, x, t1, t2, dtype=b.out_dtype)
    return b.op("Add", base, scaled(b, b.op(op_type, left, right), value))


def square(b: Builder, x: Value) -> Value:
    """x * x."""
    return b.op("Mul", x, x)


def both(name: str, emit: Emit, overloads: str = "Tensor Scalar") -> dict[str, Emit]:
    """The same function for several overloads."""
    return {f"aten.{name}.{overload}": emit for overload in overloads.split()}


_UNARY = {
    "Abs": "abs", "Neg": "neg", "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Sin": "sin",
    "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos", "Atan": "atan", "Sinh": "sinh", "Cosh": "cosh",
    "Asinh": "asinh", "Acosh": "acosh", "Atanh": "atanh", "Tanh": "tanh", "Sigmoid": "sigmoid", "Erf": "erf",
    "Relu": "relu", "Sign": "sign",
}  # fmt: skip
_COMPARE = {
    "eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "le": ("LessOrEqual", False),
    "gt": ("Greater", False), "ge": ("GreaterOrEqual", False),
}  # fmt: skip

_BITS = ("And", "Or", "Xor")

EMIT: dict[str, Emit] = {
    **{f"aten.{name}.default": unary(op_type) for op_type, name in _UNARY.items()},
    **{k: v for name, how in _COMPARE.items() for k, v in both(name, compare(*how)).items()},
    **both("add", add), **both("sub", sub), **both("rsub", rsub), **both("mul", mul),
    **both("div", div, "Tensor Scalar Tensor_mode Scalar_mode"), **both("true_divide", div),
    **both("floor_divide", floor_div, "default Scalar"), **both("remainder", remainder, "Tensor Scalar Scalar_Tensor"),
    **both("fmod", fmod), **both("pow", pow_, "Tensor_Tensor Tensor_Scalar Scalar"),
    **both("where", where, "self ScalarOther ScalarSelf Scalar"), **both("masked_fill", masked_fill),
    **both("clamp", clamp, "default Tensor"), **both("clamp_min", clamp, "default Tensor"),
    **both("clamp_max", clamp_max, "default Tensor"), **both("clip", clamp, "default Tensor"),
    **both("maximum", in_result_type("Max"), "default"), **both("minimum", in_result_type("Min"), "default"),
    **both("max", in_result_type("Max"), "other"), **both("min", in_result_type("Min"), "other"),
    **{f"aten.logical_{n.lower()}.default": logical(n) for n in ("And", "Or", "Xor", "Not")},
    **{f"aten.bitwise_{n.lower()}.{o}": bitwise(n) for n in _BITS for o in ("Tensor", "Scalar", "Scalar_Tensor")},
    **{f"aten.__{n.lower()}__.{o}": bitwise(n) for n in _BITS for o in ("Tensor", "Scalar")},
    "aten.bitwise_not.default": bitwise("Not"),
    **both("__lshift__", shift_left), **both("__rshift__", shift_right),
    **both("bitwise_left_shift", shift_left, "Tensor Tensor_Scalar"),
    **both("bitwise_right_shift", shift_right, "Tensor Tensor_Scalar"),
    "aten.floor.default": same("Floor"), "aten.ceil.default": same("Ceil"), "aten.round.default": same("Round"),
    "aten.trunc.default": trunc, "aten.fix.default": trunc,
    "aten.rsqrt.default": rsqrt,
    "aten.square.default": square,
    "aten.special_erf.default": unary("Erf"),
    "aten.relu6.default": partial(clamp, low=0, high=6),
    **both("lerp", lerp),
    "aten.addcmul.default": addcmul, "aten.addcdiv.default": partial(addcmul, op_type="Div"),
}  # fmt: skip
