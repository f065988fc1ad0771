"""Learned rounding in GGUF's blocks: it starts from the search, ends in what a file holds, and descends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.interop.gguf_blocks import BLOCK_TYPES, block_type, pack, unpack
from qfx.interop.gguf_encode import encode
from qfx.interop.gguf_offsets import BlockOffsets

NAMES = sorted(BLOCK_TYPES)


def normal(rows: int = 8, columns: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def correlated(columns: int = 256) -> Tensor:
    """H of inputs whose channels go together."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(600, columns // 8, generator=generator) @ torch.randn(columns // 8, columns, generator=generator)
    x += 0.5 * torch.randn(600, columns, generator=generator)
    return x.T @ x / 600


def descended(held: BlockOffsets, w: Tensor, h: Tensor, steps: int = 60) -> list[float]:
    """Losses tr (W' - W) H (W' - W)^T at the start and in the end."""
    losses = []
    for done in range(steps + 1):
        lost = held.value() - w
        losses.append(float(((lost @ h) * lost).sum()))
        if done < steps:
            rate = 2 / steps * (1 - done / steps)
            held.step(2 * lost @ h, rate, 0.15 * rate)
    return [losses[0], losses[-1]]


@pytest.mark.parametrize("name", NAMES)
def test_the_start_is_what_the_search_finds(name: str) -> None:
    w = normal()
    assert torch.equal(pack(BlockOffsets(w, block_type(name)).packed()).reshape(8, -1), encode(w, name))


@pytest.mark.parametrize("name", NAMES)
def test_descent_lowers_the_loss(name: str) -> None:
    w, h, kind = normal(), correlated(), block_type(name)
    held = BlockOffsets(w, kind)
    before, after = descended(held, w, h)
    print(f"{name}: {before:.3e} -> {after:.3e}")
    assert after < 0.85 * before


@pytest.mark.parametrize("optimizer", ["adam", "sign"])
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), rate=st.floats(0.01, 2.0))
@settings(max_examples=5, deadline=None)
def test_what_a_file_holds_is_the_value(name: str, optimizer: str, seed: int, rate: float) -> None:
    """Whatever steps were taken."""
    w, kind = normal(4, seed=seed), block_type(name)
    held = BlockOffsets(w, kind, optimizer=optimizer)
    for i in range(3):
        held.value()
        held.step(normal(4, seed=seed + i), rate, 0.3 * rate)
    blocks = held.packed()
    assert torch.equal(blocks.values().reshape(4, 256), held.value())
    assert torch.equal(unpack(pack(blocks), kind).values().reshape(4, 256), held.value())
    assert 0 <= held.clipped <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_value_takes_either_neighbour_and_no_other(name: str) -> None:
    w, kind = normal(), block_type(name)
    held = BlockOffsets(w, kind)
    first = held.packed()
    for i in range(4):
        held.value()
        held.step(normal(seed=i), 5.0, 0.0)
    last = held.packed()
    assert torch.equal(first.d, last.d), "factors stay without a rate"
    order = torch.tensor(kind.table or tuple(range(kind.low, kind.high + 1))).argsort().argsort()
    low = 0 if kind.table else kind.low
    places = [order[blocks.codes.long() - low] for blocks in (first, last)]
    moved = (places[0] - places[1]).abs()
    most = 2 if kind.table else 1  # half of the distance on one side may be more than that on the other
    assert int(moved.max()) <= most and float((moved > 0).float().mean()) > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name: str) -> None:
    w = torch.zeros(3, 256)
    w[1] = normal(1)
    held = BlockOffsets(w, block_type(name))
    for i in range(3):
        held.value()
        held.step(normal(3, seed=i), 0.5, 0.1)
    found = held.value()
    assert not found[0].any() and not found[2].any() and bool(found[1].any())
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("name", NAMES)
def test_factors_are_learned_where_they_are_alone(name: str) -> None:
    w, kind = normal(), block_type(name)
    held = BlockOffsets(w, kind)
    first = held.packed()
    descended(held, w, correlated(), steps=10)
    last = held.packed()
    assert torch.equal(first.d, last.d) == (kind.affine or name == "MXFP4")
    for one, other in ((first.m, last.m), (first.scales, last.scales), (first.mins, last.mins)):
        assert one is other or (one is not None and other is not None and torch.equal(one, other))


def test_values_that_no_block_holds_are_named() -> None:
    w = normal()
    w[0, 3] = torch.nan
    with pytest.raises(ValueError, match="'layers.0.fc'"):
        BlockOffsets(w, block_type("Q4_K"), name="layers.0.fc")
