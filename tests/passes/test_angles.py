"""passes.angles: matrices of frequencies stay in float."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.capture import capture_export
from qfx.measuring.measure import sqnr_db
from qfx.passes.angles import becomes_angle
from qfx.pipeline import prepare


class Places(nn.Module):
    """Places [B, P, K] -> [B, P, 16]: a linear, what happens to it, another linear."""

    def __init__(self, function: Callable[[Tensor], Tensor], columns: int = 2, scale: float = 20.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frequencies = nn.Parameter(torch.randn(columns, 8) * scale)
        self.fc, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.fc(self.function((2 * x - 1) @ self.frequencies)))


def turned(x: Tensor) -> Tensor:
    x = 2 * math.pi * x
    return torch.cat([x.sin(), x.cos()], dim=-1)


def moved(x: Tensor) -> Tensor:
    """Scaled and moved about before (LightGlue repeats each for a pair of channels)."""
    return (x.unsqueeze(1) / 2 + 1).repeat_interleave(2, dim=-1).squeeze(1).cos()


def split(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a.sin(), a.cos(), b, b], dim=-1)


def active(x: Tensor) -> Tensor:
    """Not an angle: what sin is taken of is a function of it."""
    return torch.cat([x.tanh().sin(), x], dim=-1)


def doubled(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)


def found(model: nn.Module, x: Tensor) -> list[bool]:
    gm = capture_export(model.eval(), (x,)).gm
    prepare(gm)
    return [
        becomes_angle(node) for node in gm.graph.nodes if node.op == "call_function" and "linear" in str(node.target)
    ]


@pytest.mark.parametrize(
    ("function", "columns", "angle"),
    [
        (turned, 1, True),
        (turned, 2, True),
        (turned, 8, True),
        (turned, 9, False),  # a layer with a periodic activation
        (moved, 3, True),
        (split, 2, True),
        (active, 2, False),
        (doubled, 2, False),
    ],
)
def test_sin_and_cos_of_coordinates(function: Callable[[Tensor], Tensor], columns: int, angle: bool) -> None:
    assert found(Places(function, columns), torch.rand(2, 5, columns)) == [angle, False]


def test_frequencies_stay_in_float_and_places_where_they_are() -> None:
    """20 turns of a coordinate: in 8 bits they come to other places."""
    model, x = Places(turned).eval(), torch.rand(2, 50, 2)
    with torch.no_grad():
        wanted = model(x)
        with pytest.warns(qfx.QfxWarning, match=r"frequencies: sin and cos are taken of its result"):
            quantized = qfx.quantize(model, "w8a8", [x])
        assert quantized.get_parameter("frequencies").is_floating_point() and sqnr_db(wanted, quantized(x)) > 30
    rows = {row.node: row.quantized for row in qfx.report(quantized).rows}
    assert rows == {"frequencies": False, "fc": True}


def test_strict_refuses_and_ignore_allows() -> None:
    x = torch.rand(2, 5, 2)
    with pytest.raises(qfx.UnsupportedError, match="sin and cos are taken of its result"):
        qfx.plan(Places(turned).eval(), "w8a16", [x], strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = qfx.plan(Places(turned).eval(), "w8a16", [x], strict=True, ignore=["frequencies"])
    assert list(made.annotations) == ["fc"]


def test_compiled_graphs_keep_them_too() -> None:
    model, x = Places(turned).eval(), torch.rand(2, 50, 2)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert sqnr_db(model(x), torch.compile(model, backend="qfx", options={"recipe": "w8a8"})(x)) > 30
