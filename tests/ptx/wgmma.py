"""`wgmma`: products of four warps, of which operands lie in shared memory, told by descriptors of 64 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.matrices import COLUMN, ROW, added, bits_of_operand, left_operand, numbers
from tests.ptx.memory import FaultError
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


def _operand(machine: Machine, descriptors: Array, outer: int, k: int, kind: str, along_k: bool) -> Array:
    """[groups, outer, k] numbers of an operand in shared memory; descriptor -1: of a group that takes no part."""
    bits = bits_of_operand(kind)
    found = np.zeros((len(descriptors), outer, k), np.float32)
    for group, descriptor in enumerate(descriptors):
        if descriptor == _NONE:
            continue
        at = _offsets(int(descriptor), outer, k, bits, along_k)
        place = machine.place[group * 128] * machine.shared.size
        words = machine.shared.load((at + place).reshape(-1), bits, 1)
        found[group] = numbers(words[:, 0], kind).reshape(outer, k)
    return found


def _wgmma(machine: Machine, instruction: Instruction) -> Step:
    if instruction.op[1] != "mma_async":
        return lambda: None  # products are done where they are asked for
    shape = next(found for part in instruction.op if (found := _SHAPE.fullmatch(part)))
    n, k = int(shape[1]), int(shape[2])
    to, kind, b_kind = instruction.op[-3:]
    assert kind == b_kind, instruction.text
    registers, a, b, keep, *rest = instruction.operands
    assert rest[:2] in ([], ["1", "1"]), instruction.text
    turned = [flag == "1" for flag in rest[2:]]
    sinks = [machine.sink(name) for name in names(registers)]
    before = [machine.source(name, "u32") for name in names(registers)]
    keeps, b_source = machine.source(keep, "pred"), machine.source(b, "u64")
    in_registers = a.startswith("{")
    a_sources = [machine.source(name, "u32") for name in names(a)] if in_registers else [machine.source(a, "u64")]
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
        for i, (source, sink) in enumerate(zip(before, sinks, strict=True)):
            at = product[:, rows + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * COLUMN + (i & 1)].reshape(-1)
            was = np.where(kept, np.broadcast_to(source(), (machine.lanes,)), np.uint32(0))
            sink(added(was, at, to))

    return multiply


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"wgmma": _wgmma}
