"""Rotations of activations at run time: what qfx::hadamard computes (see `qfx.rewrites.rotation`), on tensor cores.

qfx_triton::hadamard(Tensor x, Tensor[] packed, int size, bool inverse) -> Tensor
qfx_triton::hadamard_quantize(Tensor x, Tensor[] packed, int size, bool inverse, str format) -> (codes, scale, zero)

A block of channels is a matrix that is multiplied by a small matrix from each side. Products of f16 and bf16 inputs
with 1 and -1 are exact; what the second product takes goes as two terms of bf16, so that it errs by 2^-17 of a value.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from qfx.backends.triton.device import Device
from qfx.backends.triton.kernels import hadamard as kernels
from qfx.backends.triton.launch import Config, device_of, dot_dtype, launch
from qfx.backends.triton.library import define
from qfx.backends.triton.quantize_rows import aligned, quantize_dynamic
from qfx.backends.triton.row_codes import FLOATS
from qfx.backends.triton.tuning import tuned
from qfx.errors import explain
from qfx.format import Format, dtype_name
from qfx.rewrites import rotation

_SYLVESTER = (2, 4, 8, 16, 32)
_DENSE = 256  # a block of so many channels is one matrix
_CHUNK = 128  # rows and columns of a matrix that a program holds at once
_LEAST_WIDTH = 16
_STEP = 64  # rows of a larger matrix that it takes at a time
IN_ONE_LAUNCH = (Format.parse("i8/tok"), Format.parse("f8e4m3/tok"))
_TL = {torch.float16: triton.language.float16, torch.bfloat16: triton.language.bfloat16,
       torch.float32: triton.language.float32}  # fmt: skip


def _power_above(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (number - 1).bit_length()


class Layout(NamedTuple):
    """How a block of a * b channels is a matrix [a, b] (see `kernels.hadamard`): a = outer * high, of the outermost
    factors and of some of the innermost factors of two, of which `low` stay in b.
    """

    a: int
    b: int
    outer: int
    high: int
    low: int

    @property
    def padded(self) -> int:
        """Rows of a tile that a block takes."""
        return max(_power_above(self.a), 16) if self.a > 1 else 1

    @property
    def chunk(self) -> int:
        """b, padded."""
        return max(_power_above(self.b), 16)

    @property
    def cost(self) -> int:
        """Products of one value, those of two terms counted twice."""
        right = self.chunk if self.chunk <= _CHUNK else -(-self.b // _STEP) * _STEP
        return right + (2 * self.padded if self.a > 1 else 0)


@functools.lru_cache(maxsize=256)
def layout(size: int) -> Layout:
    """The cheapest matrix for a block of `size` channels."""
    found = []
    orders = [order for order, _ in _elementary(size, 0)]
    exact = [order == 2 or rotation.is_order(order) for order in orders]
    for first in range(len(orders) + 1 if size > _DENSE else 1):
        outer, rest = math.prod(orders[:first]), orders[first:]
        inner = next((i for i, order in enumerate(reversed(rest)) if order != 2), len(rest))
        if not all(exact[:first]):
            break
        for taken in range(inner + 1 if size > _DENSE else 1):
            a = outer << taken
            found.append(Layout(a, size // a, outer, 1 << taken, 1 << (inner - taken)))
    return min((one for one in found if one.a <= _CHUNK), key=lambda one: (one.cost, -one.low, one.a))


def _elementary(size: int, seed: int) -> list[tuple[int, Tensor]]:
    """(order, matrix of 1 and -1, or random orthogonal one, f64) whose Kronecker product is the matrix of a block."""
    found: list[tuple[int, Tensor]] = []
    for factor in rotation.factors(size, seed):
        order = len(factor)
        if order in _SYLVESTER:
            found += [(2, torch.from_numpy(rotation.hadamard(2)))] * (order.bit_length() - 1)
        else:
            known = rotation.is_order(order)
            found.append((order, torch.from_numpy(rotation.hadamard(order) if known else factor)))
    return found


def pack_hadamard(size: int, seed: int, *, inverse: bool = False, device: torch.device | str = "cpu") -> list[Tensor]:
    """The matrices of a rotation: left int8 [a, a], right [b, b] (int8; f32 with a random factor), signs int8 [size].

    Where a is 1 the signs are in `right`.
    """
    shape, factors = layout(size), [factor for _, factor in _elementary(size, seed)]
    twos = [rotation.hadamard(2)] * (shape.high.bit_length() - 1)
    first = next(i for i in range(len(factors) + 1) if math.prod(len(f) for f in factors[:i]) == shape.outer)
    left = _kronecker([*factors[:first], *map(torch.from_numpy, twos)])
    right = _kronecker(factors[first : len(factors) - len(twos)])
    sign = torch.from_numpy(rotation.signs(size, seed))
    left, right = (left, right.t()) if inverse else (left.t(), right)
    if shape.a == 1:
        right = right * (sign if inverse else sign[:, None])
    exact = bool((right.abs() == 1).all())
    packed = [left.to(torch.int8), right.to(torch.int8 if exact else torch.float32), sign.to(torch.int8)]
    return [part.contiguous().to(device) for part in packed]


def _kronecker(factors: list[Tensor]) -> Tensor:
    return functools.reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float64, device="cpu"))


def reason_against(dtype: torch.dtype) -> str | None:
    """Why activations of this dtype cannot be rotated, or None. Any size that `qfx.rewrites.rotation` knows can be."""
    return None if dtype in FLOATS else f"it rotates f16, bf16 and f32, not {dtype_name(dtype)}"


def candidates(size: int) -> list[Config]:
    """Configurations that are worth measuring for blocks of this size."""
    shape = layout(size)
    tiles = (16, 32, 64, 128) if shape.a == 1 else (1,)
    warps = (4, 8) if shape.a == 1 else (2, 4, 8)
    return [{"R": r, "num_warps": w, "num_stages": stages} for r in tiles for w in warps for stages in (1, 2)]


def _config(size: int, rows: int, dtype: torch.dtype, device: Device) -> Config:
    problem = f"size={size} {dtype_name(dtype)}"
    if (found := tuned(device, "hadamard", problem, rows, lambda _: candidates(size))) is not None:
        return found
    shape = layout(size)
    r = 1 if shape.a > 1 else (64 if rows >= 64 * device.processors else 16)
    values = max(r * shape.padded, min(shape.chunk, _CHUNK)) * min(shape.chunk, _CHUNK)
    return {"R": r, "num_warps": min(max(values // 2048, 1), 8), "num_stages": 1}


def hadamard(x: Tensor, packed: list[Tensor], size: int, inverse: bool) -> Tensor:
    """x [.., k * size] (f16, bf16, f32) with each block of `size` channels rotated; contiguous, of x's dtype and shape.

    packed: of `pack_hadamard` with the same size and `inverse`. Raises ValueError where they do not fit x.
    """
    (x, axes), shape = _checked(x, packed, size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks = x.shape[-1] // size
    units = x.shape[:-1].numel() * blocks
    config = _config(size, units, x.dtype, device_of(x))
    held = _held(x, packed)
    width = min(shape.chunk, held)
    while width > _LEAST_WIDTH and 2 * units * -(-shape.b // width) <= device_of(x).processors:
        width //= 2  # few rows: more programs, each with fewer columns
    settings = {"BJ": width, "BK": shape.chunk if shape.chunk <= held else _STEP}
    grid = (_programs(units, config, device_of(x)), -(-shape.b // settings["BJ"]))
    launch(kernels.hadamard, grid, x, y, packed[2], packed[0], packed[1], units, blocks, *axes,
           _factor(size), **settings, **_constants(x, packed, size, shape, inverse), config=config)  # fmt: skip
    return y


def hadamard_quantize(
    x: Tensor,
    packed: list[Tensor],
    size: int,
    inverse: bool,
    format: str,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor]:
    """`hadamard`, rounded to x's dtype, then `quantize_dynamic`, whose results it has.

    One launch for i8/tok and f8e4m3/tok where K needs no padding and the matrix over b fits a program, else two.
    """
    fmt = Format.parse(format)
    (x, axes), shape = _checked(x, packed, size)
    fits = shape.chunk <= _held(x, packed) and aligned(x.shape[-1]) == x.shape[-1]
    if not fits or fmt not in IN_ONE_LAUNCH:
        return quantize_dynamic(hadamard(x, packed, size, inverse), None, format)
    codes, scale = _codes_like(x, fmt)
    blocks = x.shape[-1] // size
    rows = x.shape[:-1].numel()
    config = _config(size, rows, x.dtype, device_of(x))
    grid = (_programs(rows, config, device_of(x)),)
    launch(kernels.hadamard_quantize, grid, x, codes.view(torch.uint8) if fmt.is_float else codes, scale, packed[2],
           packed[0], packed[1], rows, blocks, *axes, _factor(size), BK=shape.chunk, QMIN=fmt.qmin,
           QMAX=fmt.qmax, FLOAT=fmt.is_float, BY_HAND=device_of(x).by_hand, ONE=blocks == 1,
           **_constants(x, packed, size, shape, inverse), config=config)  # fmt: skip
    return codes, scale, torch.empty(0, dtype=torch.uint8, device=x.device)


def _constants(x: Tensor, packed: list[Tensor], size: int, shape: Layout, inverse: bool) -> dict[str, Any]:
    ieee = packed[1].dtype == torch.float32
    exact = dot_dtype(torch.float32 if ieee else x.dtype)
    term = torch.float32 if exact == torch.float32 else dot_dtype(torch.bfloat16)
    return {"SIZE": size, "A": shape.a, "AP": shape.padded, "B": shape.b, "HIGH": shape.high, "LOW": shape.low,
            "IEEE": ieee, "INVERSE": inverse, "DOT": _TL[exact], "TERM": _TL[term]}  # fmt: skip


def _held(x: Tensor, packed: list[Tensor]) -> int:
    """Rows and columns of the matrix over b that a program holds."""
    return _STEP if torch.float32 in (x.dtype, packed[1].dtype) else _CHUNK


def _factor(size: int) -> float:
    """What makes the product of matrices of 1 and -1 orthogonal; random factors are orthogonal themselves."""
    return math.sqrt(rotation.random_order(size) / size)


def _programs(tiles_of: int, config: Config, device: Device) -> int:
    return min(-(-tiles_of // config["R"]), 8 * device.processors)


def _checked(x: Tensor, packed: list[Tensor], size: int) -> tuple[tuple[Tensor, tuple[int, ...]], Layout]:
    """x with its axes, and the layout."""
    rotation.check(x.shape[-1], size)
    shape = layout(size)
    found = [tuple(part.shape) for part in packed]
    if found != [(shape.a, shape.a), (shape.b, shape.b), (size,)] or x.dtype not in FLOATS:
        raise ValueError(
            explain(
                f"an activation cannot be rotated in blocks of {size}",
                expected=f"float16, bfloat16 or float32, and matrices of pack_hadamard({size}, ..)",
                found=f"{dtype_name(x.dtype)}, matrices of shapes {found}",
                next_step="pack the matrices for this size, and cast the activation",
            )
        )
    if any(part.device != x.device for part in packed):
        raise ValueError(
            explain(
                "the matrices of a rotation lie on another device",
                expected=x.device,
                found=packed[1].device,
                next_step="pack_hadamard(.., device=x.device)",
            )
        )
    return _axes(x), shape


def _axes(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x, or a copy of it, and sizes (inner, last) and strides (outer, inner, last) of its rows as three axes."""
    joined: list[tuple[int, int]] = []
    if x.numel() == 0:
        return x, (1, 1, 0, 0, 0)
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        elif size != 1:
            joined.append((size, stride))
    if len(joined) > 3 or x.stride(-1) != 1:
        return _axes(x.clone(memory_format=torch.contiguous_format))
    axes = [*[(1, 0)] * (3 - len(joined)), *joined]
    return x, (axes[1][0], axes[2][0], axes[0][1], axes[1][1], axes[2][1])


def _codes_like(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=fmt.code_dtype, device=x.device)
    return codes, torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)


def _fake(x: Tensor, packed: list[Tensor], size: int, inverse: bool) -> Tensor:
    rotation.check(x.shape[-1], size)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_quantize(
    x: Tensor,
    packed: list[Tensor],
    size: int,
    inverse: bool,
    format: str,  # noqa: A002
) -> tuple[Tensor, Tensor, Tensor]:
    rotation.check(x.shape[-1], size)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.qfx_triton.quantize_dynamic(x, None, format)
    return found


define("hadamard(Tensor x, Tensor[] packed, int size, bool inverse) -> Tensor", hadamard, _fake)
define(
    "hadamard_quantize(Tensor x, Tensor[] packed, int size, bool inverse, str format) -> (Tensor, Tensor, Tensor)",
    hadamard_quantize, _fake_quantize,
)  # fmt: skip
