"""qfx.calibration.positions: what linears read is traced back to the inputs' positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfx.calibration.positions import Rows, rows_of
from qfx.capture import capture_export
from qfx.graph import op_name
from qfx.pipeline import prepare
from tests.zoo import ZOO

B, T, K = 3, 5, 4


class Reads(nn.Module):
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
    gm = capture_export(Reads(put), (torch.randn(B, T, K),), {}, dynamic=dynamic).gm
    (linear,) = (node for node in gm.graph.nodes if op_name(node) == "linear")
    found = rows_of(linear.args[0])
    assert (found is not None and found.like.name == "x" and not found.picks) is wanted


CUT = torch.tensor([4, 2, 2, 9])


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, K)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("put", "picks"),
    [
        (lambda x: flat(x)[CUT.to(x.device)], 1),
        (lambda x: torch.index_select(flat(x), 0, CUT), 1),
        (lambda x: torch.cat([flat(x)] * 2, -1)[CUT].chunk(2, -1)[1], None),  # what is put beside it is not looked at
        (lambda x: torch.tanh(flat(x))[CUT].sigmoid()[CUT - 2 * CUT.argsort().argsort()], 2),
        (lambda x: nn.functional.pad(flat(x), (0, K))[CUT][:, :K], None),
        (lambda x: torch.split(flat(x)[CUT].repeat(1, 2), K, -1)[0], None),
        (lambda x: flat(x).flip(0)[CUT], None),
        (lambda x: flat(x)[CUT] + torch.tanh(flat(x))[CUT], 1),
        (lambda x: flat(x) + flat(x)[flat(x)[:, 0].argsort()], None),  # rows of two positions: one may be padding alone
        (lambda x: flat(x)[flat(x)[:, 0].argsort()] + flat(x), None),
        (lambda x: flat(x)[CUT] * torch.tanh(flat(x))[CUT.flip(0)].sigmoid(), None),
        (lambda x: flat(x.transpose(0, 1))[CUT], None),
        (lambda x: flat(x)[:, CUT % K], None),  # columns
        (lambda x: torch.arange(4.0 * K).reshape(4, K)[CUT % 4] + 0 * x.sum(), None),  # of no positions
    ],
)
def test_picked_positions(put: Callable[[Tensor], Tensor], picks: int | None, dynamic: bool) -> None:
    x = torch.randn(B, T, K)
    gm = capture_export(Reads(put), (x,), {}, dynamic=dynamic).gm
    (linear,) = (node for node in gm.graph.nodes if op_name(node) == "linear")
    found = rows_of(linear.args[0])
    assert (None if found is None else len(found.picks)) == picks
    if found is not None:
        check_rows(gm, linear.args[0], found, x)


def check_rows(gm: fx.GraphModule, node: fx.Node, found: Rows, x: Tensor) -> None:
    """Rows change where the positions change from which they are picked, and nowhere else."""

    def values(x: Tensor) -> dict[fx.Node, Any]:
        held: dict[fx.Node, Any] = {}

        class Held(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                held[n] = super().run_node(n)
                return held[n]

        Held(gm).run(x)
        return held

    before = values(x)
    where = torch.arange(B * T)
    for pick in found.picks:
        where = where[before[pick]]
    for position in range(B * T):
        other = x.clone()
        other.view(-1, K)[position] += 1
        changed = (values(other)[node] != before[node]).any(-1)
        assert torch.equal(changed, where == position)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_read_picked_positions(name: str) -> None:
    model, inputs = ZOO[name]()
    gm = capture_export(model, (), inputs).gm
    prepare(gm)
    read = [n for n in gm.graph.nodes if op_name(n) == "grouped_linear"]
    assert len(read) == 4
    for node in read:
        found = rows_of(node.args[0])
        assert found is not None and found.like.name == "input_ids" and len(found.picks) == 1
