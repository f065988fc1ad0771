"""Matrices in the registers of a warp: `ldmatrix`, `stmatrix` and `mma.sync`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.moves import names
from tests.ptx.parse import Instruction
from tests.ptx.values import Array, from_bf16, from_e4m3

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step

LANE = np.arange(32)
ROW, COLUMN = LANE >> 2, LANE & 3  # of a thread in an 8 x 4 arrangement of the warp
_SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8}


def numbers(words: Array, kind: str) -> Array:
    """[..., w] words of 32 bits as [..., w * 32 / bits] numbers that a product takes."""
    words = np.ascontiguousarray(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return from_bf16(words.view(np.uint16))
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    if kind == "e4m3":
        return from_e4m3(words.view(np.uint8))
    return words.view({"s8": np.int8, "u8": np.uint8}[kind]).astype(np.float32)


def bits_of_operand(kind: str) -> int:
    """Of a number in an operand."""
    return _BITS[kind]


def _ldmatrix(machine: Machine, instruction: Instruction) -> Step:
    sinks = [machine.sink(name) for name in names(instruction.operands[0])]
    address = machine.address(instruction.operands[1], "u32")
    transposed = "trans" in instruction.op

    def load() -> None:
        machine.together(32)
        at = machine.shared.absolute(address(), machine.places()).reshape(-1, 32)[:, : 8 * len(sinks)]
        rows = machine.accesses.load("shared", at.reshape(-1), 32, 4, rows=_warps(machine, at))  # 16 bytes a row
        matrices = rows.view(np.uint16).reshape(-1, len(sinks), 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, len(sinks), 32)
        for i, sink in enumerate(sinks):
            sink(machine.spread(words[:, i].reshape(-1)))

    return load


def _stmatrix(machine: Machine, instruction: Instruction) -> Step:
    sources = [machine.source(name, "u32") for name in names(instruction.operands[1])]
    address = machine.address(instruction.operands[0], "u32")
    transposed = "trans" in instruction.op

    def store() -> None:
        machine.together(32)
        at = machine.shared.absolute(address(), machine.places()).reshape(-1, 32)[:, : 8 * len(sources)]
        words = np.stack([machine.chosen(s()).reshape(-1, 32) for s in sources], 1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(-1, len(sources), 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        words = matrices.view(np.uint32).reshape(-1, 4)
        machine.accesses.store("shared", at.reshape(-1), words, rows=_warps(machine, at))

    return store


def _warps(machine: Machine, at: Array) -> Array:
    """Of [warps, rows] addresses."""
    return np.repeat(machine.accesses.active()[::32], at.shape[1])


def left_operand(words: Array, kind: str) -> Array:
    """[warps, 4, 32] registers as the warp's [warps, 16, k] part of the left operand."""
    each = 32 // bits_of_operand(kind)
    found = np.empty((words.shape[0], 16, 8 * each), np.float32)
    for i in range(4):
        columns = COLUMN[:, None] * each + np.arange(each) + (i >> 1) * 4 * each
        found[:, (ROW + 8 * (i & 1))[:, None], columns] = numbers(words[:, i, :, None], kind)
    return found


def _mma(machine: Machine, instruction: Instruction) -> Step:
    shape = next(_SHAPE.fullmatch(part) for part in instruction.op if part.startswith("m16"))
    assert shape is not None
    m, n, k = (int(size) for size in shape.groups())
    to, a_kind, b_kind, kind = instruction.op[-4:]
    assert (m, n) == (16, 8) and to == kind and a_kind == b_kind, instruction.text
    each = 32 // bits_of_operand(a_kind)
    assert k == 8 * each, instruction.text
    sinks = [machine.sink(name) for name in names(instruction.operands[0])]
    a, b, c = ([machine.source(name, "u32") for name in names(o)] for o in instruction.operands[1:4])

    def multiply() -> None:
        machine.together(32)
        left = left_operand(_by_warp(machine, a), a_kind)
        words = _by_warp(machine, b)
        right = np.empty((words.shape[0], k, 8), np.float32)
        for i in range(2):
            rows = COLUMN[:, None] * each + np.arange(each) + i * 4 * each
            right[:, rows, ROW[:, None]] = numbers(words[:, i, :, None], b_kind)
        product = left @ right
        for i, (source, sink) in enumerate(zip(c, sinks, strict=True)):
            at = product[:, ROW + 8 * (i >> 1), 2 * COLUMN + (i & 1)].reshape(-1)
            sink(added(np.broadcast_to(source(), (machine.lanes,)), at, to))

    return multiply


def added(sum_before: Array, product: Array, kind: str) -> Array:
    """An accumulator's words and what is added, as words."""
    if kind == "f32":
        return (sum_before.view(np.float32) + product).view(np.uint32)
    return (sum_before.view(np.int32) + product.astype(np.int32)).view(np.uint32)


def _by_warp(machine: Machine, sources: list[Callable[[], Array]]) -> Array:
    """[warps, registers, 32] words."""
    return np.stack([np.broadcast_to(s(), (machine.lanes,)).reshape(-1, 32) for s in sources], 1)


STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma}
