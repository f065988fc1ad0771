"""qfx::hadamard as small products: one MatMul for each Kronecker factor of the matrix, between Reshapes."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.math import Emit
from qfx.backends.onnx.values import Value
from qfx.rewrites import rotation


def hadamard(b: Builder, x: Value, size: int, seed: int, inverse: bool) -> Value:
    """Each block of `size` channels times Q = diag(signs) H (Q^T where `inverse`)."""
    signs = b.derived(f"hadamard.{size}.{seed}.signs", torch.float32, (size,), lambda: _f32(rotation.signs(size, seed)))
    y = b.op("Reshape", b.cast(x, torch.float32), b.ints([-1, size]))
    y = y if inverse else b.op("Mul", y, signs)
    left = 1
    for number, matrix in enumerate(rotation.factors(size, seed)):
        order = len(matrix)
        right = size // (left * order)
        turned = (right == 1) == inverse  # the factor stands on the right of rows, on the left of columns

        def make(at: int = number, turned: bool = turned) -> Tensor:
            found = _f32(rotation.factors(size, seed)[at])
            return found.t().contiguous() if turned else found

        name = f"hadamard.{size}.{seed}.{number}{'t' if turned else ''}"
        factor = b.derived(name, torch.float32, (order, order), make)
        if right == 1:
            y = b.op("MatMul", b.op("Reshape", y, b.ints([-1, order])), factor)
        else:
            y = b.op("MatMul", factor, b.op("Reshape", y, b.ints([-1, order, right])), dtype=torch.float32)
        left *= order
    y = b.op("Mul", b.op("Reshape", y, b.ints([-1, size])), signs) if inverse else y
    return b.reshape(Value(y.name, y.dtype, (None,)), x.dims)


def _f32(matrix: rotation.Matrix) -> Tensor:
    return torch.from_numpy(matrix).to(torch.float32)


EMIT: dict[str, Emit] = {"qfx.hadamard.default": hadamard}
