"""What each instruction does: arithmetic here, the rest by the module that knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import barriers, conversions, copies, matrices, moves, warps, wgmma
from tests.ptx.parse import Instruction
from tests.ptx.values import Array, bits_of, flushed, from_bf16, pairs, to_bf16

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step

Number = Callable[..., Array]


def step_of(machine: Machine, instruction: Instruction) -> Step:
    """The instruction as a function to call. Raises NotImplementedError for one that is unknown."""
    name = instruction.op[0]
    if name in ("bra", "ret", "exit"):
        return lambda: None
    for table in (
        OTHERS,
        moves.STEPS,
        conversions.STEPS,
        warps.STEPS,
        matrices.STEPS,
        wgmma.STEPS,
        copies.STEPS,
        barriers.STEPS,
    ):
        if name in table:
            return table[name](machine, instruction)
    if name in ARITHMETIC:
        return _arithmetic(machine, instruction)
    raise NotImplementedError(instruction.text)


def _arithmetic(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    if not KNOWN.issuperset(instruction.op[1:-1]):
        raise NotImplementedError(instruction.text)
    function = _in(kind, ARITHMETIC[instruction.op[0]](instruction.op))
    if "ftz" in instruction.op:
        function = _flushing(function)
    sink = machine.sink(instruction.operands[0])
    sources = [machine.source(operand, kind) for operand in instruction.operands[1:]]
    if len(sources) == 1:
        (one,) = sources
        return lambda: sink(function(one()))
    if len(sources) == 2:
        a, b = sources
        return lambda: sink(function(a(), b()))
    return lambda: sink(function(*(s() for s in sources)))


def _in(kind: str, function: Number) -> Number:
    """A function of floats for registers that numpy has no type for."""
    if kind == "bf16":
        return lambda *given: to_bf16(function(*(from_bf16(g) for g in given)))
    if kind == "bf16x2":
        return lambda *given: _joined(to_bf16(function(*(from_bf16(pairs(g)) for g in given))))
    if kind == "f16x2":
        return lambda *given: _joined(function(*(pairs(g).view(np.float16) for g in given)).view(np.uint16))
    if kind in ("s16x2", "u16x2"):
        return lambda *given: _joined(function(*(pairs(g) for g in given)))
    return function


def _joined(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


def _flushing(function: Number) -> Number:
    return lambda *given: flushed(function(*(flushed(g) for g in given)))


def _same(function: Number) -> Callable[[tuple[str, ...]], Number]:
    return lambda op: function


def _fma(op: tuple[str, ...]) -> Number:
    def fma(a: Array, b: Array, c: Array) -> Array:
        exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
        return exact if op[-1].startswith("bf16") else exact.astype(a.dtype)

    return fma


def _mul(op: tuple[str, ...]) -> Number:
    if op[1] == "wide":
        return lambda a, b: a.astype(_wider(a)) * b.astype(_wider(a))
    if op[1] == "hi":
        return _upper
    return np.multiply


def _upper(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    if a.dtype.itemsize < 8:
        return np.asarray(a.astype(_wider(a)) * b.astype(_wider(a)) >> 8 * a.dtype.itemsize).astype(a.dtype)
    found: Array = np.asarray(a.astype(object) * b.astype(object) >> 64).astype(a.dtype)
    return found


def _mad(op: tuple[str, ...]) -> Number:
    assert op[1] == "lo", op
    return lambda a, b, c: a * b + c


def _wider(number: Array) -> np.dtype[np.generic]:
    return np.dtype(f"{number.dtype.kind}{2 * number.dtype.itemsize}")


def _div(op: tuple[str, ...]) -> Number:
    return _truncated if op[-1][0] in "su" else np.divide


def _truncated(a: Array, b: Array) -> Array:
    """Division towards zero; by zero it gives what nobody may use."""
    whole = np.where(b == 0, np.ones_like(b), b)
    found: Array = (np.abs(a.astype(object)) // np.abs(whole.astype(object))).astype(a.dtype)
    return np.where((a < 0) != (whole < 0), -found, found)


def _shift(op: tuple[str, ...]) -> Number:
    bits = bits_of(op[-1])

    def left(a: Array, by: Array) -> Array:
        return np.where(by >= bits, np.zeros_like(a), a << (by.astype(a.dtype) & (bits - 1)))

    def right(a: Array, by: Array) -> Array:
        return (
            a >> np.minimum(by, bits - 1).astype(a.dtype)
            if op[-1][0] == "s"
            else np.where(by >= bits, np.zeros_like(a), a >> (by.astype(a.dtype) & (bits - 1)))
        )

    return left if op[0] == "shl" else right


def _extreme(op: tuple[str, ...]) -> Number:
    if "NaN" in op or op[-1][0] in "su":
        return np.maximum if op[0] == "max" else np.minimum
    return np.fmax if op[0] == "max" else np.fmin


def _logic(op: tuple[str, ...]) -> Number:
    return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op[0]]


def _shift_step(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    function, sink = _shift(instruction.op), machine.sink(instruction.operands[0])
    value, by = machine.source(instruction.operands[1], kind), machine.source(instruction.operands[2], "u32")
    return lambda: sink(function(value(), by()))


def _bfe(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.op[-1]
    sink, value = machine.sink(instruction.operands[0]), machine.source(instruction.operands[1], kind)
    start, length = (int(operand, 0) for operand in instruction.operands[2:])
    assert start + length <= bits_of(kind) and length, instruction.text
    left = bits_of(kind) - start - length
    return lambda: sink(value() << left >> (left + start))


def _bfi(machine: Machine, instruction: Instruction) -> Step:
    """The low `length` bits of a put into b from bit `start` on."""
    assert instruction.op == ("bfi", "b32"), instruction.text
    sink = machine.sink(instruction.operands[0])
    a, b = (machine.source(operand, "u32") for operand in instruction.operands[1:3])
    start, length = (int(operand, 0) for operand in instruction.operands[3:])
    assert start + length <= 32, instruction.text
    taken = np.uint32(((1 << length) - 1) << start)
    return lambda: sink(a() << np.uint32(start) & taken | b() & ~taken)


def _wide_mad(machine: Machine, instruction: Instruction) -> Step:
    kind, operands = instruction.op[-1], instruction.operands
    if instruction.op[1] == "lo":
        return _arithmetic(machine, instruction)
    assert instruction.op[1] == "wide", instruction.text
    sink = machine.sink(operands[0])
    a, b = (machine.source(operand, kind) for operand in operands[1:3])
    c = machine.source(operands[3], f"{kind[0]}{2 * bits_of(kind)}")
    return lambda: sink(a().astype(_wider(a())) * b().astype(_wider(b())) + c())


def _compare(machine: Machine, instruction: Instruction) -> Step:
    how, kind = instruction.op[1], instruction.op[-1]
    assert len(instruction.op) == 3 or instruction.op[2] == "ftz", instruction.text
    sink = machine.sink(instruction.operands[0])
    a, b = (machine.source(operand, kind) for operand in instruction.operands[1:])
    function = COMPARISONS[how]
    if kind == "bf16":
        return lambda: sink(function(from_bf16(a()), from_bf16(b())))
    return lambda: sink(function(a(), b()))


KNOWN = {"rn", "ftz", "lo", "hi", "wide", "approx", "full", "NaN"}  # what may stand between a name and a type
COMPARISONS: dict[str, Number] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: a != b,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a <= b) | (a > b),
    "nan": lambda a, b: ~((a <= b) | (a > b)),
}

ARITHMETIC: dict[str, Callable[[tuple[str, ...]], Number]] = {
    "add": _same(np.add),
    "sub": _same(np.subtract),
    "mul": _mul,
    "mad": _mad,
    "fma": _fma,
    "div": _div,
    "rem": _same(lambda a, b: a - b * _truncated(a, b)),
    "min": _extreme,
    "max": _extreme,
    "abs": _same(np.abs),
    "neg": _same(np.negative),
    "and": _logic,
    "or": _logic,
    "xor": _logic,
    "not": _same(np.invert),
    "popc": _same(np.bitwise_count),
    "ex2": _same(np.exp2),
    "lg2": _same(np.log2),
    "rcp": _same(np.reciprocal),
    "sqrt": _same(np.sqrt),
    "rsqrt": _same(lambda a: np.float32(1) / np.sqrt(a)),
}
OTHERS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "setp": _compare,
    "shl": _shift_step,
    "shr": _shift_step,
    "bfe": _bfe,
    "bfi": _bfi,
    "mad": _wide_mad,
}
