from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.passes._hessian import Hessian, factor


def rows(count: int, channels: int, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 7, 512, 513, 1100])
def test_sum_of_batches(channels: int) -> None:
    """Blocks of columns, the last of them smaller, and both halves."""
    x = rows(40, channels)
    found = Hessian(channels)
    found.add(x[:24].reshape(2, 12, channels))
    found.add(x[24:])
    wanted = x.double().T @ x.double()
    assert found.rows == 40
    assert torch.allclose(found.diagonal.double(), wanted.diagonal(), rtol=1e-5)
    assert torch.allclose(found.whole().double(), wanted, rtol=1e-4, atol=1e-4)
    found.add(x)  # after it was looked at
    assert torch.allclose(found.whole().double(), 2 * wanted, rtol=1e-4, atol=1e-4)


def test_half_precision_is_summed_in_f32() -> None:
    x = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    found = Hessian(2)
    found.add(x)
    assert found.whole().dtype == torch.float32
    assert (found.whole() == 4096).all(), "bf16 would stop at 256"


def test_cross() -> None:
    x, wanted = rows(30, 5), rows(30, 5, seed=1)
    found = Hessian(5, cross=True)
    found.add(x, wanted)
    assert found.cross is not None
    assert torch.allclose(found.cross, (wanted - x).T @ x, atol=1e-5)
    part = found.columns(((1, 3), (4, 5)))
    assert part.cross is not None and part.rows == 30
    assert torch.equal(part.cross, found.cross[[1, 2, 4]][:, [1, 2, 4]])


def test_columns() -> None:
    found = Hessian(6)
    found.add(rows(20, 6))
    assert found.columns(None) is found
    part = found.columns(((4, 6), (0, 1)))
    assert torch.equal(part.whole(), found.whole()[[4, 5, 0]][:, [4, 5, 0]])


def test_factor() -> None:
    x = rows(50, 9)
    matrix = x.T @ x
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    upper, used = factor(matrix, order, 0.01, "fc")
    wanted = matrix[order][:, order] + 0.01 * matrix.diagonal().mean() * torch.eye(9)
    assert used == 0.01
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper @ upper.T, wanted, rtol=1e-4, atol=1e-4)


def test_dampening_grows_until_it_is_enough() -> None:
    x = rows(3, 40)  # rank 3
    matrix = x.T @ x
    _, used = factor(matrix, torch.arange(40), 0.0, "fc")
    assert used > 0
    matrix[0, 1] = matrix[1, 0] = 100 * matrix.diagonal().max()  # not positive definite at all
    upper, used = factor(matrix, torch.arange(40), 0.01, "fc")
    assert used > 1
    assert torch.isfinite(upper).all()


def test_dead_channels_have_the_mean_energy() -> None:
    x = rows(50, 4)
    x[:, 2] = 0
    matrix = x.T @ x
    upper, used = factor(matrix, torch.arange(4), 0.01, "fc")
    alive = matrix.diagonal()[[0, 1, 3]].mean()
    assert used == 0.01
    assert torch.allclose(upper[2, 2].square(), 1.01 * alive, rtol=1e-5)
    assert upper[2].count_nonzero() == 1


def test_nothing_alive() -> None:
    upper, used = factor(torch.zeros(3, 3), torch.arange(3), 0.01, "fc")
    assert used == 0.01
    assert torch.equal(upper, upper.diagonal().diag())


def test_what_cannot_be_factored_is_named() -> None:
    matrix = torch.eye(3)
    matrix[0, 1] = matrix[1, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"the statistics of 'layers\.0\.fc' cannot be factored.*\n.*energies from 1 to 1"
    ):
        factor(matrix, torch.arange(3), 0.01, "layers.0.fc")
