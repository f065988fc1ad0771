"""Importance: moments of inputs, and products that sum to the squared change of a result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.calibration.moments import Moments


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(torch.float32)


def seen(x: Tensor, block: int | None = None) -> Importance:
    moments = Moments(block=block)
    for part in x.split(10):
        moments.update(part)
    return moments.importance()


def test_energy_is_the_mean_square() -> None:
    x = data(33, 12) + 1
    found = seen(x)
    assert found.moments.dtype == torch.float32
    assert torch.allclose(found.moments, x.square().mean(0), rtol=1e-5)
    a, b = data(3, 12), data(3, 12, seed=1)
    assert torch.allclose(found.product(a, b), a * b * x.square().mean(0), rtol=1e-5)


@pytest.mark.parametrize("channels", [8, 12, 13])
def test_covariance_gives_the_error_of_the_result(channels: int) -> None:
    """Over one block the sum is exactly the mean squared change of the result."""
    x = data(50, channels) + 0.5
    found = seen(x, block=16)
    assert found.moments.shape == (1, 16, 16)
    d = data(5, channels, seed=2)
    assert torch.allclose(found.product(d, d).sum(-1), (x @ d.T).square().mean(0), rtol=1e-4)
    other = data(5, channels, seed=3)
    assert torch.allclose(found.product(d, other).sum(-1), ((x @ d.T) * (x @ other.T)).mean(0), rtol=1e-3, atol=1e-5)


def test_blocks_see_no_further_than_themselves() -> None:
    x = data(50, 20)
    found = seen(x, block=8)
    assert found.moments.shape == (3, 8, 8)
    d = data(2, 20, seed=2)
    apart = sum((x[:, i : i + 8] @ d[:, i : i + 8].T).square().mean(0) for i in (0, 8, 16))
    assert torch.allclose(found.product(d, d).sum(-1), torch.as_tensor(apart), rtol=1e-4)


def test_leading_dimensions() -> None:
    """Experts [E, N, K] share what their inputs look like."""
    found, d = seen(data(50, 12), block=4), data(3, 5, 12, seed=2)
    for e in range(3):
        assert torch.allclose(found.product(d, d)[e], found.product(d[e], d[e]))


def test_halves_of_the_data_merge() -> None:
    x = data(40, 6)
    one, two = Moments(block=4), Moments(block=4)
    one.update(x[:15])
    two.update(x[15:])
    assert torch.allclose(one.merge(two).importance().moments, seen(x, block=4).moments, rtol=1e-6)
    with pytest.raises(ValueError, match="cannot merge"):
        one.merge(Moments(block=8))


def test_no_data_and_bad_data() -> None:
    with pytest.raises(ValueError, match="no data reached 'fc x'"):
        Moments("fc x").importance()
    with pytest.raises(ValueError, match=r"(?s)not finite in batch 3.*fc x"):
        Moments("fc x").update(torch.tensor([[1.0, float("nan")]]), batch=3)


@pytest.mark.parametrize("block", [None, 4, 8])
def test_a_product_with_one_side_fixed_is_the_same(block: int | None) -> None:
    """Bit by bit, for the fixed side, for an equal copy of it and for another."""
    found, fixed = seen(data(40, 13), block=block), data(5, 13, seed=1)
    product = found.product_with(fixed)
    for a in (data(5, 13, seed=2), fixed):
        for b in (fixed, fixed.clone(), data(5, 13, seed=3)):
            assert torch.equal(product(a, b), found.product(a, b))


@pytest.mark.parametrize("block", [None, 8])
def test_a_square_is_the_product_with_itself(block: int | None) -> None:
    """Of an energy in the memory of what it is given, of blocks beside it."""
    moments = Moments("fc", block)
    moments.update(torch.randn(40, 20, generator=torch.Generator().manual_seed(0)))
    importance = moments.importance()
    a = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    wanted, given = importance.product(a, a), a.clone()
    found = importance.square(given)
    assert torch.equal(found, wanted)
    assert (found.data_ptr() == given.data_ptr()) == (block is None)


def test_energy_of_each_expert() -> None:
    energies, d, other = data(3, 12).square(), data(3, 5, 12, seed=2), data(3, 5, 12, seed=3)
    found = Importance(energies)
    for e in range(3):
        own = Importance(energies[e])
        assert torch.equal(found.product(d, other)[e], own.product(d[e], other[e]))
        assert torch.equal(found.square(d.clone())[e], own.square(d[e].clone()))
        assert torch.equal(found.columns([(4, 7), (0, 2)]).moments[e], own.columns([(4, 7), (0, 2)]).moments)
