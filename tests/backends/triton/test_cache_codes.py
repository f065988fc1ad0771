"""The instructions that make halves of codes, run by a small interpreter of PTX: the kernels' own need a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from qfx.backends.triton.kernels.cache_codes import (
    AFFINE,
    BARE,
    E4M3,
    E5M2,
    PROGRAMS,
    SCALED,
    ZEROS,
    instructions,
)

_LINE = re.compile(r"(?P<op>[a-z]+)\.(?P<kind>\w+) (?P<to>\S+), (?P<args>.+)")


def run(program: str, *inputs: np.ndarray) -> np.ndarray:
    """Halves that a program makes of registers (uint32 arrays), [n, 4]."""
    known = {f"${i + 2}": x.astype(np.uint32) for i, x in enumerate(inputs)}
    assert program.startswith("{ ") and program.endswith("; }")
    for line in program[2:-3].split("; "):
        if line.startswith(".reg"):
            continue
        found = _LINE.fullmatch(line)
        assert found is not None, line
        args = [known[a] if a in known else np.uint32(int(a, 0)) for a in found["args"].split(", ")]
        assert found["kind"] == ("f16x2" if found["op"] in ("sub", "mul") else "b32")
        known[found["to"]] = np.broadcast_to(OPS[found["op"]](*args), inputs[0].shape).astype(np.uint32)
    both = np.stack([known["$0"], known["$1"]], 1)
    return np.ascontiguousarray(both).view(np.float16)


def _bytes_of(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: four of the eight bytes of b, a."""
    whole = a.astype(np.uint64) | (np.uint64(b) << np.uint64(32))
    picked = [(whole >> np.uint64(8 * ((int(selector) >> 4 * i) & 15))) & np.uint64(255) for i in range(4)]
    found: np.ndarray = picked[0] | picked[1] << np.uint64(8) | picked[2] << np.uint64(16) | picked[3] << np.uint64(24)
    return found


def _halves(op: np.ufunc) -> Callable[..., np.ndarray]:
    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.broadcast_arrays(a, b)
        x, y = (np.ascontiguousarray(t, np.uint32)[:, None].view(np.float16) for t in (a, b))
        return np.ascontiguousarray(op(x, y)).view(np.uint32)[:, 0]

    return both


OPS: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a, "xor": np.bitwise_xor, "and": np.bitwise_and, "or": np.bitwise_or, "shr": np.right_shift,
    "shl": np.left_shift, "prmt": _bytes_of, "sub": _halves(np.subtract), "mul": _halves(np.multiply),
}  # fmt: skip
G = np.random.default_rng(0)


def registers(x: np.ndarray) -> np.ndarray:
    """[n, 4] bytes, or [n, 2] halves, as uint32 [n]."""
    return np.ascontiguousarray(x).view(np.uint32)[:, 0]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("form", [BARE, SCALED, AFFINE])
def test_codes(bits: int, form: int) -> None:
    planes = 1 if bits == 8 else 8 // bits if 8 % bits == 0 else 8
    low, high = (G.integers(0, 256, (64, 4), dtype=np.uint8) for _ in range(2))
    factor = G.uniform(0.01, 2, (64, 4)).astype(np.float16)
    zero = G.integers(-127, 128, (64, 4)).astype(np.int8)
    for plane in range(planes):
        shift = plane * bits % 8
        code = ((low.astype(int) | high.astype(int) << 8) >> shift) & ((1 << bits) - 1)
        for middle in (False, True):
            if bits == 8 and (form == AFFINE or not middle):
                continue  # those are read as f32
            if bits == 8:
                expected = low.view(np.int8).astype(int)
            else:
                expected = code - (zero.astype(int) if form == AFFINE else (1 << (bits - 1)) * middle)
            at = (((bits - 2) * 8 + shift) * 3 + form) * 2 + middle
            assert PROGRAMS[at] == instructions(bits, shift, form, middle)
            zeros = run(ZEROS, registers(zero))
            found = run(
                PROGRAMS[at], registers(low), registers(high), registers(factor[:, :2]), registers(factor[:, 2:]),
                registers(zeros[:, :2]), registers(zeros[:, 2:]),
            )  # fmt: skip
            values = expected.astype(np.float16)
            assert np.array_equal(found, values if form == BARE else values * factor), (shift, middle)


def test_floats_of_8_bits() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(64, 4)
    plain = codes.astype(int)
    expected = ((plain & 0x7F) << 7 | (plain & 0x80) << 8).astype(np.uint16).view(np.float16)
    assert np.array_equal(run(E4M3, registers(codes)), expected)
    wide = (plain << 8).astype(np.uint16).view(np.float16)
    assert np.array_equal(run(E5M2, registers(codes)), wide, equal_nan=True)


def test_zero_points() -> None:
    zero = np.arange(-128, 128).astype(np.int8).reshape(64, 4)
    assert np.array_equal(run(ZEROS, registers(zero)), 1664 + zero.astype(np.float16))


def test_a_wrong_shift_is_seen() -> None:
    low = registers(G.integers(0, 256, (64, 4), dtype=np.uint8))
    assert not np.array_equal(run(instructions(4, 0, BARE, False), low), run(instructions(4, 4, BARE, False), low))
