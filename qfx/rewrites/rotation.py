"""Orthogonal matrices with a fast product: Hadamard matrices with random signs, computed from a size and a seed.

    qfx::hadamard(x, size, seed, inverse) -> Tensor        each block of `size` channels times Q = diag(signs) H

H is a Kronecker product of small matrices, so that a product costs O(n log n): powers of two (Sylvester), the orders
q + 1 and 2 (q + 1) of prime powers q (Paley 1933), and, for what no such order divides, a random orthogonal factor.
H is scaled to be orthogonal. The same size and seed give the same matrix everywhere: signs come from SHAKE-256.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qfx.errors import explain
from qfx.ops.library import UNSAFE, define

Matrix = np.ndarray[Any, np.dtype[np.float64]]

_SYLVESTER = (2, 4, 8, 16, 32)
_LARGEST_PALEY = 1024
_PASS = 16  # what one more pass over the data costs, in rows of a factor
_RANDOM = 10**6  # a random factor is taken only where there is no other


def rotate(x: Tensor, size: int, seed: int, *, inverse: bool = False) -> Tensor:
    """x [.., k * size] times Q in each block of `size` channels (Q^T where `inverse`); of x's dtype and shape.

    Computed in f32, f64 for f64. Raises ValueError where the size does not divide the channels.
    """
    check(x.shape[-1], size)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.reshape(-1, size).to(dtype)
    sign = torch.from_numpy(signs(size, seed)).to(values)
    values = values if inverse else values * sign
    left = 1
    for matrix in factors(size, seed):
        factor = torch.from_numpy(matrix).to(values)
        order, right = len(matrix), size // (left * len(matrix))
        parts = values.reshape(-1, order, right)
        if right == 1:
            values = parts.reshape(-1, order) @ (factor.mT if inverse else factor)
        else:
            values = (factor if inverse else factor.mT) @ parts
        left *= order
    values = values.reshape(-1, size)
    return (values * sign if inverse else values).to(x.dtype).reshape(x.shape)


def matrix(size: int, seed: int) -> Tensor:
    """Q itself, f64 [size, size]."""
    return rotate(torch.eye(size, dtype=torch.float64), size, seed)


@functools.lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Matrix:
    """f64 [size] of 1 and -1."""
    bits = np.unpackbits(np.frombuffer(_stream("signs", size, seed, -(-size // 8)), dtype=np.uint8))[:size]
    found: Matrix = 1.0 - 2.0 * bits.astype(np.float64)
    return found


@functools.lru_cache(maxsize=64)
def factors(size: int, seed: int) -> tuple[Matrix, ...]:
    """Orthogonal matrices, f64, whose Kronecker product in this order is H, [size, size]."""
    return tuple(_factor(order, seed, random=random) for order, random in _split(size)[1])


def _factor(order: int, seed: int, *, random: bool) -> Matrix:
    found: Matrix = _random(order, seed) if random else hadamard(order)
    return found if random else np.asarray(found / math.sqrt(order), dtype=np.float64)


def random_order(size: int) -> int:
    """The order of the random orthogonal factor that a size needs; 1 where Hadamard matrices suffice."""
    return math.prod(order for order, random in _split(size)[1] if random)


def check(channels: int, size: int) -> None:
    """Raises ValueError where blocks of `size` do not fill the channels. Symbolic sizes pass."""
    if isinstance(channels, int) and (size < 1 or channels % size):
        raise ValueError(
            explain(
                f"channels cannot be rotated in blocks of {size}",
                expected=f"a positive number that divides {channels}",
                found=size,
            )
        )


@functools.lru_cache(maxsize=256)
def hadamard(order: int) -> Matrix:
    """A matrix of 1 and -1 whose rows are orthogonal, f64 [order, order]. Raises ValueError where none is known."""
    if order in (1, *_SYLVESTER):
        found = np.ones((1, 1))
        while len(found) < order:
            found = np.kron(found, np.array([[1.0, 1.0], [1.0, -1.0]]))
        return found
    if order % 4 == 0 and (power := _prime_power(order - 1)) and (order - 1) % 4 == 3:
        core = _jacobsthal(*power)
        found = np.block([[np.ones((1, 1)), np.ones((1, order - 1))], [-np.ones((order - 1, 1)), core]])
        return found + np.diag([0.0] + [1.0] * (order - 1))
    if order % 4 == 0 and (power := _prime_power(order // 2 - 1)) and (order // 2 - 1) % 4 == 1:
        half = order // 2
        core = np.block([[np.zeros((1, 1)), np.ones((1, half - 1))], [np.ones((half - 1, 1)), _jacobsthal(*power)]])
        one = np.eye(half)
        return np.block([[core + one, core - one], [core - one, -core - one]])
    raise ValueError(f"no Hadamard matrix of order {order} is constructed here")


def is_order(order: int) -> bool:
    """Is `hadamard(order)` known?"""
    if order in (1, *_SYLVESTER):
        return True
    if order % 4 or order > _LARGEST_PALEY:
        return False
    return ((order - 1) % 4 == 3 and _prime_power(order - 1) is not None) or (
        (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1) is not None
    )


@functools.lru_cache(maxsize=4096)
def _split(size: int) -> tuple[int, tuple[tuple[int, bool], ...]]:
    """(cost, (order, is it random) of each factor) of the cheapest product of that size, the largest factor first."""
    if size == 1:
        return 0, ()
    best: tuple[int, tuple[tuple[int, bool], ...]] | None = None
    for order in (d for d in range(2, size + 1) if size % d == 0):
        random = not is_order(order)
        if random and order % 2 == 0:
            continue  # its powers of two are factors of their own
        cost, rest = _split(size // order)
        cost += order + _PASS + (_RANDOM if random else 0)
        if best is None or cost < best[0]:
            best = cost, tuple(sorted([*rest, (order, random)], reverse=True))
    assert best is not None
    return best


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k, p an odd prime; None for any other number."""
    p = next((d for d in range(3, math.isqrt(max(q, 0)) + 1, 2) if q % d == 0), q)
    k, rest = 0, q
    while p > 2 and rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 and p > 2 and p % 2 and q > 2 else None


