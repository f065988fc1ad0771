"""Which configuration of `gemm8` runs a problem of m rows: measured ones (see `tuning`), else by a model of its cost.

Few rows: w is the left operand and streams through once, k is split until every processor has its share. Many rows:
the tile that leaves the fewest processors idle in the last round. A configuration {"LIBRARY": 1} leaves the product
to cuBLAS, and only what follows it to a kernel: one of the candidates for many rows, never the heuristic's.

{"DESCRIPTORS": 1, ...} reads operands by tensor descriptors (see `kernels.gemm8_described`): candidates from 1024 rows
on, never the heuristic's, since no GPU has measured it. Compiled code for capability 9.0 (Triton 3.9, tiles of 128 x
256) shows for int8: a step of k asks for its 48 KB by 2 instructions of one thread instead of 12 of each of 256, all of
them between the end of a product and the begin of the next, and a thread needs 177 registers instead of 242. What it
does not change: a product of int8 ends before the next begins ("wgmma.wait_group 0"), since Triton (3.6 to 3.9) lets
products of a loop overlap only where sums are f32, and so does one of 128 of k of e4m3, whose sums are added to f32
then. Without that ("PROMOTE": 0, which only examples/benchmarks/gpu_kernels.py measures) e4m3 keeps one in flight.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from qfx.backends.triton.descriptors import has_descriptors
from qfx.backends.triton.device import Device
from qfx.backends.triton.launch import Config, each_once
from qfx.backends.triton.tuning import tuned

KERNEL = "gemm8"
_FEW = 64  # rows up to which operands are swapped
_MANY = 1024  # rows from which descriptors are worth a measurement
_SPLITS = (1, 2, 3, 4, 6, 8)
_SECOND_LAUNCH = 4 << 20  # bytes that the memory moves in the time of one
_PRODUCTS = 200  # of a processor in the time in which its share of the bandwidth moves a byte
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

    @property
    def aligned(self) -> bool:
        """Rows of y are written in whole vectors. Element by element it takes twice the registers."""
        return self.n % 16 == 0

    def __str__(self) -> str:
        kind = "f8e4m3" if self.is_float else "i8"
        return f"n={self.n} k={self.k} {kind}" + (f" g{self.group}" if self.group else "")


def configuration(device: Device, problem: Problem, m: int) -> Config:
    """The configuration for m rows."""
    found = tuned(device, KERNEL, str(problem), m, lambda most: candidates(device, problem, most))
    return found or heuristic(device, problem, m)


@functools.lru_cache(maxsize=4096)
def heuristic(device: Device, problem: Problem, m: int) -> Config:
    """Without measurements: by pointers, also from 1024 rows on with capability 9.0, until descriptors are measured."""
    if device.interpreted:
        return _config(device, problem, (64 if m > 16 else 16, 64, 1), swap=m <= 16, split=2 if problem.k > 256 else 1)
    if m <= _FEW:
        return _streaming(device, problem, m)
    options = [_config(device, problem, tile, split=split) for tile in _tiles(device, problem) for split in (1, 2, 4)]
    return min(options, key=lambda config: _cost(device, problem, m, config))


def candidates(device: Device, problem: Problem, m: int) -> list[Config]:
    """What is worth measuring for m rows, at most 20."""
    found = [heuristic(device, problem, m)]
    if m <= _FEW:
        rows, shapes = _rows_of(m), [(64, 128, 6), (64, 256, 4), (64, 256, 6), (64, 512, 4), (128, 128, 4)]
        if _narrow(device, problem, rows):
            shapes.append((32, 256, 6))
        for columns, block_k, stages in shapes:
            found += [
                _config(device, problem, (rows, columns, 1), block_k, swap=True, split=split, stages=stages)
                for split in (1, 2, 4)
            ]
    else:
        ahead = described(device, problem, m)
        found += ahead
        for tile in _tiles(device, problem):
            found += [_config(device, problem, tile, stages=stages) for stages in (3, 4)]
            found += [_config(device, problem, tile, stages=stages, persistent=False) for stages in (3, 4)]
            if not ahead:  # two stages copy nothing while the only program of a processor multiplies
                found += [_config(device, problem, tile, 256, stages=2)]
        found += [_config(device, problem, (128, 128, 1), split=split) for split in (2, 4)]
        if problem.aligned and not problem.group and not problem.by_hand:
            found.append({"LIBRARY": 1})
    return _fitting(device, problem, found)[:20]


def described(device: Device, problem: Problem, m: int, *, promoted: bool = True) -> list[Config]:
    """Forms with tensor descriptors that are worth measuring for m rows, at most 4.

    promoted: sums of e4m3 go to f32 every 128 of k, as in every other form.
    """
    if m < _MANY or not has_descriptors(device) or device.interpreted or not problem.aligned:
        return []
    if problem.is_float and not promoted:
        forms = [_described(problem, (128, 256, 1), stages=stages, promote=0) for stages in (4, 3)]
    elif problem.group:
        forms = [_described(problem, (128, 128, 1), stages=stages) for stages in (4, 3)]
    elif problem.is_float:
        forms = [_described(problem, (128, 128, 2), stages=stages) for stages in (4, 3)]
        forms.append(_described(problem, (128, 128, 1)))
    else:
        forms = [_described(problem, (128, 256, 1), stages=stages) for stages in (4, 3)]
        # two programs on a processor: one multiplies while the other waits for its sums
        forms += [_described(problem, (128, 128, 1), warps=4, stages=3, programs=programs) for programs in (2, 0)]
    return _fitting(device, problem, forms)


def unsplit(device: Device, problem: Problem, m: int) -> Config:
    """A tile for about m rows of each of several weights: there are enough tiles without parts of k."""
    if m <= _FEW:
        rows = _rows_of(m)
        columns, block_k = (64, 256) if rows == 16 else (64, 128) if rows == 32 else (128, 128)
        return _config(device, problem, (rows, columns, 1), block_k, swap=True)
    return _config(device, problem, (128 if m > 96 else 64, 128, 1), persistent=False)


def unsplit_candidates(device: Device, problem: Problem, m: int) -> list[Config]:
    """What is worth measuring beside `unsplit`, at most 12."""
    found = [unsplit(device, problem, m)]
    if m <= _FEW:
        for rows in sorted({_rows_of(m), min(_rows_of(2 * m), 64)}):
            for columns, block_k, stages in ((64, 128, 4), (64, 128, 6), (64, 256, 4), (128, 128, 3), (128, 128, 4)):
                found.append(_config(device, problem, (rows, columns, 1), block_k, swap=True, stages=stages))
    else:
        tiles = itertools.product((64, 128), (2, 3, 4))
        found += [_config(device, problem, (rows, 128, 1), stages=s, persistent=False) for rows, s in tiles]
    return _fitting(device, problem, found)


def _fitting(device: Device, problem: Problem, found: list[Config]) -> list[Config]:
    """Those, each once, that the memory of a processor holds."""
    return each_once([c for c in found if "LIBRARY" in c or _shared(problem, c) <= device.shared])


def _streaming(device: Device, problem: Problem, m: int) -> Config:
    """Few rows: the tiles and the split with the least bytes, counting those that wait for the last processors."""
    rows = _rows_of(m)
    shapes = [(64, 256) if rows == 16 else (64, 128) if rows == 32 else (128, 128)]
    if _narrow(device, problem, rows):
        shapes.append((32, 256))

    def cost(choice: tuple[tuple[int, int], int]) -> float:
        (columns, _), split = choice
        programs = _count(problem.n, columns) * split
        waiting = _count(programs, device.processors) * device.processors / programs
        moved = problem.n * problem.k * waiting * (1 + rows / columns / 10)  # x is read again, from the L2
        return moved + (split > 1) * (_SECOND_LAUNCH + 6 * split * m * problem.n)

    choices = [(shape, split) for shape in shapes for split in _SPLITS if split <= max(problem.k // shape[1] // 4, 1)]
    (columns, block_k), split = min(choices, key=cost)
    # a program that has a processor alone has to keep all of its reads in flight
    stages = 6 if _count(problem.n, columns) * split <= device.processors else 4
    return _config(device, problem, (rows, columns, 1), block_k, swap=True, split=split, stages=stages)


def _narrow(device: Device, problem: Problem, rows: int) -> bool:
    """Whether tiles of 32 columns are worth it: for few rows; not for e4m3, which stays as it is only from 64 on."""
    return rows == 16 and (problem.by_hand or not (problem.is_float and _large(device)))


def _cost(device: Device, problem: Problem, m: int, config: Config) -> float:
    """Time, in products of one processor: of its tiles or of reading w, whichever is longer, and of a second launch."""
    rows, columns, split = config["BLOCK_M"], config["BLOCK_N"] * config["HALVES"], config["SPLIT"]
    programs = _count(m, rows) * _count(problem.n, columns) * split
    worth = {128 * 256: 1.0, 128 * 128: 1.15, 64 * 128: 1.5}[rows * columns]  # small tiles read more for a product
    tiles = _count(programs, device.processors) * rows * columns * problem.k / split * worth
    read = problem.n * problem.k * _PRODUCTS / device.processors
    written = (split > 1) * (4 * split * m * problem.n + _SECOND_LAUNCH) * _PRODUCTS / device.processors
    return max(tiles, read) + written


def _tiles(device: Device, problem: Problem) -> tuple[tuple[int, int, int], ...]:
    """Of many rows: rows, columns, and how many times these.

    The greatest is the one that reads least for a product. e4m3 has it in halves: the partial sums, which are added to
    those of all k, take as many registers again, and each half needs them only for a while.
    """
    small = ((128, 128, 1), (64, 128, 1))
    if problem.group or not problem.aligned or not _large(device):
        return small
    return ((128, 128, 2) if problem.is_float else (128, 256, 1), *small)


def _large(device: Device) -> bool:
    """Whether the tensor cores read their operands from shared memory (wgmma), not from registers."""
    return device.from_shared


def _count(size: int, block: int) -> int:
    """Blocks that hold `size`."""
    return -(-size // block)


def _rows_of(m: int) -> int:
    return max(16, 1 << (m - 1).bit_length()) if m else 16


def _config(
    device: Device, problem: Problem, tile: tuple[int, int, int], block_k: int = 128, *, swap: bool = False,
    split: int = 1, stages: int = 4, persistent: bool = True,
) -> Config:  # fmt: skip
    rows, columns, halves = tile
    if problem.group:
        block_k = min(block_k, problem.group, 128)
    if not device.interpreted and not _large(device) and (problem.by_hand or not swap):
        block_k = min(block_k, 64)  # fragments of more do not fit the registers
    config = {
        "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": block_k, "HALVES": halves, "GROUP": _GROUP, "SPLIT": split,
        "SWAP": int(swap),
        "PERSISTENT": int(persistent and problem.aligned and _large(device) and not swap and split == 1),
        "num_warps": 8 if rows * columns >= 128 * 128 else 4, "num_stages": stages,
    }  # fmt: skip
    while _shared(problem, config) > device.shared and config["num_stages"] > 2:
        config["num_stages"] -= 1
    return config


def _described(
    problem: Problem, tile: tuple[int, int, int], *, warps: int = 8, stages: int = 4, programs: int = 1,
    promote: int = 128,
) -> Config:  # fmt: skip
    """programs: of a processor, each for many tiles; 0: one for each tile."""
    rows, columns, halves = tile
    return {
        "DESCRIPTORS": 1, "BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": min(128, problem.group or 128),
        "HALVES": halves, "GROUP": _GROUP, "PERSISTENT": programs, "PROMOTE": promote, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def _shared(problem: Problem, config: Config) -> int:
    """Bytes of the operands of all stages, decoded ones, and what goes to memory while the next tile is read."""
    both = (config["BLOCK_M"] + config["BLOCK_N"] * config["HALVES"]) * config["BLOCK_K"]
    ended = config["BLOCK_M"] * 64 * 4 if config["PERSISTENT"] else 0
    return both * (config["num_stages"] + 2 * problem.by_hand) + ended
