"""qfx::attention, which has sinks or a cap: in 16 bits by the kernel of rounded attention, else as it is defined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx import graph
from qfx.backends.triton import lowering
from qfx.ops.floats import attention as reference
from tests.backends.triton.cases import BF16_STEP, DEVICE, INTERPRETED
from tests.graphs import capture, error


class Attention(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = {"causal": True, "softcap": 0.0, **given}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        y: Tensor = torch.ops.qfx.attention(q, k, v, None, sinks, 0.3, *self.given.values())
        return y


def operands(dtype: torch.dtype, *, width: int = 32, queries: int = 40) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 4, queries, width), (1, 2, 40, width), (1, 2, 40, width), (4,))
    return [torch.randn(*s, generator=g).to(DEVICE, dtype) for s in shapes]


def lowered(module: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, str]:
    """The result, and what computed it."""
    gm = capture(module, *inputs)
    (name,) = [n.name for n in gm.graph.nodes if graph.schema_name(n) == "qfx::attention"]
    run = lowering.lower(gm)
    return run(*inputs)[0], run.kernels[name]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 3e-3), (torch.bfloat16, 2 * BF16_STEP)])
@pytest.mark.parametrize("given", [{}, {"softcap": 3.0}], ids=["sinks", "and a cap"])
def test_a_prompt_in_sixteen_bits(dtype: torch.dtype, most: float, given: dict[str, Any]) -> None:
    inputs = operands(dtype)
    found, kernel = lowered(Attention(**given), inputs)
    q, k, v, sinks = (x.float() for x in inputs)
    expected = reference(q, k, v, None, sinks, 0.3, True, given.get("softcap", 0.0))
    assert kernel == "attention (Triton)" and found.dtype == dtype
    assert float((found.float() - expected).norm() / expected.norm()) < most


def of_two(inputs: list[Tensor]) -> list[Tensor]:
    """Queries of two sequences, to one of keys."""
    return [inputs[0].repeat(2, 1, 1, 1), *inputs[1:]]


OTHERS = {
    "f32": operands(torch.float32),
    "wide": operands(torch.float16, width=300),
    "one sequence of keys": of_two(operands(torch.float16)),
}


@pytest.mark.parametrize("inputs", OTHERS.values(), ids=list(OTHERS))
def test_others_run_as_they_are_defined(inputs: list[Tensor]) -> None:
    found, kernel = lowered(Attention(), inputs)
    assert kernel == "attention (torch, compiled)"
    expected = reference(inputs[0], inputs[1], inputs[2], None, inputs[3], 0.3, True, 0.0)
    assert torch.equal(found, expected) or (not INTERPRETED and error(expected, found) < 1e-3)  # Inductor rounds less
