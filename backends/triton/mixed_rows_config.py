"""A weight of `pack_mixed` by its parts, and which configuration runs a product of m rows with it.

Measured ones (see `tuning`), else those of `gemm4` for integer inputs, and a rule for float ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qfx.backends.triton.device import Device
from qfx.backends.triton.gemm4 import SUB
from qfx.backends.triton.gemm4_config import Problem, candidates, heuristic
from qfx.backends.triton.launch import Config
from qfx.backends.triton.tuning import tuned
from qfx.format import dtype_name

WIDTHS = (8, 4, 2)
DEQUANTIZE = "DEQUANTIZE"  # in a configuration of float inputs: the weight is written out, torch multiplies
_SUB_OF_FLOATS = 64  # columns of x that a tile of bytes serves: 128 bytes of 16 bits
_MANY = 1024  # rows from which that is the rule


class Mixed(NamedTuple):
    """The tensors of `pack_mixed`. data: rows of each of WIDTHS, of some none. group: of a scale, 0 for all of k."""

    order: Tensor
    data: list[Tensor]
    scale: Tensor
    sums: Tensor
    zero: Tensor | None
    group: int

    @classmethod
    def of(cls, weight: list[Tensor], group: int) -> Mixed:
        """By the tensors' places in the list."""
        order, *data, scale, sums = weight[:6]
        return cls(order, data, scale, sums, weight[6] if len(weight) > 6 else None, group)

    @property
    def n(self) -> int:
        """Rows of the weight."""
        return self.scale.shape[-1]

    @property
    def held(self) -> list[Tensor | None]:
        """As kernels take `data`."""
        return [part if len(part) else None for part in self.data]

    @property
    def counts(self) -> tuple[int, int]:
        """Rows of the first two widths; the last has the rest of `order`."""
        return len(self.data[0]), len(self.data[1])

    @property
    def strides(self) -> list[int]:
        """Bytes of a row of each width."""
        return [part.stride(0) for part in self.data]

    def grid(self, m: int, config: Config) -> tuple[int, int]:
        """Programs for m rows: tiles, and parts of k."""
        return -(-m // config["BLOCK_M"]) * (len(self.order) // config["BLOCK_N"]), config["SPLIT"]

    def is_even(self, k: int, sub: int) -> bool:
        """Whether k is made of whole units of every width that occurs."""
        return all(k % (sub * 8 // bits) == 0 for bits, part in zip(WIDTHS, self.data, strict=True) if len(part))

    def problem(self, k: int, sub: int) -> Problem:
        """As that of `gemm4`: the fewest bits that occur count."""
        bits = min(bits for bits, part in zip(WIDTHS, self.data, strict=True) if len(part))
        return Problem(len(self.order), k, bits, sub, self.group, self.zero is not None)

    def text(self, problem: Problem) -> str:
        """The problem as files name it."""
        rows = " ".join(f"{len(part)}x{bits}" for bits, part in zip(WIDTHS, self.data, strict=True) if len(part))
        return f"{problem} rows {rows}"


def columns_at_once(group: int, *, floats: bool = False) -> int:
    """Columns of x that a tile of bytes serves at once."""
    most = _SUB_OF_FLOATS if floats else SUB
    return min(group & -group, most) if group else most


def configuration(device: Device, weight: Mixed, m: int, k: int) -> Config:
    """Of integer inputs."""
    problem = weight.problem(k, columns_at_once(weight.group))
    found = tuned(device, "gemm_mixed", weight.text(problem), m, lambda most: candidates(device, problem, most))
    return found or heuristic(device, problem, m)


def of_floats(device: Device, weight: Mixed, m: int, k: int, dtype: torch.dtype, *, plain: bool) -> Config:
    """Of float inputs. plain: k may be split, and the product may be torch's."""
    problem = weight.problem(k, columns_at_once(weight.group, floats=True))
    text = f"{weight.text(problem)} {dtype_name(dtype)}"
    found = tuned(device, "linear_mixed", text, m, lambda most: float_candidates(device, problem, most, dtype))
    config = dict(found or float_candidates(device, problem, m, dtype)[0])
    if plain:
        return config
    if DEQUANTIZE in config:
        config = dict(next(c for c in float_candidates(device, problem, m, dtype) if DEQUANTIZE not in c))
    return {**config, "SPLIT": 1}


def float_candidates(device: Device, problem: Problem, m: int, dtype: torch.dtype) -> list[Config]:
    """Configurations worth measuring for float inputs; the first is that of a rule."""
    height = max(16, min(1 << max(m - 1, 0).bit_length(), 64))
    tiles = [(height, 64), (height, 128), (height, 32)] if m <= 64 else [(64, 128), (128, 128), (64, 64)]
    if device.interpreted:
        tiles = [(min(height, 32), 32)]
    elif dtype == torch.float32:
        tiles = [(min(height, 64), 64), (min(height, 64), 32)]
    elif m > 64 and not problem.group:
        tiles = [tiles[1], tiles[0], tiles[2]]
    found: list[Config] = []
    for block_m, block_n in tiles:
        programs = -(-m // block_m) * -(-problem.n // block_n)
        fitting = max(1, min(2 * device.processors // max(programs, 1), problem.k // problem.unit // 4, 8))
        row = dtype.itemsize * 8 // problem.bits * block_m + block_n
        stages = max(2, min(5, (device.shared - 8192) // (row * problem.sub)))
        warps = 8 if block_m * block_n >= 64 * 128 else 4
        one = {"BLOCK_M": block_m, "BLOCK_N": block_n, "TILES": 8, "num_warps": warps, "num_stages": stages}
        found += [{**one, "SPLIT": split} for split in (sorted({fitting, 1}, reverse=True) if m <= 64 else (1,))]
    if m > 64:
        found.insert(0 if m >= _MANY else len(found), {DEQUANTIZE: 1})
    return found
