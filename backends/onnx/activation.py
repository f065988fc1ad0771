"""Activation functions."""

from __future__ import annotations

from typing import Any

import torch

from qfx.backends.onnx.build import MICROSOFT, Builder
from qfx.backends.onnx.math import Emit, clamp, scaled
from qfx.backends.onnx.values import Value


def gelu(b: Builder, x: Value, approximate: str = "none") -> Value:
    """Gelu by erf or by tanh."""
    if x.dtype != torch.float32:
        return b.cast(gelu(b, b.cast(x, torch.float32), approximate), x.dtype)
    if b.standard:
        return b.op("Gelu", x, approximate=approximate)
    if approximate == "none":
        return b.op("Gelu", x, domain=MICROSOFT)
    return b.op("FastGelu", x, domain=MICROSOFT)


def silu(b: Builder, x: Value) -> Value:
    """x * sigmoid(x)."""
    return b.op("Mul", x, b.op("Sigmoid", x))


def softplus(b: Builder, x: Value, beta: Any = 1, threshold: Any = 20) -> Value:
    """log(1 + exp(beta x)) / beta; x itself above the threshold."""
    steep = scaled(b, x, beta)
    soft = b.op("Softplus", steep)
    soft = soft if beta == 1 else b.op("Div", soft, b.scalar(beta, x.dtype))
    above = b.op("Greater", steep, b.scalar(threshold, x.dtype), dtype=torch.bool)
    return b.op("Where", above, x, soft)


def hardtanh(b: Builder, x: Value, low: Any = -1, high: Any = 1) -> Value:
    """Between two numbers."""
    return clamp(b, x, low, high)


def hardsigmoid(b: Builder, x: Value) -> Value:
    """min(max(x + 3, 0), 6) / 6."""
    return b.op("Div", clamp(b, b.op("Add", x, b.scalar(3, x.dtype)), 0, 6), b.scalar(6, x.dtype))


def hardswish(b: Builder, x: Value) -> Value:
    """x * hardsigmoid(x)."""
    return b.op("Mul", x, hardsigmoid(b, x))


def elu(b: Builder, x: Value, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Value:
    """x, or alpha (exp(x) - 1) below zero."""
    negative = b.op("Elu", b.op("Min", scaled(b, x, input_scale), b.scalar(0, x.dtype)), alpha=float(alpha))
    positive = b.op("Greater", x, b.scalar(0, x.dtype), dtype=torch.bool)
    return scaled(b, b.op("Where", positive, x, negative), scale)


def leaky_relu(b: Builder, x: Value, slope: Any = 0.01) -> Value:
    """x, or slope * x below zero."""
    return b.op("LeakyRelu", x, alpha=float(slope))


def mish(b: Builder, x: Value) -> Value:
    """x * tanh(softplus(x))."""
    return b.op("Mul", x, b.op("Tanh", b.op("Softplus", x)))


def logsigmoid(b: Builder, x: Value) -> Value:
    """-softplus(-x)."""
    return b.op("Neg", b.op("Softplus", b.op("Neg", x)))


def quick_gelu(b: Builder, x: Value) -> Value:
    """x * sigmoid(1.702 x)."""
    if b.standard:
        return b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, b.scalar(1.702, x.dtype))))
    return b.op("QuickGelu", x, domain=MICROSOFT, alpha=1.702)


EMIT: dict[str, Emit] = {
    "aten.gelu.default": gelu,
    "aten.silu.default": silu,
    "aten.softplus.default": softplus,
    "aten.hardtanh.default": hardtanh,
    "aten.hardsigmoid.default": hardsigmoid,
    "aten.hardswish.default": hardswish,
    "aten.elu.default": elu,
    "aten.leaky_relu.default": leaky_relu,
    "aten.mish.default": mish,
    "aten.log_sigmoid.default": logsigmoid,
    "qfx.quick_gelu.default": quick_gelu,
}
