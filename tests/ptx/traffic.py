"""What kernels move, counted while they are carried out: sectors of global memory, passes over banks of shared memory.

with traffic.counted() as rows:
    some_launch(...)
print(traffic.table(rows.values()))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tests.ptx.parse import Program
from tests.ptx.values import Array

_SECTOR, _BANKS = 32, 32  # bytes that move at once; words of 4 bytes that are accessed at once
Rows = dict[tuple[int, int, str], "Row"]


@dataclass
class Row:
    """An instruction and what it did in all programs with one space of memory.

    executions: by warps. bytes: those of different addresses that each of these asked for. moved: the bytes of the
    sectors that they lie in. passes: over the banks of shared memory; least: what it would take without a conflict.
    """

    kernel: str
    line: int
    source: str
    text: str
    space: str
    executions: int = 0
    bytes: int = 0
    moved: int = 0
    passes: int = 0
    least: int = 0

    @property
    def waste(self) -> float:
        """How many times what is needed: of bytes in global memory, of passes in shared memory."""
        return self.moved / self.bytes if self.moved else self.passes / max(self.least, 1)


_COUNTING: list[Rows] = []


@contextmanager
def counted() -> Iterator[Rows]:
    """What is carried out meanwhile is counted: rows by program, line and space."""
    rows: Rows = {}
    _COUNTING.append(rows)
    try:
        yield rows
    finally:
        _COUNTING.pop()


def is_counting() -> bool:
    """Whether anyone wants to know."""
    return bool(_COUNTING)


def count(program: Program, at: int, space: str, offsets: Array, size: int, warps: Array) -> None:
    """An instruction, by its index: threads of `warps` access `size` bytes at offsets."""
    for rows in _COUNTING:
        instruction = program.instructions[at]
        key = (id(program), instruction.line, space)
        if key not in rows:
            source = program.source(instruction.line)
            rows[key] = Row(program.name, instruction.line, source, instruction.text, space)
        row = rows[key]
        row.executions += len(np.unique(warps))
        if space == "global":
            owner = warps.astype(np.int64) << 44
            row.bytes += len(np.unique(owner | offsets)) * size
            row.moved += len(np.unique(owner | offsets // _SECTOR)) * _SECTOR
        else:
            passes, least = _passes(offsets, size, warps)
            row.passes, row.least = row.passes + passes, row.least + least


def table(rows: Iterable[Row], *, above: float = 0.0) -> str:
    """Rows that waste more than `above`, those that move most first."""
    chosen = sorted((r for r in rows if r.waste > above), key=lambda r: (-r.moved, -r.passes))
    lines = [f"{'waste':>6} {'times':>8} {'bytes':>10} {'moved':>10} {'passes':>8}  where"]
    for r in chosen:
        where = f"{r.kernel} line {r.line} ({r.source}): {r.text}"
        lines.append(f"{r.waste:6.2f} {r.executions:8} {r.bytes:10} {r.moved:10} {r.passes:8}  {where}")
    return "\n".join(lines)


def _passes(offsets: Array, size: int, warps: Array) -> tuple[int, int]:
    """Passes over the banks, and those without a conflict: one for each 128 bytes of a warp's threads in order."""
    words = max(size // 4, 1)
    start = np.concatenate([[0], np.nonzero(np.diff(warps))[0] + 1])
    first = np.repeat(start, np.diff(np.concatenate([start, [len(warps)]])))
    part = (np.arange(len(warps)) - first) // (_BANKS // words)
    group = np.repeat(warps.astype(np.int64) * _BANKS + part, words)
    word = ((offsets // 4)[:, None] + np.arange(words)).reshape(-1)
    different = np.unique(group << 40 | word)
    groups, place = np.unique(different >> 40, return_inverse=True)
    banks = np.bincount(place * _BANKS + (different & 2**40 - 1) % _BANKS, minlength=len(groups) * _BANKS)
    return int(banks.reshape(-1, _BANKS).max(1).sum()), len(groups)
