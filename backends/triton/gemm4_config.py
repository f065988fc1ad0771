"""Which configuration of `gemm4` runs a problem of m rows: measured ones (see `tuning`), else by a model of its cost.

The weight streams through once for every BLOCK_M rows; k is split until every processor has its share.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config, each_once
from qfx.backends.triton.tuning import tuned

KERNEL = "gemm4"
FEW = 32  # rows up to which the sums of x are found with the products
_SPLITS = (1, 2, 3, 4, 6, 8)
_SECOND_LAUNCH = 4 << 20  # bytes that the memory moves in the time of one
_IN_FLIGHT = 40_000  # bytes that a processor waits for where the memory is busy: its bandwidth times its latency
_TILES = 8  # tile rows that go along the columns together


@dataclass(frozen=True)
class Problem:
    """y [m, n] of k columns. bits: in which codes are held. sub: columns of a shift. group: of a scale, 0 for all.

    affine: the weight has zero points.
    """

    n: int
    k: int
    bits: int
    sub: int
    group: int
    affine: bool = False

    def __str__(self) -> str:
        return f"n={self.n} k={self.k} {'u' if self.affine else 'i'}{self.bits}" + (
            f" g{self.group}" if self.group else ""
        )

    @property
    def unit(self) -> int:
        """Columns of a unit of bytes."""
        return self.sub * 8 // self.bits


def configuration(device: Device, problem: Problem, m: int) -> Config:
    """The configuration for m rows."""
    found = tuned(device, KERNEL, str(problem), m, lambda most: candidates(device, problem, most))
    return found or heuristic(device, problem, m)


@functools.lru_cache(maxsize=4096)
def heuristic(device: Device, problem: Problem, m: int) -> Config:
    """Without measurements."""
    if device.interpreted:
        return _config(device, problem, 32 if m > 16 else 16, 32, split=2 if problem.k > 2 * problem.unit else 1)
    shapes = [(_rows_of(m), 64)] if m <= FEW else [(64, 64), (64, 128)] if m <= 64 else _large(device, problem)
    splits = [split for split in _SPLITS if split == 1 or (m <= 512 and 4 * split <= problem.k // problem.unit)]
    options = [_config(device, problem, bm, bn, split=split) for bm, bn in shapes for split in splits]
    return min(options, key=lambda config: _cost(device, problem, m, config))


def candidates(device: Device, problem: Problem, m: int) -> list[Config]:
    """What is worth measuring for m rows, at most 20."""
    found = [heuristic(device, problem, m)]
    if m <= 64:
        for block_n, warps in ((32, 2), (64, 4), (128, 4)):
            found += [_config(device, problem, _rows_of(m), block_n, split=s, warps=warps) for s in (1, 2, 4)]
        found += [
            _config(device, problem, _rows_of(m), 64, split=s, stages=stages) for s in (1, 3) for stages in (3, 8)
        ]
    else:
        for block_m, block_n in ((64, 64), *_large(device, problem)):
            found += [_config(device, problem, block_m, block_n, stages=stages) for stages in (3, 4, 5)]
            found.append(_config(device, problem, block_m, block_n, split=2))
    return _fitting(device, problem, found)[:20]


def unsplit(device: Device, problem: Problem, m: int) -> Config:
    """A tile for about m rows of each of several weights: there are enough tiles without parts of k."""
    if m <= FEW:
        return _config(device, problem, _rows_of(m), 64)
    if problem.n % 16:  # scales are read and y is written element by element, which takes registers
        return _config(device, problem, 32, 64, stages=4)
    return _config(device, problem, *max(shape for shape in _large(device, problem) if shape[0] <= max(m, 64)))


def unsplit_candidates(device: Device, problem: Problem, m: int) -> list[Config]:
    """What is worth measuring beside `unsplit`, at most 12: tiles of the height of an expert's rows and twice that."""
    found = [unsplit(device, problem, m)]
    for block_m in sorted({_rows_of(m), _rows_of(2 * m)}):
        for block_n, stages in ((32, 4), (64, 3), (64, 5), (128, 3), (128, 4)):
            found.append(_config(device, problem, block_m, block_n, stages=stages))
    return _fitting(device, problem, found)


def _fitting(device: Device, problem: Problem, found: list[Config]) -> list[Config]:
    """Those, each once, that the memory of a processor holds."""
    return each_once([config for config in found if shared(problem, config) <= device.shared])


def _large(device: Device, problem: Problem) -> list[tuple[int, int]]:
    """(BLOCK_M, BLOCK_N) of many rows. Sums of groups take as many registers again as those across them."""
    hopper = device.from_shared
    if problem.group:
        return [(64, 128), (128, 128)] if hopper and not problem.affine and problem.bits > 2 else [(64, 128)]
    return [(64, 128), (128, 128), (256, 128)] if hopper else [(64, 128), (128, 128)]


def _cost(device: Device, problem: Problem, m: int, config: Config) -> float:
    """Bytes that the memory could move in the time of a configuration: the larger of traffic and products."""
    block_m, block_n, split = config["BLOCK_M"], config["BLOCK_N"], config["SPLIT"]
    programs = -(-m // block_m) * -(-problem.n // block_n) * split
    rounds = -(-programs // device.processors)
    share = problem.k / split * rounds * device.processors  # columns that a processor goes through, times their number
    moved = share * (block_n * problem.bits / 8 + block_m / 4)  # x comes from the L2
    resident = max(1, min(rounds, device.shared // shared(problem, config)))
    waiting = resident * (config["num_stages"] - 1) * block_n * problem.sub
    moved *= max(1.0, _IN_FLIGHT / waiting)
    products = share * block_m * block_n / 100 * (1.0 if block_m >= 128 else 1.3)
    return max(moved, products) + (split > 1) * (_SECOND_LAUNCH + 4 * split * m * problem.n)


def _rows_of(m: int) -> int:
    return max(16, min(1 << max(m - 1, 0).bit_length(), 64))


def _config(
    device: Device, problem: Problem, block_m: int, block_n: int, *, split: int = 1, stages: int = 0, warps: int = 0
) -> Config:
    wide = 64 * 128 if problem.group else 128 * 128
    warps = warps or (8 if block_m * block_n >= wide else 4)
    few = block_m * block_n <= 64 * 64  # the memory limits these, and stages of narrow groups hold little
    config = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "TILES": _TILES, "SPLIT": split, "num_warps": warps,
        "num_stages": stages or min((8 if block_m == 16 else 5) * (128 // problem.sub if few else 1), 16),
    }  # fmt: skip
    while shared(problem, config) > device.shared and config["num_stages"] > 2:
        config["num_stages"] -= 1
    return config


def shared(problem: Problem, config: Config) -> int:
    """Bytes of the operands of all stages, and of what is unpacked."""
    parts = 8 // problem.bits
    held = (config["BLOCK_N"] + parts * config["BLOCK_M"]) * problem.sub
    return held * config["num_stages"] + config["BLOCK_N"] * problem.sub * (parts if parts > 1 else 0)
