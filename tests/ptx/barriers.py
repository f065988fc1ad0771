"""Barriers in shared memory (`mbarrier`): arrivals, bytes of copies, and who waits for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import FaultError
from tests.ptx.parse import Instruction
from tests.ptx.values import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step


@dataclass
class Barrier:
    """count: arrivals of a phase. missing, bytes: what is awaited in this one. phases: how many are complete.

    unit: which of the program's barriers it is. before: phases of those that lay at its address. copies: the bytes of
    each that is under way, and what lets it land. told: what those that arrived tell, of this phase and the complete.
    """

    count: int
    unit: int
    before: int
    missing: int = 0
    bytes: int = 0
    phases: int = 0
    copies: list[tuple[int, Callable[[int], None]]] = field(default_factory=list)
    told: list[Array] = field(default_factory=list)
    complete: list[Array] = field(default_factory=list)

    def settle(self) -> None:
        """The next phase, where no arrival is missing and all bytes are under way: they land now."""
        if self.missing or self.bytes != sum(size for size, _ in self.copies):
            return
        self.missing, self.bytes, self.phases = self.count, 0, self.phases + 1
        for _, land in self.copies:
            land(self.before + self.phases)
        self.complete += self.told
        self.copies, self.told = [], []


class Barriers:
    """Those of the programs of a machine, by program and address."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.held: dict[tuple[int, int], Barrier] = {}
        self.units: dict[int, int] = {}

    def begin(self, program: int, address: int, count: int, row: int) -> None:
        """`init`: a write of the barrier's 8 bytes."""
        unit = self.units.setdefault(address, len(self.units))
        if unit >= self.machine.accesses.clocks.seen.shape[1] - self.machine.accesses.clocks.each:
            raise NotImplementedError("so many barriers in memory")
        earlier = self.held.get((program, address))
        before = earlier.before + earlier.phases if earlier is not None else 0
        self._touch(program, address, np.asarray([row]), stores=True)
        self.held[program, address] = Barrier(count, unit, before, count)

    def end(self, program: int, address: int, row: int) -> None:
        """`inval`: its memory may be used for other things."""
        held = self.of(program, address, np.asarray([row]))
        if held.copies:
            raise FaultError(f"a barrier at shared address {address:#x} ends while copies are under way")
        self._touch(program, address, np.asarray([row]), stores=True)

    def of(self, program: int, address: int, rows: Array) -> Barrier:
        """One that warps use."""
        if (program, address) not in self.held:
            raise FaultError(f"no barrier at shared address {address:#x}")
        self._touch(program, address, rows, stores=False)
        return self.held[program, address]

    def arrive(self, program: int, address: int, row: int, more: int) -> None:
        """A thread of a warp arrives; `more` bytes of copies are awaited."""
        held = self.of(program, address, np.asarray([row]))
        if not held.missing:
            raise FaultError(f"more than {held.count} arrivals at the barrier at shared address {address:#x}")
        held.told.append(self.machine.accesses.clocks.release(row))
        held.bytes += more
        held.missing -= 1

    def is_past(self, program: int, address: int, rows: Array, parity: int) -> bool:
        """Whether the phase of a parity is complete, from which the warps learn."""
        held = self.of(program, address, rows)
        held.settle()
        if held.phases % 2 == parity:
            return False
        clocks = self.machine.accesses.clocks
        column = clocks.each + held.unit
        clocks.seen[rows, column] = np.maximum(clocks.seen[rows, column], held.before + held.phases)
        for told in held.complete:
            clocks.acquire(rows, told)
        held.complete = held.complete[-held.count :]
        return True

    def check_end(self) -> None:
        """Raises FaultError where programs end before copies to their memory."""
        for (program, address), held in self.held.items():
            if held.copies:
                raise FaultError(
                    f"program {program} of those at once ends while copies for the barrier at shared address "
                    f"{address:#x} are under way"
                )

    def _touch(self, program: int, address: int, rows: Array, *, stores: bool) -> None:
        at = np.full(len(rows), address + program * self.machine.shared.size)
        self.machine.shared.places(at, 8)
        races = self.machine.accesses.shared
        (races.writes if stores else races.reads)(at, 8, rows)


def _mbarrier(machine: Machine, instruction: Instruction) -> Step:
    how, operands = instruction.op[1], instruction.operands
    address = machine.address(operands[1 if how in ("arrive", "try_wait") else 0], "u32")
    if how == "try_wait":
        return _try_wait(machine, instruction)
    if how not in ("init", "inval") and instruction.op[:3] != ("mbarrier", "arrive", "expect_tx"):
        raise NotImplementedError(instruction.text)
    number = machine.source(operands[-1] if how != "inval" else "0", "u32")

    def step() -> None:
        each = zip(address(), machine.chosen(number()), machine.places(), machine.accesses.active(), strict=True)
        for at, given, program, row in each:
            if how == "init":
                machine.barriers.begin(int(program), int(at), int(given), int(row))
            elif how == "inval":
                machine.barriers.end(int(program), int(at), int(row))
            else:
                machine.barriers.arrive(int(program), int(at), int(row), int(given))

    return step


def _try_wait(machine: Machine, instruction: Instruction) -> Step:
    complete, parity = machine.sink(instruction.operands[0]), machine.source(instruction.operands[2], "u32")
    address = machine.address(instruction.operands[1], "u32")

    def step() -> None:
        machine.together(32)
        at, given = address().astype(np.int64), machine.chosen(parity()).astype(np.int64)
        program = machine.places()
        keys, which = np.unique(program << 32 | at << 1 | given, return_inverse=True)
        rows, found = machine.accesses.active(), np.zeros(len(keys), bool)
        for i, key in enumerate(keys):
            waiting = np.unique(rows[which == i])
            found[i] = machine.barriers.is_past(int(key) >> 32, int(key) >> 1 & 2**31 - 1, waiting, int(key) & 1)
        complete(machine.spread(found[which]))

    return step


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"mbarrier": _mbarrier}
