"""`cvt`: from one type to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx.parse import Instruction
from tests.ptx.values import Array, dtype_of, from_bf16, from_e4m3, to_bf16, to_e4m3

if TYPE_CHECKING:
    from tests.ptx.machine import Machine, Step


def _cvt(machine: Machine, instruction: Instruction) -> Step:
    *how, to, kind = instruction.op[1:]
    if not {"rn", "rna", "rzi", "rni", "rmi", "rpi", "satfinite"}.issuperset(how):
        raise NotImplementedError(instruction.text)
    sink = machine.sink(instruction.operands[0])
    sources = [machine.source(operand, kind if kind != "e4m3x2" else "b16") for operand in instruction.operands[1:]]
    if to in _PAIRS and kind != "e4m3x2":  # the first operand becomes the upper half
        upper, lower = sources
        rounded = _PAIRS[to]
        bits = 8 if to == "e4m3x2" else 16

        def pair() -> None:
            high, low = (rounded(s()).astype(np.uint32) for s in (upper, lower))
            sink((high << bits | low).astype(np.uint16 if bits == 8 else np.uint32))

        return pair
    (source,) = sources
    if kind == "e4m3x2":
        assert to == "f16x2", instruction.text

        def widened() -> None:
            halves = from_e4m3(np.ascontiguousarray(source()).view(np.uint8)).astype(np.float16)
            sink(halves.view(np.uint32))

        return widened
    function = _function(tuple(how), to, kind)
    return lambda: sink(function(source()))


def _function(how: tuple[str, ...], to: str, kind: str) -> Callable[[Array], Array]:
    if to == "tf32":
        assert how == ("rna",)
        return lambda x: ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    wide: Callable[[Array], Array] = from_bf16 if kind == "bf16" else lambda x: x
    if to == "bf16":
        if kind == "f16" or kind[0] in "su":
            return lambda x: to_bf16(x.astype(np.float64))
        return to_bf16
    dtype = dtype_of(to)
    if to[0] == "f":
        assert how in ((), ("rn",)), how
        return lambda x: wide(x).astype(dtype)
    if kind[0] in "fb" and kind != "b16":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how[0]]
        limits = np.iinfo(dtype)

        def to_integer(x: Array) -> Array:
            number = rounding(wide(x)).astype(np.float64)
            return np.where(np.isnan(number), 0, np.clip(number, float(limits.min), float(limits.max))).astype(dtype)

        return to_integer
    assert not how, (how, to, kind)
    return lambda x: x.astype(dtype)


_PAIRS: dict[str, Callable[[Array], Array]] = {
    "f16x2": lambda x: x.astype(np.float16).view(np.uint16),
    "bf16x2": to_bf16,
    "e4m3x2": to_e4m3,
}
STEPS: dict[str, Callable[[Machine, Instruction], Step]] = {"cvt": _cvt}
