"""What the loops of compiled kernels take: instructions of a warp, and what these read of each argument.

    python -m tests.backends.triton.instructions weight_only "u4/g128/f16 m=1 "       cases whose names hold the text

A processor starts 4 instructions a clock, 2 of the integer unit, and on an H200 must read 20 bytes a clock: a kernel
whose loop reads fewer than 5 bytes of weights an instruction cannot reach what its memory gives. Counted in machine
code as `nvdisasm` of Triton's wheel shows it: every instruction of a loop once, those of loops within it included;
bytes as threads ask for them, also where several ask for the same. Times are not to be had so.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qfx.backends.triton.device import A100, H100, Device
from qfx.backends.triton.launch import Launch, recorded
from tests.backends.triton.compile_cases import cases_of

_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*);")
_LABEL = re.compile(r"(\.L_\w+):")
_CONSTANT = re.compile(r"c\[0x0\]\[0x([0-9a-f]+)\]")
_REGISTER = re.compile(r"\bU?R\d+\b")
_INTEGER = {
    "LOP3", "SHF", "PRMT", "IADD3", "ISETP", "VIADD", "VIMNMX", "VIMNMX3", "LEA", "SEL", "FSETP", "FSEL", "FMNMX",
    "SGXT", "F2FP", "I2FP", "PLOP3", "MOV", "BMSK", "IABS",
}  # fmt: skip
_FIRST = {(8, 0): 0x160, (9, 0): 0x210}  # where arguments lie in constant memory
_SIZES = {"i32": 4, "fp32": 4, "i64": 8}


@dataclass(frozen=True)
class Instruction:
    """One of machine code. op: with its modifiers. label: that stands before it, or ""."""

    op: str
    rest: str
    label: str

    @property
    def name(self) -> str:
        return self.op.split(".")[0]

    @property
    def wide(self) -> int:
        """Bytes that a thread reads of global memory."""
        if self.name not in ("LDG", "LDGSTS"):
            return 0
        sizes = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        return next((sizes[part] for part in self.op.split(".") if part in sizes), 4)


@dataclass(frozen=True)
class Loop:
    """instructions: of a warp. integer: of these, those of the integer unit. read: bytes of a warp, by argument."""

    instructions: int
    integer: int
    read: Mapping[str, int]


def parsed(text: str) -> list[Instruction]:
    """What `nvdisasm -c` wrote."""
    found, label = [], ""
    for line in text.splitlines():
        if named := _LABEL.match(line):
            label = named[1]
        elif step := _LINE.match(line):
            found.append(Instruction(step["op"], step["rest"].strip(), label))
            label = ""
    return found


def loops(code: Sequence[Instruction], arguments: Mapping[int, str]) -> list[Loop]:
    """Every branch back, in their order. arguments: names of pointers by where they lie in constant memory."""
    places = {step.label: i for i, step in enumerate(code) if step.label}
    sources = _sources(code)
    found = []
    for last, step in enumerate(code):
        to = re.search(r"\.L_\w+", step.rest) if step.name == "BRA" else None
        if to is None or places.get(to[0], len(code)) >= last:
            continue
        body = range(places[to[0]], last + 1)
        read: Counter[str] = Counter()
        for i in body:
            for name in {arguments[at] for at in sources[i] if at in arguments} if code[i].wide else ():
                read[name] += 32 * code[i].wide
        found.append(Loop(len(body), sum(code[i].name in _INTEGER for i in body), dict(read)))
    return found


def _sources(code: Sequence[Instruction]) -> list[set[int]]:
    """From which constants the operands of each instruction come: those of an address are its pointer's."""
    held: dict[str, set[int]] = {}
    found: list[set[int]] = [set() for _ in code]
    for _ in range(2):  # what a loop brings round is known the second time
        for i, step in enumerate(code):
            operands = step.rest.split(",")
            addresses = re.findall(r"\[(U?R\d+)[^\]]*\]", step.rest) if step.wide else []
            given = addresses[-1:] if step.wide else _REGISTER.findall(",".join(operands[1:]))
            from_ = {int(at, 16) for at in _CONSTANT.findall(step.rest)}.union(*(held.get(r, set()) for r in given))
            found[i] = from_
            to = _REGISTER.match(operands[0])
            if to is None or step.wide or "MMA" in step.name:
                continue
            held[to[0]] = from_
            if ".64" in step.op or ".WIDE" in step.op:
                kind, number = re.fullmatch(r"(U?R)(\d+)", to[0]).groups()  # type: ignore[union-attr]
                held[f"{kind}{int(number) + 1}"] = from_
    return found


def loops_of(launch: Launch, device: Device) -> tuple[str, int, list[Loop]]:
    """(kernel, registers, its loops) of a recorded launch, compiled for a device of 8.0 or 9.0."""
    import triton

    from qfx.backends.triton import ahead

    built = ahead.compile_launch(launch, device)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.cubin)
        file.flush()
        said = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    at, pointers = _FIRST[device.capability], {}
    for name, kind in ahead.source_of(launch).signature.items():
        if kind != "constexpr":
            size = _SIZES.get(kind, 8)
            at = -(-at // size) * size
            if size == 8 and kind.startswith("*"):
                pointers[at] = name
            at += size
    return built.kernel, built.registers, loops(parsed(said), pointers)


def main() -> None:
    """Print them for the cases of a family."""
    family, text = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    for case in cases_of(family):
        if text not in f"{case.name} ":
            continue
        for device in (A100, H100):
            with recorded(device) as launches:
                case.run()
            for launch in launches:
                kernel, registers, found = loops_of(launch, device)
                where = f"sm_{device.capability[0]}{device.capability[1]}"
                print(f"{case.name} {where} {kernel}: {registers} registers, {launch.options['num_warps']} warps")
                for loop in found:
                    read = ", ".join(
                        f"{name.removesuffix('_ptr')} {size} ({size / loop.instructions:.1f} an instruction)"
                        for name, size in loop.read.items()
                    )
                    print(f"    {loop.instructions} instructions, {loop.integer} of the integer unit; bytes: {read}")


if __name__ == "__main__":
    main()
