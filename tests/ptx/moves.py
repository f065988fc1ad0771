"""Moving words: between registers, from and to memory, by choice, by bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import FaultError
from tests.ptx.parse import Instruction
from tests.ptx.values import WORDS, Array, bits_of, dtype_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step


def names(operand: str) -> list[str]:
    """The registers of {a, b} or of a."""
    return [name.strip() for name in operand.strip("{}").split(",")]


def _mov(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    to, source = instruction.operands
    if to.startswith("{"):
        value, sinks = machine.source(source, kind), [machine.sink(name) for name in names(to)]
        part = WORDS[bits_of(kind) // len(sinks)]

        def split() -> None:
            every = np.ascontiguousarray(value()).view(part).reshape(-1, len(sinks))
            for i, sink in enumerate(sinks):
                sink(every[:, i].copy())

        return split
    if source.startswith("{"):
        bits = bits_of(kind) // len(names(source))
        parts, sink = [machine.source(name, f"b{bits}") for name in names(source)], machine.sink(to)
        whole = WORDS[bits_of(kind)]
        return lambda: sink(np.stack(np.broadcast_arrays(*(p() for p in parts)), -1).view(whole).reshape(-1))
    if kind != "pred" and source.startswith("%") and source not in machine.names:
        kind = "u32"  # a special register
    value, sink = machine.source(source, kind), machine.sink(to)
    return lambda: sink(value())


def _cvta(machine: Machine, instruction: Instruction) -> Step:
    """An address as one of another space: all lie in one here."""
    value, sink = machine.source(instruction.operands[1], "u64"), machine.sink(instruction.operands[0])
    return lambda: sink(value())


def _selp(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    sink = machine.sink(instruction.operands[0])
    a, b = (machine.source(operand, kind) for operand in instruction.operands[1:3])
    which = machine.source(instruction.operands[3], "pred")
    return lambda: sink(np.where(which(), a(), b()))


def _ld(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    strong = instruction.op[1] in ("volatile", "relaxed", "acquire")
    space = instruction.op[2 if instruction.op[1] == "volatile" else 3 if strong else 1]  # after the scope
    sinks = [machine.sink(name) for name in names(instruction.operands[0])]
    if space == "param":
        name, _, offset = instruction.operands[1].strip("[]").partition("+")
        held = machine.params[name][int(offset or "0") :][: bits_of(kind) // 8]
        fixed = np.frombuffer(held, dtype_of(kind))
        (only,) = sinks
        return lambda: only(fixed)
    address = machine.address(instruction.operands[1], "u64" if space == "global" else "u32")

    def load() -> None:
        at = address()
        if space != "global":
            at = machine.shared.absolute(at, machine.places())
        words = machine.accesses.load(space, at, bits_of(kind), len(sinks), strong=strong).view(dtype_of(kind))
        for i, sink in enumerate(sinks):
            sink(machine.spread(words[:, i].copy()))

    return load


def _st(machine: Machine, instruction: Instruction) -> Step:
    kind, space = instruction.op[-1], instruction.op[1]
    if space == "param":
        return lambda: None  # what a call is given; the calls there are read the module's texts
    values = [machine.source(name, f"b{bits_of(kind)}") for name in names(instruction.operands[1])]
    address = machine.address(instruction.operands[0], "u64" if space == "global" else "u32")

    def store() -> None:
        at = address()
        if space != "global":
            at = machine.shared.absolute(at, machine.places())
        machine.accesses.store(space, at, np.stack([machine.chosen(value()) for value in values], -1))

    return store


def _atom(machine: Machine, instruction: Instruction) -> Step:
    assert "add" in instruction.op and "global" in instruction.op, instruction.text
    kind = instruction.op[-1]
    sink, address = machine.sink(instruction.operands[0]), machine.address(instruction.operands[1], "u64")
    value = machine.source(instruction.operands[2], kind)

    def add() -> None:
        before = []
        rows = machine.accesses.active()
        for at, more, row in zip(address(), machine.chosen(value()), rows, strict=True):
            place = np.asarray([at])
            now = machine.memory.load(place, bits_of(kind), 1)
            before.append(now[0, 0])
            races = machine.memory.races
            races.writes(machine.memory.offsets(place), now + more, np.asarray([row]), atomic=True)
            machine.memory.store(place, now + more)
            if "acq_rel" in instruction.op:
                races.meet_at(int(at), int(row))
        sink(machine.spread(np.asarray(before)))

    return add


def _call(machine: Machine, instruction: Instruction) -> Step:
    assert instruction.op == ("trap",) or instruction.operands[0] == "__assertfail", instruction.text
    said = [text for name, text in machine.program.texts.items() if name.startswith("assertMessage")]

    def fail() -> None:
        raise FaultError(f"the kernel asserts: {' or '.join(said)}")

    return fail


def _prmt(machine: Machine, instruction: Instruction) -> Step:
    assert instruction.op == ("prmt", "b32"), instruction.text
    sink = machine.sink(instruction.operands[0])
    a, b, selector = (machine.source(operand, "u32") for operand in instruction.operands[1:])

    def permute() -> None:
        both = a().astype(np.uint64) | b().astype(np.uint64) << np.uint64(32)
        choice, found = selector(), np.zeros(1, np.uint32)
        for i in range(4):
            pick = choice >> np.uint32(4 * i) & np.uint32(15)
            byte = (both >> (pick.astype(np.uint64) & np.uint64(7)) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            found = found | np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * i)
        sink(found)

    return permute


def _shf(machine: Machine, instruction: Instruction) -> Step:
    """Shift of two words as one: the upper word of what goes left, the lower one of what goes right."""
    _, to, how, kind = instruction.op
    assert kind == "b32", instruction.text
    sink = machine.sink(instruction.operands[0])
    low, high, by = (machine.source(operand, "u32") for operand in instruction.operands[1:])

    def shift() -> None:
        count = by() & np.uint32(31) if how == "wrap" else np.minimum(by(), 32)
        both = low().astype(np.uint64) | high().astype(np.uint64) << np.uint64(32)
        wide = count.astype(np.uint64)
        found = both << wide >> np.uint64(32) if to == "l" else both >> wide
        sink((found & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    return shift


def _lop3(machine: Machine, instruction: Instruction) -> Step:
    assert instruction.op == ("lop3", "b32"), instruction.text
    sink, table = machine.sink(instruction.operands[0]), int(instruction.operands[4], 0)
    a, b, c = (machine.source(operand, "u32") for operand in instruction.operands[1:4])

    def look_up() -> None:
        given: list[Array] = [a(), b(), c()]
        found = np.zeros(1, np.uint32)
        for row in range(8):
            if table >> row & 1:
                on = [x if row >> 2 - i & 1 else ~x for i, x in enumerate(given)]
                found = found | (on[0] & on[1] & on[2])
        sink(found)

    return look_up


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "mov": _mov, "cvta": _cvta, "selp": _selp, "ld": _ld, "st": _st, "atom": _atom, "call": _call, "trap": _call,
    "prmt": _prmt, "shf": _shf, "lop3": _lop3,
}  # fmt: skip