def _jacobsthal(p: int, k: int) -> Matrix:
    """The quadratic character of the differences of all elements of GF(p^k), f64 [p^k, p^k]."""
    elements = list(itertools.product(range(p), repeat=k))
    modulus = _irreducible(p, k)
    number = {element: i for i, element in enumerate(elements)}
    character = np.full(len(elements), -1.0)
    character[0] = 0.0
    for element in elements[1:]:
        character[number[_times(element, element, modulus, p)]] = 1.0
    table = np.array(elements)
    difference = (table[:, None, :] - table[None, :, :]) % p
    places = p ** np.arange(k - 1, -1, -1)
    found: Matrix = character[difference @ places]
    return found


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """Coefficients (lowest first, without the leading 1) of a monic polynomial of degree k without a divisor."""
    for lower in itertools.product(range(p), repeat=k):
        divisors = (d for degree in range(1, k // 2 + 1) for d in itertools.product(range(p), repeat=degree))
        if all(any(_remainder((*lower, 1), divisor, p)) for divisor in divisors):
            return lower
    raise AssertionError((p, k))


def _remainder(polynomial: tuple[int, ...], divisor: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Of a division by the monic polynomial whose lower coefficients are `divisor`."""
    rest = list(polynomial)
    for top in range(len(rest) - 1, len(divisor) - 1, -1):
        lead, rest[top] = rest[top], 0
        for i, c in enumerate(divisor):
            rest[top - len(divisor) + i] = (rest[top - len(divisor) + i] - lead * c) % p
    return tuple(rest[: len(divisor)])


def _times(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    product = [0] * (2 * len(a) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] = (product[i + j] + x * y) % p
    return (*_remainder(tuple(product), modulus, p), *([0] * len(a)))[: len(a)]


def _random(order: int, seed: int) -> Matrix:
    """A random orthogonal matrix: QR of Gaussian values, with a positive diagonal of R."""
    count = order * order
    bits = np.frombuffer(_stream("normal", order, seed, 16 * count), dtype="<u8")
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal = np.sqrt(-2.0 * np.log(uniform[:count])) * np.cos(2.0 * np.pi * uniform[count:])
    q, r = np.linalg.qr(normal.reshape(order, order))
    return np.ascontiguousarray(q * np.sign(np.diag(r)))


def _stream(what: str, size: int, seed: int, count: int) -> bytes:
    return hashlib.shake_256(f"qfx {what} {size} {seed}".encode()).digest(count)


def _kernel(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    with torch.no_grad():
        y = rotate(x, size, seed, inverse=inverse)
        return y.clone() if y.data_ptr() == x.data_ptr() else y


def _fake(x: Tensor, size: int, seed: int, inverse: bool) -> Tensor:
    check(x.shape[-1], size)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.size, ctx.seed, ctx.inverse = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.qfx.hadamard(grad, ctx.size, ctx.seed, not ctx.inverse), None, None, None


define(
    "hadamard(Tensor x, int size, int seed, bool inverse) -> Tensor",
    _kernel,
    _fake,
    tags=UNSAFE,
    gradient=(_save, _backward),
)
