"""Copies from global to shared memory: by threads (`cp.async`) and by descriptors (`cp.async.bulk.tensor`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.memory import FaultError
from tests.ptx.moves import names
from tests.ptx.parse import Instruction
from tests.ptx.wgmma import swizzled

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step

_WIDTHS = {0: 16, 1: 32, 2: 64, 3: 128}  # bytes that a swizzle spans, by CUtensorMapSwizzle


@dataclass(frozen=True)
class Map:
    """A matrix as the copies see it: address, bytes of a number, rows and columns, bytes between rows, and the box."""

    address: int
    size: int
    shape: tuple[int, int]
    stride: int
    box: tuple[int, int]
    swizzle: int


@dataclass
class Barrier:
    """`mbarrier`: arrivals and bytes that are awaited, and how many phases are complete."""

    count: int
    missing: int
    bytes: int = 0
    phases: int = 0

    def settle(self) -> None:
        """The next phase, where nothing is missing."""
        if not self.missing and not self.bytes:
            self.missing, self.phases = self.count, self.phases + 1


def _cp(machine: Machine, instruction: Instruction) -> Step:
    if "bulk" in instruction.op:
        return _bulk(machine, instruction)
    if instruction.op[2] in ("wait_group", "commit_group", "wait_all"):
        return lambda: None  # copies are done where they are asked for
    size = int(instruction.operands[2], 0)
    to, source = machine.address(instruction.operands[0], "u32"), machine.address(instruction.operands[1], "u64")
    taken = machine.source(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def copy() -> None:
        at, origin = machine.shared.absolute(to(), machine.places()), source()
        words = np.zeros((len(at), size // 4), np.uint32)
        if taken is None:
            words[:] = machine.memory.load(origin, 32, size // 4)
        else:
            count = machine.chosen(taken())
            if not np.isin(count, (0, size)).all():
                raise FaultError("a part of a word is copied")
            full = count == size
            words[full] = machine.memory.load(origin[full], 32, size // 4)
        machine.shared.store(at, words)

    return copy


def _bulk(machine: Machine, instruction: Instruction) -> Step:
    assert "2d" in instruction.op, instruction.text
    to, source, barrier = instruction.operands
    name, _, coordinates = source.strip("[]").partition(",")
    place, descriptor = machine.address(to, "u32"), machine.source(name.strip(), "u64")
    column, row = (machine.source(c, "s32") for c in names(coordinates.strip()))
    at_barrier = machine.address(barrier, "u32")

    def copy() -> None:
        each = zip(
            place(), machine.chosen(descriptor()), machine.chosen(row()), machine.chosen(column()), at_barrier(),
            machine.places(), strict=True,
        )  # fmt: skip
        for address, key, first, start, waits, program in each:
            _box(machine, machine.descriptors[int(key)], int(address), int(first), int(start), int(program))
            held = machine.barriers[int(program), int(waits)]
            map_ = machine.descriptors[int(key)]
            held.bytes -= map_.box[0] * map_.box[1] * map_.size
            held.settle()

    return copy


def _box(machine: Machine, map_: Map, address: int, first: int, start: int, program: int) -> None:
    """One box to shared memory; what lies beyond the matrix is zero."""
    width = _WIDTHS[map_.swizzle]
    rows, columns = np.arange(map_.box[0])[:, None], np.arange(map_.box[1])[None, :]
    if map_.box[1] * map_.size > width and map_.swizzle:
        raise FaultError(f"a box of {map_.box[1] * map_.size} bytes a row, swizzled by {width}")
    if address % (8 * width if map_.swizzle else 128):
        raise FaultError(f"a box at shared address {address:#x}")
    inside = (rows + first >= 0) & (rows + first < map_.shape[0]) & (columns + start >= 0)
    inside = inside & (columns + start < map_.shape[1])
    at = map_.address + (rows + first) * map_.stride + (columns + start) * map_.size
    words = np.zeros((*inside.shape, 1), f"u{map_.size}")
    words[inside] = machine.memory.load(at[inside].astype(np.uint64), 8 * map_.size, 1)
    to = address + rows * map_.box[1] * map_.size + columns * map_.size
    to = swizzled(to, width) if map_.swizzle else to
    machine.shared.store(to.reshape(-1) + program * machine.shared.size, words.reshape(-1, 1))


def _mbarrier(machine: Machine, instruction: Instruction) -> Step:
    how, operands = instruction.op[1], instruction.operands
    if how == "inval":
        return lambda: None
    address = machine.address(operands[1 if how in ("arrive", "try_wait") else 0], "u32")
    number = machine.source(operands[-1], "u32")
    complete = machine.sink(operands[0]) if how == "try_wait" else None

    def step() -> None:
        found = np.zeros(machine.lanes if machine.active is None else int(machine.active.sum()), bool)
        each = zip(address(), machine.chosen(number()), machine.places(), strict=True)
        for i, (at, given, program) in enumerate(each):
            key = (int(program), int(at))
            if how == "init":
                machine.barriers[key] = Barrier(int(given), int(given))
                continue
            held: Any = machine.barriers[key]
            if how == "try_wait":
                found[i] = held.phases % 2 != int(given)
                continue
            held.bytes += int(given)
            held.missing -= 1
            held.settle()
        if complete is not None:
            complete(machine.spread(found))

    return step


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"cp": _cp, "mbarrier": _mbarrier}
