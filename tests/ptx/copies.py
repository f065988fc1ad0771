"""Copies from global to shared memory: by threads (`cp.async`) and by descriptors (`cp.async.bulk.tensor`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.barriers import Barrier
from tests.ptx.faults import FaultError
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


def _cp(machine: Machine, instruction: Instruction) -> Step:
    if "bulk" in instruction.op:
        return _bulk(machine, instruction)
    if instruction.op[2] in ("wait_group", "commit_group", "wait_all"):
        return _grouped(machine, instruction)
    size = int(instruction.operands[2], 0)
    to, source = machine.address(instruction.operands[0], "u32"), machine.address(instruction.operands[1], "u64")
    taken = machine.source(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None

    def copy() -> None:
        at, origin = machine.shared.absolute(to(), machine.places()), source()
        words, full = np.zeros((len(at), size // 4), np.uint32), np.ones(len(at), bool)
        if taken is not None:
            count = machine.chosen(taken())
            if not np.isin(count, (0, size)).all():
                raise FaultError("a part of a word is copied")
            full = np.asarray(count == size)
        rows = machine.accesses.active()[full]
        words[full] = machine.accesses.load("global", origin[full], 32, size // 4, rows=rows)
        machine.accesses.copy(at, words)

    return copy


def _grouped(machine: Machine, instruction: Instruction) -> Step:
    """`commit_group`, `wait_group` and `wait_all`; threads of a warp do it together."""
    copies, how = machine.accesses.copies, instruction.op[2]
    left = int(instruction.operands[0], 0) if how == "wait_group" else 0

    def step() -> None:
        machine.together(32)
        rows = machine.accesses.here()
        if how != "wait_group":
            copies.commit(rows)
        if how != "commit_group":
            copies.wait(rows, left)

    return step


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
            machine.places(), machine.accesses.active(), strict=True,
        )  # fmt: skip
        for address, key, first, start, waits, program, warp in each:
            barrier = machine.barriers.of(int(program), int(waits), np.asarray([warp]))
            where = (int(address), int(first), int(start), int(program))
            _box(machine, machine.descriptors[int(key)], where, barrier, int(warp))

    return copy


def _box(machine: Machine, map_: Map, where: tuple[int, int, int, int], barrier: Barrier, warp: int) -> None:
    """One box to shared memory; what lies beyond the matrix is zero. It is there when its barrier is waited for."""
    address, first, start, program = where
    width = _WIDTHS[map_.swizzle]
    rows, columns = np.arange(map_.box[0])[:, None], np.arange(map_.box[1])[None, :]
    if map_.box[1] * map_.size > width and map_.swizzle:
        raise FaultError(f"a box of {map_.box[1] * map_.size} bytes a row, swizzled by {width}")
    if address % (8 * width if map_.swizzle else 128):
        raise FaultError(f"a box at shared address {address:#x}")
    inside = (rows + first >= 0) & (rows + first < map_.shape[0]) & (columns + start >= 0)
    inside = inside & (columns + start < map_.shape[1])
    at = map_.address + (rows + first) * map_.stride + (columns + start) * map_.size
    words = np.zeros((inside.size, 1), f"u{map_.size}")
    words[inside.reshape(-1)] = machine.accesses.load(
        "global", at[inside].astype(np.uint64), 8 * map_.size, 1, rows=np.full(int(inside.sum()), warp)
    )
    to = address + rows * map_.box[1] * map_.size + columns * map_.size
    to = (swizzled(to, width) if map_.swizzle else to).reshape(-1) + program * machine.shared.size
    chunks = np.unique(to // 16) * 16
    races = machine.accesses.shared
    races.boxed(chunks, warp, unit=barrier.unit)
    machine.shared.store(to, np.full_like(words, np.iinfo(words.dtype).max))

    def land(phase: int) -> None:
        machine.shared.store(to, words)
        races.boxed(chunks, warp, unit=barrier.unit, phase=phase)

    barrier.copies.append((words.size * map_.size, land))


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"cp": _cp}
