"""The text of a PTX module as instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*(.*?)\{", re.DOTALL)
_PARAM = re.compile(r"\.param\s+(?:\.align (\d+)\s+)?\.(\w+)(?:\s+\.ptr[\w\s.]*?)?\s+(\w+)(?:\[(\d+)\])?\s*(?:,|$)")
_LABEL = re.compile(r"[$\w]+")
_BYTES = re.compile(r"\.global \.align \d+ \.b8 (\w+)\[\d+\] = \{([\d, ]*)\};")
_PLACE = re.compile(r"\s*\.loc.*// (.*?:\d+)")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+(.*)", re.DOTALL)
_INSTRUCTION = re.compile(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@dataclass(frozen=True)
class Instruction:
    """op: its name in parts ("ld", "global", "v4", "b32"). predicate: the register, and whether it is negated.

    line: that of the module's text on which it ends.
    """

    op: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: tuple[str, bool] | None
    text: str
    line: int


@dataclass
class Program:
    """One kernel. params: name, offset and bytes of each. registers: name -> type. labels: name -> instruction.

    sources: of a line of the module, and those after it, the line of Python.
    """

    name: str
    params: list[tuple[str, int]]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    sources: list[tuple[int, str]] = field(default_factory=list)

    def source(self, line: int) -> str:
        """Where a line of the module comes from, "file:line"."""
        return next((place for first, place in reversed(self.sources) if first <= line), "")


def parse(ptx: str) -> Program:
    """The one kernel of a module. Names of blocks in braces are made unique: "name@3" is that of the third block."""
    lines = [line.split("//")[0] for line in ptx.splitlines()]
    plain = "\n".join("" if line.strip().startswith((".loc", ".file")) else line for line in lines)
    found = _ENTRY.search(plain)
    assert found is not None, "no kernel in the module"
    name, params, directives = found.groups()
    threads = re.search(r"\.reqntid (\d+)|\.maxntid (\d+)", directives)
    assert threads is not None, directives
    program = Program(name, [_param(p) for p in params.split(",")], int(threads[1] or threads[2]))
    for text, codes in _BYTES.findall(plain):
        program.texts[text] = bytes(int(code) for code in codes.split(",")).decode()
    for i, line in enumerate(ptx.splitlines()):
        if place := _PLACE.match(line):
            program.sources.append((i + 1, place[1]))
    _Body(program, plain.count("\n", 0, found.end()) + 1).read(plain[found.end() :])
    return program


def _param(text: str) -> tuple[str, int]:
    found = _PARAM.search(text.strip())
    assert found is not None, text
    size = int(found[2][1:]) // 8
    return found[3], size * int(found[4] or 1)


class _Body:
    """Statements of a kernel's body; names of registers and labels belong to their block."""

    def __init__(self, program: Program, line: int) -> None:
        self.program, self.blocks, self.count, self.line = program, [0], 0, line
        self.pending: list[tuple[Instruction, list[int]]] = []

    def read(self, text: str) -> None:
        start, counted, line = 0, 0, self.line
        for found in re.finditer(r"[;{}]|(?<!:):(?!:)", text):
            i, symbol = found.start(), found[0]
            held = text[start:i].strip()
            line += text.count("\n", counted, i)
            self.line, counted = line, i
            if symbol == ";":
                self._statement(held)
            elif symbol in "{}" and not held:
                if symbol == "{":
                    self.count += 1
                    self.blocks.append(self.count)
                else:
                    self.blocks.pop()
                    if not self.blocks:
                        break
            elif symbol == ":" and _LABEL.fullmatch(held):
                self.program.labels[self._own(held)] = len(self.pending)
            else:
                continue
            start = i + 1
        known = {*self.program.registers, *self.program.labels}
        for instruction, blocks in self.pending:
            self.program.instructions.append(_resolved(instruction, blocks, known))

    def _own(self, name: str) -> str:
        return name if len(self.blocks) == 1 else f"{name}@{self.blocks[-1]}"

    def _statement(self, text: str) -> None:
        if declared := _REGISTERS.match(text):
            for name in declared[2].split(","):
                stem, _, count = name.strip().partition("<")
                names = [f"{stem}{i}" for i in range(int(count[:-1]))] if count else [stem]
                self.program.registers.update({self._own(n): declared[1] for n in names})
            return
        if not text or text.startswith("."):
            return  # parameters of a call, pragmas
        found = _INSTRUCTION.fullmatch(text)
        assert found is not None, text
        predicate = (found[2], bool(found[1])) if found[2] else None
        operands = tuple(o.strip() for o in _OPERAND.findall(found[4]))
        op = tuple(found[3].replace("::", "_").split("."))
        self.pending.append(
            (Instruction(op, operands, predicate, " ".join(text.split()), self.line), list(self.blocks))
        )


def _resolved(instruction: Instruction, blocks: list[int], known: set[str]) -> Instruction:
    """The instruction with names of inner blocks made unique."""
    if len(blocks) == 1:
        return instruction

    def own(match: re.Match[str]) -> str:
        return next((f"{match[0]}@{b}" for b in reversed(blocks) if f"{match[0]}@{b}" in known), match[0])

    operands = tuple(re.sub(r"[%$\w]+", own, operand) for operand in instruction.operands)
    predicate = instruction.predicate
    if predicate is not None:
        predicate = (re.sub(r"[%$\w]+", own, predicate[0]), predicate[1])
    return replace(instruction, operands=operands, predicate=predicate)
