"""qfx.calibration.positions: what linears read is traced back to the inputs' positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qfx.calibration.positions import flattened
from qfx.capture import capture_export
from qfx.graph import op_name

B, T, K = 3, 5, 4


class Rows(nn.Module):
    """What `put` makes of positions, times a matrix."""

    def __init__(self, put: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.put, self.linear = put, nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.linear(self.put(x))
        return made


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("put", "wanted"),
    [
        (lambda x: x.reshape(-1, K), True),
        (lambda x: torch.tanh(x.reshape(-1, K)) * x.view(-1, K), True),
        (lambda x: x.transpose(0, 1).reshape(-1, K), False),
        (lambda x: x.reshape(-1, K).flip(0), False),
        (lambda x: x[0], False),
        (lambda x: x, False),
    ],
)
def test_flattened_positions(put: Callable[[Tensor], Tensor], wanted: bool, dynamic: bool) -> None:
    gm = capture_export(Rows(put), (torch.randn(B, T, K),), {}, dynamic=dynamic).gm
    (linear,) = (node for node in gm.graph.nodes if op_name(node) == "linear")
    assert flattened(linear.args[0]) is wanted
