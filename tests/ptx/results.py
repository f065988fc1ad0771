"""Registers of products in flight: results are there at the wait, and until then what products read stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.faults import FaultError
from tests.ptx.parse import Instruction
from tests.ptx.values import Array

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

_NAME = re.compile(r"[%$\w@]+")


@dataclass
class _Result:
    """A result to come: what stands for it meanwhile, and the registers that hold that."""

    stand_in: Array
    words: Array
    places: list[int]


@dataclass
class _Product:
    """number: that of its group. inputs: registers that it reads. waits: the assembler puts a wait, see below."""

    number: int
    waits: bool
    results: list[_Result]
    inputs: set[int]


class Results:
    """Those of `machine`. Products that a part of the programs ask for are done at once.

    Where Triton adds up parts of a sum of e4m3 in f32 it reads these without a wait. ptxas puts one there, and says so
    (C7517: "wgmma.wait_group is injected"), which is done here too.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.committed = 0
        self.flying: list[_Product] = []
        self.standing: dict[int, _Result] = {}  # by the identity of what stands for a result
        self.named: dict[int, tuple[list[int], list[int]]] = {}

    def start(self, places: list[int], words: list[Array], inputs: list[int], *, waits: bool) -> None:
        """A product of all threads: words to come to registers."""
        registers, results = self.machine.registers, []
        for place, word in zip(places, words, strict=True):
            stand_in = np.broadcast_to(np.uint32(0x7FFFDEAD), word.shape)
            results.append(_Result(stand_in, word, [place]))
            self.standing[id(stand_in)] = results[-1]
            registers[place] = stand_in
        self.flying.append(_Product(self.committed, waits, results, set(inputs)))

    def words(self, place: int) -> Array:
        """What a register holds, or will hold: products of one accumulator follow each other."""
        held = self.machine.registers[place]
        return self.standing[id(held)].words if id(held) in self.standing else held

    def wait(self, left: int) -> None:
        """The products of all groups but the last `left` are done."""
        landing = [p for p in self.flying if p.number < self.committed - left]
        self.flying = [p for p in self.flying if p.number >= self.committed - left]
        for result in (r for product in landing for r in product.results):
            del self.standing[id(result.stand_in)]
            for place in result.places:
                if self.machine.registers[place] is result.stand_in:
                    self.machine.registers[place] = result.words

    def check(self, at: int) -> bool:
        """Whether the instruction is a move of results to come, which is done. Raises FaultError for another use."""
        instruction, registers = self.machine.program.instructions[at], self.machine.registers
        if instruction.op[0] == "wgmma":
            return False
        if at not in self.named:
            self.named[at] = _places(instruction, self.machine.names)
        written, read = self.named[at]
        early = [p for p in read if id(registers[p]) in self.standing]
        if early and instruction.op[0] == "mov" and len(written) == len(read) == 1 and self.machine.active is None:
            result = self.standing[id(registers[early[0]])]
            result.places.append(written[0])
            registers[written[0]] = result.stand_in
            return True
        if early and all(product.waits for product in self.flying):
            self.wait(-1)  # of the group that is not closed, too
            return False
        if early:
            name = list(self.machine.names)[early[0]]
            raise FaultError(f"{name} is used, the result of a product in flight: no wgmma.wait_group")
        lost = [p for p in written if any(p in product.inputs for product in self.flying)]
        if lost:
            raise FaultError(f"{list(self.machine.names)[lost[0]]} is overwritten, which a product in flight reads")
        return False


def _places(instruction: Instruction, known: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """(registers that an instruction writes, those that it reads): one may be both."""
    operands = instruction.operands
    stores = not operands or operands[0].startswith("[") or instruction.op[0] in ("bra", "bar", "barrier")
    to, from_ = (operands[:0], operands) if stores else (operands[:1], operands[1:])
    if instruction.predicate:
        from_ = (*from_, instruction.predicate[0])
    written, read = ([known[n] for o in part for n in _NAME.findall(o) if n in known] for part in (to, from_))
    return written, read
