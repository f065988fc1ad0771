"""Scales of one level against a fine grid of all scales, and the shape of what comes back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.interop.gguf_blocks import block_type
from qfx.interop.gguf_search import divide, fit_affine, fit_scale, nearest, nearest_index


def parts(count: int = 40, size: int = 32) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(2))


def left(x: Tensor, scale: Tensor, name: str, w: Tensor | float = 1.0) -> Tensor:
    kind = block_type(name)
    return (w * (nearest(divide(x, scale), kind) * scale[..., None] - x).square()).sum(-1)


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "IQ4_NL"])
def test_scales_are_near_the_best_of_a_fine_grid(name: str) -> None:
    x = parts()
    kind = block_type(name)
    top = x.abs().amax(-1)
    reach = max(abs(v) for v in kind.table or (kind.low, kind.high))
    grid = torch.stack(
        [left(x, sign * top * share / reach, name) for sign in (1, -1) for share in torch.linspace(0.4, 1.3, 400)]
    )
    found, best = left(x, fit_scale(x, torch.ones(32), kind), name), grid.amin(0)
    print(f"{name}: {float(found.sum() / best.sum()):.4f} of the best of 800 scales")
    assert float(found.sum()) <= (1.03 if name == "Q8_0" else 1.04) * float(best.sum())


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K"])
@pytest.mark.parametrize("below", [False, True])
def test_offsets_beat_the_extremes(name: str, below: bool) -> None:
    x = parts() + 0.7
    kind = block_type(name)
    scale, offset = fit_affine(x, torch.ones(32), kind, below=below)
    assert scale.shape == offset.shape == (40,)
    assert not below or float(offset.max()) <= 0
    q = divide(x - offset[..., None], scale).round().clamp(0, kind.high)
    found = (q * scale[..., None] + offset[..., None] - x).square().sum()
    low = x.amin(-1).clamp(max=0) if below else x.amin(-1)
    step = (x.amax(-1) - low) / kind.high
    q = divide(x - low[..., None], step).round()
    assert float(found) < float((q * step[..., None] + low[..., None] - x).square().sum())


def test_weights_move_the_scale() -> None:
    x, kind = parts(), block_type("Q4_0")
    w = torch.ones(32)
    w[:4] = 100
    assert float(left(x, fit_scale(x, w, kind), "Q4_0", w).sum()) < float(
        left(x, fit_scale(x, torch.ones(32), kind), "Q4_0", w).sum()
    )


def test_zeros_and_constants() -> None:
    kind = block_type("Q4_0")
    assert torch.equal(fit_scale(torch.zeros(2, 32), torch.ones(32), kind), torch.zeros(2))
    scale, offset = fit_affine(torch.full((1, 32), 3.0), torch.ones(32), block_type("Q4_1"), below=False)
    assert float(scale.abs()) * 15 < 1e-3 and float(offset) == pytest.approx(3.0)
    scale, offset = fit_affine(torch.full((1, 32), 3.0), torch.ones(32), block_type("Q4_K"), below=True)
    assert float(offset) == 0 and float(scale) * 15 == pytest.approx(3.0, rel=0.1)


def test_division_by_no_scale_is_zero() -> None:
    assert torch.equal(divide(torch.ones(2, 3), torch.tensor([0.0, 2.0])), torch.tensor([[0.0] * 3, [0.5] * 3]))


def test_tables_out_of_order() -> None:
    table = (0.0, 1.0, 4.0, -1.0, -4.0)
    assert nearest_index(torch.tensor([0.4, 2.6, -9.0, -0.6]), table).tolist() == [0, 2, 4, 3]
