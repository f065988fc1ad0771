"""Running a parsed kernel: all threads of some programs in step, those that are behind first where they part."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx.accesses import Accesses
from tests.ptx.barriers import Barriers
from tests.ptx.faults import FaultError
from tests.ptx.groups import ApartError, Groups
from tests.ptx.memory import Global, Shared
from tests.ptx.parse import Instruction, Program
from tests.ptx.results import Results
from tests.ptx.values import WORDS, Array, bits_of, dtype_of, read, word_of

_ADDRESS = re.compile(r"\[\s*([^+\s]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_MOST_STEPS = 20_000_000
Step = Callable[[], None]


class Machine:
    """Threads of `programs` (their indices in the grid) and their registers; lane: a thread of one of them.

    active: the lanes that carry out an instruction, None where all do. mask: those that have come to it. at: its index.
    """

    def __init__(
        self, program: Program, grid: tuple[int, int, int], programs: Sequence[int], params: dict[str, bytes],
        memory: Global, shared: int, descriptors: dict[int, Any], *, copies_fenced: bool = True,
    ) -> None:  # fmt: skip
        self.copies_fenced = copies_fenced
        self.program, self.grid, self.memory, self.descriptors = program, grid, memory, descriptors
        self.threads, self.count = program.threads, len(programs)
        self.lanes = self.threads * self.count
        self.shared = Shared(self.count, shared)
        self.params = params
        self.thread = np.tile(np.arange(self.threads, dtype=np.uint32), self.count)
        self.place = np.repeat(np.arange(self.count), self.threads)
        index = np.repeat(np.asarray(programs, np.uint32), self.threads)
        self.index = {"x": index % grid[0], "y": index // grid[0] % grid[1], "z": index // (grid[0] * grid[1])}
        self.lane_ids = self.thread % 32
        self.names = {name: i for i, name in enumerate(program.registers)}
        self.kinds = list(program.registers.values())
        self.registers: list[Array] = [np.zeros(self.lanes, _held(kind)) for kind in self.kinds]
        self.active: Array | None = None
        self.mask: Array | None = None
        self.at = 0
        self.accesses = Accesses(self, np.asarray(programs))
        self.barriers = Barriers(self)
        self.results = Results(self)
        self.text_places = {name: 1 << 48 | i << 32 for i, name in enumerate(program.texts)}

    def run(self) -> None:
        """To the end of all lanes."""
        from tests.ptx.instructions import step_of

        steps = [step_of(self, i) for i in self.program.instructions]
        predicates = [self._predicate(i) for i in self.program.instructions]
        targets = [self._target(i) for i in self.program.instructions]
        everything = np.ones(self.lanes, bool)
        groups = Groups()
        at, mask, taken = 0, None, 0
        with np.errstate(all="ignore"):
            while True:
                taken += 1
                if taken > _MOST_STEPS:
                    raise FaultError(f"no end after {taken} instructions")
                if groups.waiting:
                    at, mask = groups.next(at, everything if mask is None else mask)
                    mask = None if mask.all() else mask
                if at >= len(steps):
                    if not groups.waiting:
                        return self.barriers.check_end()
                    at, mask = groups.leave()
                    continue
                active = self._where(predicates[at], mask)
                if active is not None and not active.any():
                    at += 1
                    continue
                if (target := targets[at]) is not None:
                    left = None if active is None else (everything if mask is None else mask) & ~active
                    if left is not None and left.any():
                        groups.wait(at + 1, left)
                    at, mask = target, active
                    continue
                self.active, self.mask, self.at = active, mask, at
                if self._carried_out(steps[at], at):
                    at += 1
                    continue
                assert mask is not None, "all lanes are here"
                groups.wait(at, mask, blocked=True)
                at, mask = groups.leave()

    def _carried_out(self, step: Step, at: int) -> bool:
        """Carry out an instruction; False where threads that belong to it are not there yet."""
        try:
            if not (self.results.flying and self.results.check(at)):
                step()
        except ApartError:
            return False
        except (FaultError, AssertionError, ValueError, IndexError) as e:
            e.add_note(f"{self.program.name}, line {self.line()}: {self.program.instructions[at].text}")
            raise
        return True

    def line(self) -> int:
        """Of the instruction that is carried out, in the module's text."""
        return self.program.instructions[self.at].line

    def _where(self, predicate: tuple[int, bool] | None, mask: Array | None) -> Array | None:
        """The lanes of `mask` for which a predicate holds; None stands for all."""
        if predicate is None:
            return mask
        value = ~self.registers[predicate[0]] if predicate[1] else self.registers[predicate[0]]
        active: Array = value if mask is None else value & mask
        return None if active.all() else active

    def _predicate(self, instruction: Instruction) -> tuple[int, bool] | None:
        if instruction.predicate is None:
            return None
        return self.names[instruction.predicate[0]], instruction.predicate[1]

    def _target(self, instruction: Instruction) -> int | None:
        if instruction.op[0] == "bra":
            return self.program.labels[instruction.operands[-1]]
        return len(self.program.instructions) if instruction.op[0] in ("ret", "exit") else None

    def source(self, operand: str, kind: str) -> Callable[[], Array]:
        """Reads an operand as numbers of a type: [lanes], or [1] for what is the same in all."""
        if operand in self.names:
            place, same = self.names[operand], self.kinds[self.names[operand]]
            if kind == "pred" or dtype_of(kind) == _held(same):
                return lambda: self.registers[place]
            return lambda: read(self.registers[place], kind)
        fixed = self._fixed(operand, kind)
        return lambda: fixed

    def _fixed(self, operand: str, kind: str) -> Array:
        axis = operand.rpartition(".")[2]
        if operand.startswith("%tid"):
            return self.thread if axis == "x" else np.zeros(1, np.uint32)
        if operand.startswith("%ctaid"):
            return self.index[axis]
        if operand.startswith("%nctaid"):
            return np.asarray([self.grid["xyz".index(axis)]], np.uint32)
        if operand.startswith("%laneid"):
            return self.lane_ids
        if operand == "global_smem":
            return np.zeros(1, np.uint32)
        if operand in self.text_places:
            return np.asarray([self.text_places[operand]], np.uint64)
        if operand in self.params:  # its address; of a tensor descriptor its key, see launches
            return read(np.frombuffer(self.params[operand], np.uint64), kind)
        if kind == "pred":
            return np.asarray([operand not in ("0", "false")])
        if operand.startswith("0f") and len(operand) == 10:
            return read(np.asarray([int(operand[2:], 16)], np.uint32), kind)
        bits = bits_of(kind)
        return read(np.asarray([int(operand.rstrip("U"), 0) & (1 << bits) - 1], WORDS[bits]), kind)

    def sink(self, operand: str) -> Callable[[Array], None]:
        """Writes numbers to a register, for the active lanes."""
        if operand == "_":
            return lambda number: None
        place = self.names[operand]
        bits = 0 if self.kinds[place] == "pred" else bits_of(self.kinds[place])

        def write(number: Array) -> None:
            word = word_of(number, bits) if bits else number
            if self.active is not None:
                word = np.where(self.active, word, self.registers[place])
            elif word.shape[0] != self.lanes:
                word = np.repeat(word, self.lanes)
            self.registers[place] = word

        return write

    def address(self, operand: str, kind: str) -> Callable[[], Array]:
        """Addresses of the active lanes of an operand [register + offset]."""
        found = _ADDRESS.fullmatch(operand)
        assert found is not None, operand
        base, offset = self.source(found[1], kind), int(found[2] or "0", 0)

        def read_address() -> Array:
            every = base()
            if every.shape[0] != self.lanes:
                every = np.repeat(every, self.lanes)
            every = every if self.active is None else every[self.active]
            return every + np.asarray([offset & (1 << bits_of(kind)) - 1], every.dtype) if offset else every

        return read_address

    def chosen(self, number: Array) -> Array:
        """What the active lanes have."""
        number = number if number.shape[0] == self.lanes else np.repeat(number, self.lanes)
        return number if self.active is None else number[self.active]

    def spread(self, number: Array) -> Array:
        """Numbers of the active lanes as those of all lanes."""
        if self.active is None:
            return number
        every = np.zeros(self.lanes, number.dtype)
        every[self.active] = number
        return every

    def places(self) -> Array:
        """Of which program the active lanes are."""
        return self.place if self.active is None else self.place[self.active]

    def together(self, threads: int) -> Array | None:
        """Groups of `threads` lanes of which all are active, None for all. Raises ApartError where a group is split."""
        if self.active is None:
            return None
        groups = self.active.reshape(-1, threads)
        whole: Array = np.asarray(groups.all(1))
        if (np.asarray(groups.any(1)) != whole).any():
            raise ApartError
        return whole


def _held(kind: str) -> np.dtype[Any]:
    return np.dtype(bool) if kind == "pred" else np.dtype(WORDS[bits_of(kind)])
