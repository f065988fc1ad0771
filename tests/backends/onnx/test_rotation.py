"""qfx::hadamard in ONNX: Reshapes and small products that give what the reference gives."""

from __future__ import annotations

import pytest
import torch

from qfx.rewrites import rotation
from tests.backends.onnx.checks import check, floats


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(96, 96), (64, 16), (36, 12), (7, 7), (100, 50), (768, 768)])
def test_as_the_reference(channels: int, size: int, inverse: bool) -> None:
    count = len(rotation.factors(size, 5))
    lowered = check(
        lambda x: torch.ops.qfx.hadamard(x, size, 5, inverse),
        lambda n: [floats(n, 3, channels)],
        dynamic=True,
        tolerance=3e-6,
    )
    kernel = f"MatMul f32 (x{count})" if count > 1 else "MatMul f32"
    assert kernel in lowered.kernels.values()


def test_half_precision_and_rank_one() -> None:
    check(
        lambda x: torch.ops.qfx.hadamard(x, 24, 0, False),
        lambda n: [floats(n, 24, dtype=torch.bfloat16)],
        tolerance=1e-2,
    )
    check(lambda x: torch.ops.qfx.hadamard(x[0], 24, 0, False), lambda n: [floats(n, 24)])
