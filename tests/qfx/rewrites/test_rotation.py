"""qfx.rewrites.rotation: Hadamard matrices of many orders, products by their factors, and the op."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qfx.rewrites import rotation

# Sizes of hidden states and MLPs of known models, and the orders of their factors.
KNOWN = {
    64: [8, 8], 96: [12, 8], 192: [16, 12], 512: [8, 8, 8], 768: [12, 8, 8], 896: [28, 8, 4], 4864: [76, 8, 8],
    8960: [28, 20, 16], 11008: [344, 8, 4], 14336: [28, 8, 8, 8], 18944: [148, 16, 8],
}  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 44, 76, 108, 140, 252, 344])
def test_hadamard_matrices(order: int) -> None:
    """Sylvester, Paley's two constructions, and those over GF(27), GF(125), GF(343)."""
    found = rotation.hadamard(order)
    assert set(np.unique(found)) <= {-1.0, 1.0}
    assert np.array_equal(found @ found.T, order * np.eye(order))


def test_orders_of_which_none_is_known() -> None:
    missing = [order for order in range(4, 200, 4) if not rotation.is_order(order)]
    # multiples of 8 here are products of smaller orders; the others need constructions beyond Paley's
    assert [order for order in missing if rotation.random_order(order) > 1] == [92, 116, 156, 172, 184, 188]
    for order in (3, 6, 92):
        with pytest.raises(ValueError, match=f"no Hadamard matrix of order {order} is constructed here"):
            rotation.hadamard(order)


@pytest.mark.parametrize("size", KNOWN)
def test_factors_of_known_sizes(size: int) -> None:
    assert [len(matrix) for matrix in rotation.factors(size, 0)] == KNOWN[size]
    assert rotation.random_order(size) == 1


@pytest.mark.parametrize(("size", "order"), [(3, 3), (50, 25), (172, 43), (11, 11), (352, 1)])
def test_what_has_no_hadamard_matrix_gets_a_random_factor(size: int, order: int) -> None:
    assert rotation.random_order(size) == order
    q = rotation.matrix(size, 0)
    torch.testing.assert_close(q @ q.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 160), seed=st.integers(0, 9), blocks=st.integers(1, 3), inverse=st.booleans())
def test_products_are_those_of_an_orthogonal_matrix(size: int, seed: int, blocks: int, inverse: bool) -> None:
    x = torch.randn(3, 2, blocks * size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q = torch.from_numpy(np.ones((1, 1)))
    for matrix in rotation.factors(size, seed):
        q = torch.kron(q, torch.from_numpy(matrix))
    q = torch.from_numpy(rotation.signs(size, seed)).unsqueeze(1) * q
    expected = (x.unflatten(-1, (blocks, size)) @ (q.mT if inverse else q)).flatten(-2)
    found = rotation.rotate(x, size, seed, inverse=inverse)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(rotation.rotate(found, size, seed, inverse=not inverse), x, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))


def test_an_outlier_is_spread_evenly() -> None:
    """One channel of 100 among 768 becomes 100 / sqrt(768) everywhere: what rotations are for."""
    x = torch.zeros(1, 768)
    x[0, 13] = 100.0
    y = rotation.rotate(x, 768, 0)
    torch.testing.assert_close(y.abs(), torch.full_like(y, 100.0 / 768**0.5))
    blocked = rotation.rotate(x, 32, 0)
    assert int((blocked != 0).sum()) == 32


def test_signs_depend_on_size_and_seed_alone() -> None:
    assert rotation.signs(16, 0).tolist() == [1, 1, 1, 1, -1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, 1]
    first, again, other = rotation.signs(4096, 0), rotation.signs(4096, 0).copy(), rotation.signs(4096, 1)
    assert np.array_equal(first, again) and 1800 < int((first != other).sum()) < 2300
    assert abs(float(first.sum())) < 300 and set(np.unique(first)) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_keeps_type_and_shape(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 96).to(dtype)
    y = torch.ops.qfx.hadamard(x, 96, 3, False)
    assert (y.dtype, y.shape) == (dtype, x.shape) and y.data_ptr() != x.data_ptr()
    exact = rotation.rotate(x.double(), 96, 3)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))
    assert torch.ops.qfx.hadamard(x[:0], 96, 3, False).shape == (0, 5, 96)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch 2.14's own
def test_the_op_in_torch() -> None:
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.qfx.hadamard.default, (x, 12, 1, False))
    assert torch.autograd.gradcheck(lambda v: torch.ops.qfx.hadamard(v, 12, 1, True), (x,))


def test_the_op_does_not_share_memory_for_blocks_of_one() -> None:
    x = torch.randn(2, 3)
    y = torch.ops.qfx.hadamard(x, 1, 0, False)
    assert y.data_ptr() != x.data_ptr() and torch.equal(y.abs(), x.abs())


@pytest.mark.parametrize("size", [5, 0, -2])
def test_blocks_have_to_fill_the_channels(size: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be rotated in blocks of {size}"):
        torch.ops.qfx.hadamard(torch.zeros(2, 12), size, 0, False)
