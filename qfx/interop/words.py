"""Codes in 32-bit words, as compressed-tensors, GPTQ and AWQ store them, and zero points with and without the one that
GPTQ's first version takes off.

A row of unsigned codes is a dense little-endian bitstream: element i holds bits i*bits to (i+1)*bits - 1, the same as
`qfx.packing`, filled up with zero bits to whole words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import dtype_name
from qfx.packing import pack_bits, unpack_bits

WORD = 32


def width(count: int, bits: int) -> int:
    """Words of a row of `count` codes."""
    return -(-count * bits // WORD)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [R, C] below 2**bits to int32 [R, ceil(C * bits / 32)]."""
    data = pack_bits(codes, bits)
    missing = width(codes.shape[-1], bits) * 4 - data.shape[-1]
    full = torch.nn.functional.pad(data, (0, missing))
    return full.reshape(-1).view(torch.int32).reshape(full.shape[0], -1)


def unpack_words(words: Tensor, bits: int, count: int, name: str) -> Tensor:
    """int32 [R, ceil(count * bits / 32)] to unsigned codes, uint8 [R, count]. ValueError, naming the tensor, else."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != width(count, bits):
        raise ValueError(
            explain(
                f"{name!r} does not hold {count} codes of {bits} bits a row",
                expected=f"int32, {width(count, bits)} words a row",
                found=f"{dtype_name(words.dtype)}, shape {list(words.shape)}",
            )
        )
    data = words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)
    return unpack_bits(data[:, : -(-count * bits // 8)], bits, count)


def unpack_padded_words(words: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack_words`, from words of floor(32 / bits) whole codes each: compressed-tensors before 0.17."""
    each = WORD // bits
    shifts = torch.arange(each, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def less_one(zeros: Tensor) -> Tensor:
    """Zero points as the first version of GPTQ's layout stores them: z - 1 (uint8; z is at least 1)."""
    assert int(zeros.min()) >= 1, "a zero point of 0 has no form there"
    return zeros - 1


def plus_one(words: Tensor, bits: int, count: int, name: str) -> tuple[Tensor, bool]:
    """Zero points from words that hold z - 1; the flag tells that some were 0, which the layout does not hold for sure.

    A field of all ones is z = 0. GPTQModel takes one from every field of a word at once, with a borrow, and gives it
    back the same way; this is undone here where no field spans two words.
    """
    stored = unpack_words(words, bits, count, name)
    below = bool((stored == (1 << bits) - 1).any())
    if below and WORD % bits == 0:
        ones = sum(1 << shift for shift in range(0, WORD, bits))
        total = (words.to(torch.int64) + ones) & 0xFFFFFFFF
        return unpack_words(total.to(torch.int32), bits, count, name), True
    return (stored.to(torch.int16) + 1).to(torch.uint8) & ((1 << bits) - 1), below
