"""Register contents as numbers: registers hold unsigned words, instructions say how these are to be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]

WORDS: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_WORDS = ("f16x2", "bf16x2", "s16x2", "u16x2", "tf32")
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def bits_of(kind: str) -> int:
    """Of a PTX type such as s32 or bf16x2."""
    if kind in _WORDS:
        return 32
    return 16 if kind == "bf16" else int(kind[1:])


def dtype_of(kind: str) -> np.dtype[Any]:
    """In what numpy holds a PTX type; that of bf16 is its word."""
    if kind in _WORDS or kind == "bf16":
        return np.dtype(WORDS[bits_of(kind)])
    return np.dtype(f"{_KINDS[kind[0]]}{int(kind[1:]) // 8}")


def read(word: Array, kind: str) -> Array:
    """A register as numbers of a type; of a wider register the low bits."""
    dtype = dtype_of(kind)
    if word.dtype.itemsize != dtype.itemsize:
        assert word.dtype.itemsize > dtype.itemsize, f"a register of {word.dtype} read as {kind}"
        word = word.astype(WORDS[8 * dtype.itemsize])
    return word.view(dtype)


def word_of(number: Array, bits: int) -> Array:
    """Numbers as words of a register: integers are extended by their sign, or by zeros."""
    size = 8 * number.dtype.itemsize
    if size == bits:
        return number.view(WORDS[bits])
    assert size < bits and number.dtype.kind in "iu", f"{number.dtype} for a register of {bits} bits"
    return number.astype(np.dtype(f"i{bits // 8}") if number.dtype.kind == "i" else WORDS[bits]).view(WORDS[bits])


def from_bf16(word: Array) -> Array:
    """bf16 as f32."""
    return (word.astype(np.uint32) << 16).view(np.float32)


def to_bf16(number: Array) -> Array:
    """f32 or f64 to bf16, to the nearest, ties to even."""
    single = number.astype(np.float32)
    if number.dtype == np.float64:  # rounded once: a bit tells on which side of a tie the number lies
        back, word = single.astype(np.float64), single.view(np.uint32)
        off = np.isfinite(number) & (back != number) & (word & 1 == 0)
        single = np.where(off, np.where(np.abs(back) < np.abs(number), word | 1, word - 1 | 1), word).view(np.float32)
    word = single.view(np.uint32)
    rounded = (word + (0x7FFF + ((word >> 16) & 1))) >> 16
    return np.where(np.isnan(single), 0x7FFF, rounded).astype(np.uint16)


def pairs(word: Array) -> Array:
    """[n] words of 32 bits as [n, 2] words of 16, the low one first."""
    return np.ascontiguousarray(word).view(np.uint16).reshape(-1, 2)


def flushed(number: Array) -> Array:
    """f32 with subnormal numbers as zeros of their sign."""
    return np.where(np.abs(number) < np.float32(2.0**-126), np.copysign(np.float32(0), number), number)


def from_e4m3(codes: Array) -> Array:
    """Bytes of e4m3 as f32."""
    return _E4M3[codes]


def to_e4m3(number: Array) -> Array:
    """f32 to e4m3, to the nearest, saturating (`satfinite`)."""
    found = torch.from_numpy(np.clip(number, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isnan(number), np.uint8(0x7F), found)


_E4M3: Array = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
