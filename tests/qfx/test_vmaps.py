"""qfx.vmaps: models that call torch.vmap compile as one quantized graph, and leave no level of it behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qfx
from qfx.capture import capture_export
from qfx.measuring.measure import decibel, energies
from qfx.text import dump
from qfx.vmaps import levels_kept


class Scan(nn.Module):
    """A linear, a scan over time as state-space models compute it when compiled (torch.vmap inside), a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        decay = torch.sigmoid(x)

        def step(left: Tensor, right: Tensor) -> Tensor:
            return left * 0.5 + right

        scanned = torch.vmap(torch.vmap(step), in_dims=(1, 1), out_dims=1)(decay, self.into(x))
        y: Tensor = self.out(scanned)
        return y


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("backend", ["onnx", "reference"])
def test_nested_regions_become_plain_operators(backend: str) -> None:
    model, x = Scan().eval(), torch.randn(3, 5, 8)
    compiled = torch.compile(model, backend="qfx", options={"backend": backend, "cache": False})
    with torch.no_grad():
        assert decibel(*energies(model(x), compiled(x))) >= 35
        assert torch.equal(compiled(x[:2]), compiled(x)[:2])
    totals = qfx.report(compiled).totals
    assert totals["linear_quantized"] == totals["linear"] == 2


def test_a_region_that_reads_a_parameter_and_a_constant() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.vmap(lambda row: row * self.scale + torch.arange(8.0))(self.fc(x))
            return y

    model, x = Rows().eval(), torch.randn(4, 8)
    compiled = torch.compile(model, backend="qfx", options={"backend": "reference", "cache": False})
    with torch.no_grad():
        assert decibel(*energies(model(x), compiled(x))) >= 35


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_graph_too(dynamic: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            later = torch.vmap(torch.vmap(lambda i, j: (i >= j) & (i != torch.tensor(2)), (None, 0)), (0, None))
            at = torch.arange(x.shape[1])
            y: Tensor = later(at, at)[None].to(x.dtype) @ self.fc(x)
            return y

    model, x = Masked().eval(), torch.randn(3, 5, 8)
    captured = capture_export(model, (x,), dynamic=dynamic)
    assert "vmap" not in dump(captured.gm)
    with torch.no_grad():
        assert torch.equal(captured.gm(x)[0], model(x))
        assert not dynamic or torch.equal(captured.gm(x[:2, :3])[0], model(x[:2, :3]))


def test_an_error_inside_a_region_leaves_no_level_behind() -> None:
    """Guards of Dynamo compare the levels of torch.func: with one more of them they end in an AssertionError."""

    def enter_and_fail() -> None:
        torch._C._functorch._vmap_increment_nesting(2, "error")
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), levels_kept():
        enter_and_fail()
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


@pytest.mark.parametrize("many", [0, 1, 2, 3])
def test_levels_of_every_kind_are_left_down_to_those_before(many: int) -> None:
    functorch: Any = torch._C._functorch
    levels = [
        lambda: functorch._vmap_increment_nesting(2, "error"),
        functorch._grad_increment_nesting,
        functorch._jvp_increment_nesting,
        lambda: functorch._func_increment_nesting(False),
    ]
    with levels_kept():
        for enter in levels[:many]:
            enter()
        with levels_kept():
            for enter in levels[many:]:
                enter()
        assert functorch.get_dynamic_layer_stack_depth() == many
    assert functorch.get_dynamic_layer_stack_depth() == 0
    assert torch.func.grad(lambda x: torch.vmap(torch.square)(x).sum())(torch.ones(2)).tolist() == [2, 2]


class Checkpointed(nn.Module):
    """A region, and one in it, inside functions whose values are computed again in the backward pass."""

    def __init__(self, deep: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.deep, self.inner, self.outer = deep, nn.Linear(8, 8), nn.Linear(8, 8)

    def rows(self, x: Tensor) -> Tensor:
        found: Tensor = torch.vmap(lambda row: torch.tanh(self.inner(row)) + row.sum())(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        def function(x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.rows, x, use_reentrant=False) if self.deep else self.rows(x)
            return found * 2

        found: Tensor = self.outer(checkpoint(function, x, use_reentrant=False))
        return found


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("deep", [False, True])
@torch.no_grad()
def test_a_region_in_a_checkpointed_function(deep: bool, dynamic: bool) -> None:
    model = Checkpointed(deep).eval()
    fast = torch.compile(model, backend="qfx", options={"strict": True}, dynamic=dynamic)
    for length in (4, 5) if dynamic else (4,):
        x = torch.randn(length, 3, 8)
        assert decibel(*energies(model(x), fast(x))) > 25
    rows = qfx.report(fast).rows
    assert {row.node: row.quantized for row in rows} == {"inner": True, "outer": True}
