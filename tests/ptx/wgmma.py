"""`wgmma`: products of four warps, of which operands lie in shared memory, told by descriptors of 64 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import FaultError
from tests.ptx.matrices import COLUMN, ROW, added, bits_of_operand, left_operand, numbers
from tests.ptx.moves import names
from tests.ptx.parse import Instruction
from tests.ptx.values import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step

_SHAPE = re.compile(r"m64n(\d+)k(\d+)")
_NONE = 2**64 - 1
_WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}  # bytes that a swizzle spans


def swizzled(address: Array, width: int) -> Array:
    """Addresses with the bits of 16 bytes exchanged by those of the row: patterns of 8 rows of `width` bytes."""
    found: Array = address ^ (address >> 3 & (width - 16))
    return found


def _offsets(descriptor: int, outer: int, k: int, bits: int, along_k: bool) -> Array:
    """[outer, k] addresses of an operand's numbers: `outer` is m or n. along_k: numbers of a row lie side by side."""
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    width = _WIDTHS[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise FaultError("a base offset")
    row, column = np.arange(outer)[:, None], np.arange(k)[None, :]
    if along_k:
        inside = column * bits // 8
        if width == 16:  # core matrices of 8 rows of 16 bytes
            return start + row % 8 * 16 + row // 8 * stride + inside // 16 * leading + inside % 16
        return swizzled(start + row % 8 * width + row // 8 * stride + inside, width)
    inside = row * bits // 8
    if width == 16:
        return start + inside % 16 + column % 8 * 16 + inside // 16 * stride + column // 8 * leading
    across = inside % width + inside // width * leading
    return swizzled(start + across + column % 8 * width + column // 8 * stride, width)


@lru_cache(maxsize=1024)
def _places(descriptors: tuple[int, ...], outer: int, k: int, bits: int, along_k: bool) -> tuple[Array, Array]:
    """(offsets of an operand's numbers [groups, outer, k], of its 16 bytes [groups, chunks])."""
    each = {d: _offsets(d, outer, k, bits, along_k) for d in descriptors}
    chunks = {d: np.unique(at // 16) for d, at in each.items()}
    return np.stack([each[d] for d in descriptors]), np.stack([chunks[d] for d in descriptors])


def _operand(machine: Machine, descriptors: Array, outer: int, k: int, kind: str, along_k: bool) -> Array:
    """[groups, outer, k] numbers of an operand in shared memory; descriptor -1: of a group that takes no part."""
    bits = bits_of_operand(kind)
    (groups,) = np.nonzero(descriptors != _NONE)
    at, chunks = _places(tuple(int(d) for d in descriptors[groups]), outer, k, bits, along_k)
    place = machine.place[groups * 128] * machine.shared.size
    words = machine.shared.load((at + place[:, None, None]).reshape(-1), bits, 1)
    read = (chunks + place[:, None] // 16).reshape(-1)
    machine.accesses.multiply(read, np.repeat(groups, chunks.shape[1]))
    found = np.zeros((len(descriptors), outer, k), np.float32)
    found[groups] = numbers(words[:, 0], kind).reshape(len(groups), outer, k)
    return found


def _grouped(machine: Machine, instruction: Instruction) -> Step:
    """`commit_group` and `wait_group`; `fence` orders registers, which are written in order here."""
    how = instruction.op[1]
    assert how in ("fence", "commit_group", "wait_group"), instruction.text
    left = int(instruction.operands[0], 0) if how == "wait_group" else 0

    def step() -> None:
        machine.together(128)
        groups = np.unique(machine.accesses.here() // 4)
        if how == "commit_group":
            machine.accesses.products.commit(groups)
            machine.results.committed += 1
        elif how == "wait_group":
            machine.accesses.products_waited(groups, left)
            machine.results.wait(left)

    return step


def _wgmma(machine: Machine, instruction: Instruction) -> Step:
    if instruction.op[1] != "mma_async":
        return _grouped(machine, instruction)
    shape = next(found for part in instruction.op if (found := _SHAPE.fullmatch(part)))
    n, k = int(shape[1]), int(shape[2])
    to, kind, b_kind = instruction.op[-3:]
    assert kind == b_kind, instruction.text
    registers, a, b, keep, *rest = instruction.operands
    assert rest[:2] in ([], ["1", "1"]), instruction.text
    turned = [flag == "1" for flag in rest[2:]]
    sinks = [machine.sink(name) for name in names(registers)]
    places = [machine.names[name] for name in names(registers)]
    keeps, b_source = machine.source(keep, "pred"), machine.source(b, "u64")
    in_registers = a.startswith("{")
    a_sources = [machine.source(name, "u32") for name in names(a)] if in_registers else [machine.source(a, "u64")]
    inputs = [machine.names[name] for name in names(a)] if in_registers else []
    b_along = not (turned and turned[-1])
    a_along = in_registers or not (len(turned) == 2 and turned[0])

    def one(source: Callable[[], Array], groups: Array | None) -> Array:
        every = np.broadcast_to(source(), (machine.lanes,)).reshape(-1, 128)
        taking = every if groups is None else every[groups]
        if (taking != taking[:, :1]).any():
            raise FaultError("threads of a group name different operands")
        return every[:, 0] if groups is None else np.where(groups, every[:, 0], np.uint64(_NONE))

    def multiply() -> None:
        groups = machine.together(128)
        right = _operand(machine, one(b_source, groups), n, k, kind, b_along)
        if in_registers:
            words = np.stack([np.broadcast_to(s(), (machine.lanes,)).reshape(-1, 32) for s in a_sources], 1)
            left = left_operand(words, kind).reshape(-1, 64, k)
        else:
            left = _operand(machine, one(a_sources[0], groups), 64, k, kind, a_along)
        product = left @ right.transpose(0, 2, 1)
        kept = keeps()
        rows = np.arange(4)[:, None] * 16 + ROW  # [warps, lanes]
        found = []
        for i, place in enumerate(places):
            at = product[:, rows + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * COLUMN + (i & 1)].reshape(-1)
            was = np.where(kept, machine.results.words(place), np.uint32(0))
            found.append(added(was, at, to))
        if machine.active is None:
            machine.results.start(places, found, inputs, waits=kind == "e4m3")
            return
        for sink, words in zip(sinks, found, strict=True):
            sink(words)

    return multiply


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"wgmma": _wgmma}
