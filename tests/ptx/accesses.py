"""Accesses of memory by the threads of a machine, each held against the earlier ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import traffic
from tests.ptx.clocks import Clocks
from tests.ptx.faults import FaultError
from tests.ptx.flights import Flights
from tests.ptx.parse import Instruction
from tests.ptx.parted import Parted
from tests.ptx.shared_races import SharedRaces
from tests.ptx.values import Array, bits_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

_PHASES = 16  # barriers in memory whose phases are told apart


class Accesses:
    """What the active threads of `machine` do with memory. row: a warp of the machine."""

    def __init__(self, machine: Machine, programs: Array) -> None:
        instructions = machine.program.instructions
        each = machine.threads // 32
        rows = machine.lanes // 32
        self.machine, self.rows = machine, np.arange(machine.lanes) // 32
        self.clocks = Clocks(rows, each, _PHASES if any(i.op[0] == "mbarrier" for i in instructions) else 0)
        grains = [_size(i) for i in instructions if _is_shared(i)]
        memory = machine.shared
        self.shared = SharedRaces(self.clocks, memory.size, len(memory.bytes), min([*grains, 16]), machine.line)
        self.shared.copies_fenced = machine.copies_fenced
        stored = [_size(i) for i in instructions if i.op[0] in ("st", "atom") and "global" in i.op]
        warps = np.repeat(programs * each, each) + np.arange(rows) % each
        ordered = any(i.op[0] == "atom" for i in instructions)
        total = machine.grid[0] * machine.grid[1] * machine.grid[2] * each if ordered else 0
        machine.memory.races.enter(self.clocks, warps.astype(np.int32), min([*stored, 16]), machine.line, total)
        self.copies = Flights(rows, self._landed)
        self.products = Flights(rows // 4, self._done)
        self.parted = Parted(machine)
        self.late = np.full(rows, not any(i.op[:2] == ("griddepcontrol", "wait") for i in instructions))

    def active(self) -> Array:
        """The warp of each active lane."""
        return self.rows if self.machine.active is None else self.rows[self.machine.active]

    def here(self) -> Array:
        """The warps of which lanes are active."""
        if self.machine.active is None:
            return self.clocks.row
        found: Array = np.nonzero(self.machine.active.reshape(-1, 32).any(1))[0]
        return found

    def load(
        self, space: str, at: Array, bits: int, count: int, *, strong: bool = False, rows: Array | None = None
    ) -> Array:
        """[threads, count] words at addresses; of shared memory these are those of `Shared.absolute`."""
        rows = self.active() if rows is None else rows
        size = bits // 8 * count
        self._count(space, at, size, rows)
        if space == "global":
            found = self.machine.memory.load(at, bits, count)
            self.machine.memory.races.reads(self.machine.memory.offsets(at), size, rows, strong=strong)
            return found
        found = self.machine.shared.load(at, bits, count)
        self.shared.reads(at, size, rows)
        self.parted.access(at, size, stores=False)
        return found

    def store(self, space: str, at: Array, words: Array, *, rows: Array | None = None) -> None:
        """Store [threads, count] words."""
        rows = self.active() if rows is None else rows
        size = words.itemsize * words.shape[1]
        self._count(space, at, size, rows)
        if space == "global":
            self.machine.memory.places(at, size)
            self.machine.memory.races.writes(self.machine.memory.offsets(at), words, rows)
            self.machine.memory.store(at, words)
            return
        self.machine.shared.places(at, size)
        self.shared.writes(at, size, rows)
        self.parted.access(at, size, stores=True)
        self.machine.shared.store(at, words)

    def copy(self, at: Array, words: Array) -> None:
        """A copy to shared memory is asked for: until it is waited for, there is poison."""
        rows = self.active()
        size = words.itemsize * words.shape[1]
        self._count("shared", at, size, rows)
        self.machine.shared.store(at, np.full_like(words, np.iinfo(words.dtype).max))
        self.shared.writes(at, size, rows, flying=True)
        self.copies.start(rows, at, words)

    def waited(self) -> None:
        """Active warps have waited for earlier kernels."""
        self.late[self.here()] = True

    def _count(self, space: str, at: Array, size: int, rows: Array) -> None:
        if space == "global" and not self.late[rows].all():
            raise FaultError("an access before griddepcontrol.wait: an earlier kernel may be at work")
        if traffic.is_counting() and len(at):
            programs = self.machine.memory.races.warps[rows] // self.clocks.each
            space = "global" if space == "global" else "shared"
            access = traffic.Access(space, at.astype(np.int64), size, rows, programs)
            traffic.count(self.machine.program, self.machine.at, access)

    def _landed(self, rows: Array, at: Array, words: Array) -> None:
        self.machine.shared.store(at, words)
        self.shared.landed(at, words.itemsize * words.shape[1], rows)

    def multiply(self, chunks: Array, groups: Array) -> None:
        """Products of groups of four warps read chunks of shared memory from now on until they are waited for."""
        self.shared.products_read(chunks, groups * 4)
        self.products.start(groups, chunks)

    def _done(self, groups: Array, chunks: Array) -> None:
        self.shared.products_done(groups * 4, chunks)

    def products_waited(self, groups: Array, left: int) -> None:
        """All products of groups but the last `left` have been waited for."""
        self.products.wait(groups, left)
        for flight in self.products.waiting:
            self.shared.products_still(flight.rows * 4, flight.parts[0])


def _is_shared(instruction: Instruction) -> bool:
    name, parts = instruction.op[0], instruction.op[1:]
    return name in ("cp", "mbarrier", "ldmatrix", "stmatrix") or (
        name in ("ld", "st") and any(part.startswith("shared") for part in parts)
    )


def _size(instruction: Instruction) -> int:
    """Bytes that a thread accesses."""
    name = instruction.op[0]
    if name == "cp":
        return 16 if "bulk" in instruction.op or len(instruction.operands) < 3 else int(instruction.operands[2], 0)
    if name in ("ldmatrix", "stmatrix"):
        return 16
    if name == "mbarrier":
        return 8
    vector = next((int(part[1:]) for part in instruction.op if part in ("v2", "v4", "v8")), 1)
    return vector * bits_of(instruction.op[-1]) // 8
