"""qfx.passes.strided: as_strided gathers, whatever lies in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx import run
from qfx.errors import QfxWarning
from qfx.measuring.measure import decibel, energies
from qfx.passes.cleanup import cleanup
from qfx.passes.strided import strided
from tests.graphs import Function, capture, text

GOLDEN = """\
%inputs_0: f32[2,4,8] = input
%reshape: f32[8,8] = aten.reshape(%inputs_0, [-1, 8])
%arange: i64[4] = aten.arange(4, device=cpu, dtype=i64)
%arange_1: i64[3] = aten.arange(3, device=cpu, dtype=i64)
%mul: i64[3] = aten.mul.Tensor(%arange_1, 2)
%reshape_1: i64[3,1] = aten.reshape(%mul, [3, 1])
%add: i64[3,4] = aten.add.Tensor(%reshape_1, %arange)
%index: f32[3,4,8] = aten.index.Tensor(%reshape, [%add])
return [%index]
"""


def windows(x: Tensor) -> Tensor:
    """Windows of 4 rows that overlap by 2, as Longformer cuts them: by the strides that x has."""
    return x.as_strided(
        (x.shape[0], (x.shape[1] - 2) // 2, 4, x.shape[2]),
        (x.stride(0), x.stride(1) * 2, x.stride(1), x.stride(2)),
    )


def turned(x: Tensor) -> Tensor:
    return windows((x * 2).transpose(0, 1))


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": windows,
    "turned": turned,
    "elements": lambda x: x.as_strided((3, 5), (7, 2)),
    "offset": lambda x: x.as_strided((2, 3), (8, 1), 16),
    "odd offset": lambda x: x.as_strided((2, 8), (8, 1), 3),
    "diagonal": lambda x: x.as_strided((6,), (9,), 1),
    "scalar": lambda x: x.as_strided((), (), 5),
    "read twice": lambda x: x.as_strided((4, 3, 8), (0, 8, 1)),
    "of a part": lambda x: x[1:].as_strided((2, 3), (4, 1)),
}


def test_golden_text() -> None:
    gm = capture(Function(lambda _, x: x.as_strided((3, 4, 8), (16, 8, 1))), torch.randn(2, 4, 8))
    run.run(gm, [strided, cleanup])
    assert text(gm) == GOLDEN


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_same_elements(name: str, dynamic: bool) -> None:
    model, x = Function(lambda _, x: CASES[name](x)), torch.randn(4, 6, 8)
    gm = capture(model, x, dynamic=dynamic)
    run.run(gm, [strided, cleanup])
    assert gm.meta["qfx_matches"]["strided"] == 1
    assert torch.equal(gm(x)[0], model(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :3].as_strided((2, 2), (8, 1)),
        lambda x: x.expand(2, 4, 6, 8).as_strided((2, 2), (8, 1)),
        lambda x: x[1:].as_strided((2, 3), (4, 1), 0),
    ],
)
def test_what_lies_beside_the_tensor_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    gm = capture(Function(lambda _, x: function(x)), torch.randn(4, 6, 8))
    with pytest.raises(qfx.UnsupportedError, match="beyond the tensor(.|\n)*next step: give it a copy"):
        run.run(gm, [strided])


@pytest.mark.parametrize("backend", ["onnx", "reference"])
def test_neighbours_that_lay_memory_out_otherwise(backend: str) -> None:
    """What stands before a view by strides runs in another library, which gives contiguous memory."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            cut: Tensor = self.out(turned(self.project(x)))
            return cut

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Windows().eval(), torch.randn(6, 4, 8)
    with torch.no_grad():
        found = torch.compile(model, backend="qfx", options={"backend": backend, "cache": False})(x)
        assert decibel(*energies(model(x), found)) >= 35


@pytest.mark.parametrize("backend", ["onnx", "reference"])
def test_writes_by_strides_are_refused(backend: str) -> None:
    def forward(x: Tensor) -> Tensor:
        y = (x * 2).t().clone()
        y.as_strided((4,), (1,)).zero_()
        return y

    torch._dynamo.reset()
    x = torch.randn(4, 8)
    compiled = torch.compile(forward, backend="qfx", options={"backend": backend})
    with torch.no_grad(), pytest.warns(QfxWarning, match="writes to memory by strides"):
        assert torch.equal(compiled(x), forward(x))
