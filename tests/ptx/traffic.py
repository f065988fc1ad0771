"""What kernels move, counted while they are carried out: sectors of global memory, passes over banks of shared memory.

with traffic.counted() as found:
    some_launch(...)
print(found.table(above=1.3))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tests.ptx.parse import Program
from tests.ptx.values import Array

_SECTOR, _BANKS = 32, 32  # bytes that move at once; words of 4 bytes that are accessed at once


@dataclass(frozen=True)
class Access:
    """Of each thread its offset, its warp in the machine and its program in the launch. size: bytes, of each."""

    space: str
    offsets: Array
    size: int
    warps: Array
    programs: Array


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


class Traffic:
    """rows: by module, line and space."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, int, str], Row] = {}
        self._modules: list[Program] = []  # so that no other is taken for one of them
        self._touched: dict[str, list[tuple[Array, int]]] = {}

    def add(self, module: Program, at: int, access: Access) -> None:
        """An instruction, by its index, of one machine."""
        instruction = module.instructions[at]
        key = (id(module), instruction.line, access.space)
        if key not in self.rows:
            self._modules.append(module)
            source = module.source(instruction.line)
            self.rows[key] = Row(module.name, instruction.line, source, instruction.text, access.space)
        row = self.rows[key]
        row.executions += len(np.unique(access.warps))
        if access.space != "global":
            passes, least = _passes(access)
            row.passes, row.least = row.passes + passes, row.least + least
            return
        owner = access.warps.astype(np.int64) << 44
        row.bytes += len(np.unique(owner | access.offsets)) * access.size
        row.moved += len(np.unique(owner | access.offsets // _SECTOR)) * _SECTOR
        program = access.programs.astype(np.int64) << 44
        self._touched.setdefault(module.name, []).append((np.unique(program | access.offsets), access.size))

    def once(self, kernel: str) -> tuple[int, int]:
        """(bytes, those of their sectors) of global memory that a program of the kernel touches, summed over programs.

        What is moved to the processors where the cache there keeps what a program has read, such as the other half of
        a sector. The programs of all launches of one number count as one.
        """
        if kernel not in self._touched:
            return 0, 0
        every = [(at[:, None] + np.arange(size)).reshape(-1) for at, size in self._touched[kernel]]
        bytes_ = np.unique(np.concatenate(every))
        return len(bytes_), len(np.unique(bytes_ // _SECTOR)) * _SECTOR

    def table(self, *, above: float = 0.0) -> str:
        """Rows that waste more than `above`, those that move most first, and of each kernel what is moved once."""
        chosen = sorted((r for r in self.rows.values() if r.waste > above), key=lambda r: (-r.moved, -r.passes))
        lines = [f"{'waste':>6} {'times':>8} {'bytes':>10} {'moved':>10} {'passes':>8}  where"]
        for r in chosen:
            where = f"{r.kernel} line {r.line} ({r.source}): {r.text}"
            lines.append(f"{r.waste:6.2f} {r.executions:8} {r.bytes:10} {r.moved:10} {r.passes:8}  {where}")
        for kernel in self._touched:
            bytes_, moved = self.once(kernel)
            lines.append(f"{moved / bytes_:6.2f} {'':8} {bytes_:10} {moved:10} {'':8}  {kernel}, each program once")
        return "\n".join(lines)


_COUNTING: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """What is carried out meanwhile is counted."""
    _COUNTING.append(Traffic())
    try:
        yield _COUNTING[-1]
    finally:
        _COUNTING.pop()


def is_counting() -> bool:
    """Whether anyone wants to know."""
    return bool(_COUNTING)


def count(module: Program, at: int, access: Access) -> None:
    """An instruction accesses memory, for all who count."""
    for traffic in _COUNTING:
        traffic.add(module, at, access)


def _passes(access: Access) -> tuple[int, int]:
    """Passes over the banks, and those without a conflict: one for each 128 bytes of a warp's threads in order."""
    offsets, warps, words = access.offsets, access.warps, max(access.size // 4, 1)
    start = np.concatenate([[0], np.nonzero(np.diff(warps))[0] + 1])
    first = np.repeat(start, np.diff(np.concatenate([start, [len(warps)]])))
    part = (np.arange(len(warps)) - first) // (_BANKS // words)
    group = np.repeat(warps.astype(np.int64) * _BANKS + part, words)
    word = ((offsets // 4)[:, None] + np.arange(words)).reshape(-1)
    different = np.unique(group << 40 | word)
    groups, place = np.unique(different >> 40, return_inverse=True)
    banks = np.bincount(place * _BANKS + (different & 2**40 - 1) % _BANKS, minlength=len(groups) * _BANKS)
    return int(banks.reshape(-1, _BANKS).max(1).sum()), len(groups)
