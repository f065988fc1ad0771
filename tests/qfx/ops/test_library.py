"""qfx.ops.library: an op is registered once, with its shapes, its gradient and its tags."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from qfx.ops.library import UNSAFE, define

OPS: Any = torch.ops.qfx_test_library


def test_an_op_with_its_shapes_gradient_and_tags() -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.by = inputs[1]

    def double(x: Tensor, by: float) -> Tensor:
        return x * by

    define(
        "scaled(Tensor x, float by) -> Tensor",
        double,
        lambda x, by: torch.empty_like(x),
        namespace="qfx_test_library",
        tags=UNSAFE,
        gradient=(save, lambda ctx, grad: (grad * ctx.by, None)),
    )
    gc.collect()
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(OPS.scaled(x, 2.0), 2 * x)
    assert torch.autograd.gradcheck(lambda v: OPS.scaled(v, 2.0), x)
    with FakeTensorMode() as mode:
        assert OPS.scaled(mode.from_tensor(torch.ones(4, 5)), 2.0).shape == (4, 5)
    assert torch.Tag.cudagraph_unsafe in OPS.scaled.default.tags


def test_the_first_registration_stays() -> None:
    for value in (1.0, 2.0):
        define(
            "filled(Tensor x) -> Tensor",
            lambda x, value=value: torch.full_like(x, value),
            torch.empty_like,
            namespace="qfx_test_library",
        )
    assert OPS.filled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_a_schema_that_torch_cannot_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected schema to look like"):
        define("broken", torch.empty_like, torch.empty_like, namespace="qfx_test_library")
