"""Which configuration of `gemm8` runs a problem of m rows: measured ones (see `tuning`), else by a model of its cost.

Few rows: w is the left operand and streams through once, k is split until every processor has its share. Many rows:
the tile that leaves the fewest processors idle in the last round.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config
from qfx.backends.triton.tuning import tuned

KERNEL = "gemm8"
_FEW = 64  # rows up to which operands are swapped
_SPLITS = (1, 2, 3, 4, 6, 8)
_SECOND_LAUNCH = 4 << 20  # bytes that the memory moves in the time of one
_GROUP = 8


@dataclass(frozen=True)
class Problem:
    """y [m, n] of k (padded). is_float: e4m3. group: least number of k that share a scale, 0 where all do.

    by_hand: e4m3 decoded to f16.
    """

    n: int
    k: int
    is_float: bool = False
    group: int = 0
    by_hand: bool = False

    def __str__(self) -> str:
        kind = "f8e4m3" if self.is_float else "i8"
        return f"n={self.n} k={self.k} {kind}" + (f" g{self.group}" if self.group else "")


def configuration(device: Device, problem: Problem, m: int) -> Config:
    """The configuration for m rows."""
    found = tuned(device, KERNEL, str(problem), m, lambda: candidates(device, problem, m))
    return found or heuristic(device, problem, m)


def heuristic(device: Device, problem: Problem, m: int) -> Config:
    """Without measurements."""
    if device.interpreted:
        return _config(device, problem, 32 if m > 16 else 16, 32, 64, swap=m <= 16, split=2 if problem.k > 256 else 1)
    if m <= _FEW:
        return _streaming(device, problem, m)
    options = [_config(device, problem, bm, bn, split=split) for bm, bn in _tiles(problem) for split in (1, 2, 4)]
    return min(options, key=lambda config: _cost(device, problem, m, config))


def candidates(device: Device, problem: Problem, m: int) -> list[Config]:
    """What is worth measuring for m rows, at most 20."""
    found = [heuristic(device, problem, m)]
    if m <= _FEW:
        block = _rows_of(m)
        for block_n, block_k in ((64, 128), (64, 256), (128, 128)):
            found += [_config(device, problem, block, block_n, block_k, swap=True, split=s) for s in (1, 2, 4)]
        found += [_config(device, problem, block, 64, 256, swap=True, split=s, stages=6) for s in (1, 2, 3)]
    else:
        for block_m, block_n in _tiles(problem):
            found += [_config(device, problem, block_m, block_n, stages=stages) for stages in (3, 4)]
            found += [_config(device, problem, block_m, block_n, persistent=False)]
        found += [_config(device, problem, 128, 128, split=split) for split in (2, 4)]
    fitting = [config for config in found if _shared(problem, config) <= device.shared]
    return [config for i, config in enumerate(fitting) if config not in fitting[:i]][:20]


def _streaming(device: Device, problem: Problem, m: int) -> Config:
    """Few rows: the split with the least bytes, counting those that wait for the last processors."""
    block_m = _rows_of(m)
    block_n, block_k = (64, 256) if block_m == 16 else (64, 128) if block_m == 32 else (128, 128)
    tiles = triton.cdiv(problem.n, block_n)

    def cost(split: int) -> float:
        rounds = triton.cdiv(tiles * split, device.processors)
        moved = problem.n * problem.k * rounds * device.processors / (tiles * split)
        return moved + (split > 1) * (_SECOND_LAUNCH + 4 * split * m * problem.n)

    most = max(triton.cdiv(problem.k, block_k) // 4, 1)
    split = min((s for s in _SPLITS if s <= most), key=cost)
    return _config(device, problem, block_m, block_n, block_k, swap=True, split=split)


def _cost(device: Device, problem: Problem, m: int, config: Config) -> float:
    """Time of a round of tiles, in products of one processor, times their number."""
    block_m, block_n, split = config["BLOCK_M"], config["BLOCK_N"], config["SPLIT"]
    programs = triton.cdiv(m, block_m) * triton.cdiv(problem.n, block_n) * split
    worth = {128 * 256: 1.0, 128 * 128: 1.15, 64 * 128: 1.5}[block_m * block_n]  # small tiles read more for a product
    tile = block_m * block_n * problem.k / split * worth
    written = (split > 1) * (split * m * problem.n * 8 / device.processors * 64 + 8e6)
    return triton.cdiv(programs, device.processors) * tile + written


def _tiles(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Of many rows. The partial sums of e4m3 take as many registers again, so that no tile of 128 by 256 fits."""
    return ((128, 128), (64, 128)) if problem.is_float else ((128, 256), (128, 128), (64, 128))


def _rows_of(m: int) -> int:
    return max(16, triton.next_power_of_2(m))


def _config(
    device: Device, problem: Problem, block_m: int, block_n: int, block_k: int = 128, *, swap: bool = False,
    split: int = 1, stages: int = 4, persistent: bool = True,
) -> Config:  # fmt: skip
    if problem.group:
        block_k = min(block_k, problem.group, 128)
    if problem.by_hand and not device.interpreted:
        block_k = min(block_k, 64)  # f16 operands are twice as large
    config = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": _GROUP, "SPLIT": split, "SWAP": int(swap),
        "PERSISTENT": int(persistent and not swap and split == 1),
        "num_warps": 8 if block_m * block_n >= 128 * 128 else 4, "num_stages": stages,
    }  # fmt: skip
    while _shared(problem, config) > device.shared and config["num_stages"] > 2:
        config["num_stages"] -= 1
    return config


def _shared(problem: Problem, config: Config) -> int:
    """Bytes of the operands of all stages, and the tile that goes through it to memory."""
    operands = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * config["num_stages"]
    decoded = 2 * (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] if problem.by_hand else 0
    tile = config["BLOCK_M"] * config["BLOCK_N"] * 4 if config["PERSISTENT"] else 0
    return operands + max(decoded, tile // 2)
