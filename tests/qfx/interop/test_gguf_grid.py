"""The grid of GGUF's blocks: columns rounded on it are what the blocks hold, and its factors are least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.interop.gguf_blocks import BLOCK_TYPES, Blocks, block_type, pack, unpack
from qfx.interop.gguf_grid import BlockGrid

NAMES = sorted(BLOCK_TYPES)
K_TYPES = [name for name in NAMES if BLOCK_TYPES[name].parts > 1]
ROWS = slice(0, 12)


def normal(columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(12, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def rounded(w: Tensor, name: str) -> tuple[BlockGrid, Tensor, Tensor]:
    """The grid, codes [N, K] and values [K, N] of a matrix whose columns are rounded one after the other."""
    grid = BlockGrid(block_type(name), (w.shape[0], w.shape[1]))
    codes, values = torch.empty(w.shape, dtype=grid.code_dtype), torch.empty(w.shape[1], w.shape[0])
    for j in range(w.shape[1]):
        if j % grid.width == 0:
            grid.refit(j, w[:, j : j + grid.reach(j)], slice(0, len(w)), torch.ones(grid.reach(j)))
        codes[:, j], values[j] = grid.round(j, w[:, j].clone(), slice(0, len(w)))
    return grid, codes, values


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_what_the_blocks_hold(name: str) -> None:
    w, kind = normal(), block_type(name)
    grid, codes, values = rounded(w, name)
    blocks = grid.blocks(codes, ROWS)
    assert torch.equal(blocks.values().reshape(w.shape), values.T)
    assert torch.equal(grid.values(codes, ROWS), values)
    again = unpack(pack(blocks), kind)
    assert torch.equal(again.values().reshape(w.shape), values.T), "as a file holds them"
    assert float((values.T - w).norm() / w.norm()) < {"Q2_K": 0.28, "Q3_K": 0.16}.get(name, 0.12)


@pytest.mark.parametrize("name", NAMES)
def test_each_code_is_the_nearest(name: str) -> None:
    """Against all values that a block's codes stand for."""
    w, kind = normal(256), block_type(name)
    grid, _, _ = rounded(w, name)
    held = kind.table or tuple(range(kind.low, kind.high + 1))
    for column in (0, 17, 255):
        part = column // grid.width
        every = grid.step[part][:, None] * torch.tensor(held, dtype=torch.float32) + grid.offset[part][:, None]
        _, found = grid.round(column, w[:, column].clone(), ROWS)
        least = (every - w[:, column, None]).abs().amin(1)
        assert torch.allclose((found - w[:, column]).abs(), least, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", K_TYPES)
def test_a_further_part_leaves_the_others(name: str) -> None:
    w = normal(256)
    grid, _, _ = rounded(w, name)
    steps, offsets, d, m = grid.step.clone(), grid.offset.clone(), grid.d.clone(), grid.m.clone()
    start = 2 * grid.width
    assert grid.reach(start) == grid.width and grid.reach(0) == grid.reach(256) == 256
    grid.refit(start, 0.3 * w[:, start : start + grid.width], ROWS, torch.ones(grid.width))
    assert torch.equal(grid.d, d) and torch.equal(grid.m, m)
    others = [part for part in range(len(steps)) if part != 2]
    assert torch.equal(grid.step[others], steps[others]) and torch.equal(grid.offset[others], offsets[others])
    assert float(grid.step[2].abs().mean()) < 0.6 * float(steps[2].abs().mean()), "of weights a third as large"


def test_some_rows_leave_the_others() -> None:
    w, grid = normal(256), BlockGrid(block_type("Q4_K"), (12, 256))
    grid.refit(0, w[4:8], slice(4, 8), torch.ones(256))
    assert bool((grid.step[:, 4:8] > 0).any()) and not grid.step[:, :4].any() and not grid.step[:, 8:].any()
    whole, _, _ = rounded(w, "Q4_K")
    assert torch.equal(grid.d[:, 4:8], whole.d[:, 4:8])


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), wrong=st.floats(0.7, 1.4))
@settings(max_examples=5, deadline=None)
def test_moving_factors_never_adds_to_the_loss(name: str, seed: int, wrong: float) -> None:
    """Factors that were found for other weights, on correlated columns."""
    kind, w = block_type(name), normal(256, seed)
    grid, codes, _ = rounded(w * wrong, name)
    x = torch.randn(400, 256, generator=torch.Generator().manual_seed(seed)) @ (torch.eye(256) + 0.05)
    h = x.T @ x
    values = grid.values(codes, ROWS)

    def loss(found: Tensor) -> Tensor:
        lost = w.T - found
        return (lost * (h @ lost)).sum(0)

    before = loss(values)
    for start in range(0, 256, kind.size):
        part = slice(start, start + kind.size)
        slope = h[part] @ (w.T - values)
        values[part] += grid.shift(start, ROWS, values[part], slope, h[part, part])
    assert torch.allclose(values, grid.values(codes, ROWS), rtol=1e-4, atol=1e-7), "the grid moved with the values"
    assert bool((loss(values) <= before * (1 + 1e-4)).all())
    if name != "MXFP4" and abs(wrong - 1) > 0.2:
        assert float(loss(values).sum()) < 0.9 * float(before.sum())
    held: Blocks = grid.blocks(codes, ROWS)
    assert torch.equal(held.values().reshape(w.shape).T, grid.values(codes, ROWS))


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
@pytest.mark.parametrize("energy", [2.0**-80, 2.0**70])
def test_factors_move_alike_whatever_the_energy(name: str, energy: float) -> None:
    """Inputs of 1e6 in thousands of tokens have squares whose products float32 does not hold."""
    w, kind = normal(256), block_type(name)
    h, moved = torch.eye(256) + 0.05, []
    for scale in (1.0, energy):
        grid, codes, _ = rounded(w * 1.3, name)
        values, own = grid.values(codes, ROWS)[: kind.size], scale * h[: kind.size, : kind.size]
        moved.append(grid.shift(0, ROWS, values, own @ (w.T[: kind.size] - values), own))
    assert bool(moved[0].any()) and torch.equal(moved[0], moved[1])


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_columns_without_energy(name: str) -> None:
    kind = block_type(name)
    w = torch.zeros(3, kind.size)
    w[1] = normal(kind.size)[0]
    grid = BlockGrid(kind, (3, kind.size))
    grid.refit(0, w, slice(0, 3), torch.zeros(kind.size))
    codes = torch.stack([grid.round(j, w[:, j].clone(), slice(0, 3))[0] for j in range(kind.size)], 1)
    values = grid.blocks(codes.to(grid.code_dtype), slice(0, 3)).values().reshape(w.shape)
    assert not values[0].any() and not values[2].any() and bool(values[1].any())
    shifted = grid.shift(0, slice(0, 3), values.T.contiguous(), torch.zeros(kind.size, 3), torch.eye(kind.size))
    assert not shifted.any() and bool(torch.isfinite(grid.step).all())


def test_values_beyond_the_codes_are_counted() -> None:
    grid = BlockGrid(block_type("Q4_0"), (1, 32))
    w = torch.linspace(-1, 1, 32)[None]
    grid.refit(0, w, slice(0, 1), torch.ones(32))
    columns, step = torch.arange(3), abs(float(grid.step[0, 0]))
    inside = torch.tensor([0.0, 7.0, -7.0])[:, None] * step
    assert grid.beyond(columns, inside, slice(0, 1)) == 0
    assert grid.beyond(columns, inside * 1.3, slice(0, 1)) == 2
