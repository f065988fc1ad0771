"""What the threads of a warp, or of a program, do together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.groups import ApartError
from tests.ptx.parse import Instruction
from tests.ptx.values import Array, dtype_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step


def _shfl(machine: Machine, instruction: Instruction) -> Step:
    how, operands = instruction.op[2], instruction.operands
    assert "|" not in operands[0] and operands[4] == "-1", instruction.text
    sink, value = machine.sink(operands[0]), machine.source(operands[1], "b32")
    by, bounds = machine.source(operands[2], "u32"), machine.source(operands[3], "u32")
    lane = machine.lane_ids.astype(np.int64)

    def shuffle() -> None:
        machine.together(32)
        shift, packed = by().astype(np.int64), bounds().astype(np.int64)
        clamp, segment = packed & 31, packed >> 8 & 31
        last = (lane & segment) | (clamp & ~segment & 31)
        if how == "bfly":
            other = lane ^ shift
        elif how == "up":
            other = np.where(lane - shift >= last, lane - shift, lane)
        elif how == "down":
            other = lane + shift
        else:
            other = (lane & segment) | (shift & ~segment & 31)
        if how != "up":
            other = np.where(other <= last, other, lane)
        every = np.broadcast_to(value(), (machine.lanes,)).reshape(-1, 32)
        sink(np.take_along_axis(every, other.reshape(-1, 32), 1).reshape(-1))

    return shuffle


def _redux(machine: Machine, instruction: Instruction) -> Step:
    how, kind = instruction.op[2], instruction.op[-1]
    sink, value = machine.sink(instruction.operands[0]), machine.source(instruction.operands[1], kind)
    members = machine.source(instruction.operands[2], "u32")
    limits = np.iinfo(dtype_of(kind))
    functions: dict[str, tuple[Callable[..., Array], int]] = {
        "max": (np.max, limits.min), "min": (np.min, limits.max), "add": (np.sum, 0),
    }  # fmt: skip
    function, neutral = functions[how]

    def reduce() -> None:
        machine.together(32)
        every = np.broadcast_to(value(), (machine.lanes,)).reshape(-1, 1, 32)
        of = np.broadcast_to(members(), (machine.lanes,)).reshape(-1, 32, 1) >> np.arange(32, dtype=np.uint32) & 1
        kept = np.where(of.astype(bool), every, np.asarray(neutral, every.dtype))
        sink(function(kept, axis=2).astype(every.dtype).reshape(-1))

    return reduce


def _elect(machine: Machine, instruction: Instruction) -> Step:
    leader, predicate = instruction.operands[0].split("|")
    which, elected = machine.sink(leader), machine.sink(predicate)

    def elect() -> None:
        machine.together(32)
        which(np.zeros(1, np.uint32))
        elected(machine.lane_ids == 0)

    return elect


def _bar(machine: Machine, instruction: Instruction) -> Step:
    if instruction.op[1:2] == ("warp",):

        def meet() -> None:
            machine.together(32)
            machine.accesses.parted.meet(machine.accesses.here())

        return meet
    if instruction.op[1:] not in (("sync",), ("sync", "aligned")):
        raise NotImplementedError(instruction.text)
    given = int(instruction.operands[1], 0) if len(instruction.operands) > 1 else machine.threads

    def barrier() -> None:
        machine.together(32)
        rows = machine.accesses.here().reshape(-1)
        counts = np.bincount(rows * 32 // machine.threads, minlength=machine.count) * 32
        if not np.isin(counts, (0, given)).all():
            raise ApartError
        machine.accesses.clocks.meet(rows.reshape(-1, given // 32))
        machine.accesses.parted.meet(rows)
        if given == machine.threads and len(rows) * 32 == machine.lanes:
            machine.accesses.shared.meet()

    return barrier


def _fence(machine: Machine, instruction: Instruction) -> Step:
    """That of the asynchronous proxy; others order what the machine carries out in order."""
    if instruction.op[1:3] != ("proxy", "async"):
        return _nothing(machine, instruction)
    return lambda: machine.accesses.clocks.fence(machine.accesses.here())


def _nothing(machine: Machine, instruction: Instruction) -> Step:
    return lambda: None


def _early(machine: Machine, instruction: Instruction) -> Step:
    """Of launches that begin before the kernel before has ended; here no other kernel runs."""
    assert instruction.op[1] in ("wait", "launch_dependents"), instruction.text
    return machine.accesses.waited if instruction.op[1] == "wait" else lambda: None


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "shfl": _shfl, "redux": _redux, "elect": _elect, "bar": _bar, "barrier": _bar, "fence": _fence, "membar": _nothing,
    "griddepcontrol": _early,
}  # fmt: skip
