"""The block types of GGUF: what integers a block holds, what they stand for, and their bytes.

A row is cut into blocks. A block of a plain type (32 values) holds a float16 scale d and, where it is affine, a
float16 offset m:   x = d q   or   x = d q + m. MXFP4 holds a power of two instead and looks its values up, IQ4_NL looks
them up too. A block of a K type (256 values) has 8 or 16 parts with integer scales (and mins) of their own:
x = (d s) q   or   x = (d s) q - (m t). Products are taken in float32 in this order, as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.errors import nearest
from qfx.numerics import F4_VALUES

# ggml's non-linear 4-bit values
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TABLES = {"IQ4_NL": IQ4_VALUES, "MXFP4": F4_VALUES}


@dataclass(frozen=True)
class BlockType:
    """size: values of a block. nbytes: its bytes. low, high: range of the codes. parts: with scales of their own.

    scale_low, scale_high: range of the integer scales; mins have the same. affine: there is an offset.
    """

    name: str
    size: int
    nbytes: int
    low: int
    high: int
    affine: bool = False
    parts: int = 1
    scale_low: int = 0
    scale_high: int = 0

    @property
    def table(self) -> tuple[float, ...] | None:
        """The values that codes look up; None where a code is its own value."""
        return _TABLES.get(self.name)

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row; `columns` is a multiple of the block size."""
        assert columns % self.size == 0, (self.name, columns)
        return columns // self.size * self.nbytes


_ALL = (
    BlockType("Q4_0", 32, 18, -8, 7),
    BlockType("Q4_1", 32, 20, 0, 15, affine=True),
    BlockType("Q5_0", 32, 22, -16, 15),
    BlockType("Q5_1", 32, 24, 0, 31, affine=True),
    BlockType("Q8_0", 32, 34, -127, 127),
    BlockType("IQ4_NL", 32, 18, 0, 15),
    BlockType("MXFP4", 32, 17, 0, 15),
    BlockType("Q2_K", 256, 84, 0, 3, affine=True, parts=16, scale_low=0, scale_high=15),
    BlockType("Q3_K", 256, 110, -4, 3, parts=16, scale_low=-32, scale_high=31),
    BlockType("Q4_K", 256, 144, 0, 15, affine=True, parts=8, scale_low=0, scale_high=63),
    BlockType("Q5_K", 256, 176, 0, 31, affine=True, parts=8, scale_low=0, scale_high=63),
    BlockType("Q6_K", 256, 210, -32, 31, parts=16, scale_low=-128, scale_high=127),
)
BLOCK_TYPES = {kind.name: kind for kind in _ALL}


def block_type(name: str) -> BlockType:
    """The type of that name. Raises ValueError with the nearest one where there is none."""
    if name not in BLOCK_TYPES:
        raise ValueError(f"unknown GGUF block type {name!r}: {nearest(name, BLOCK_TYPES)}")
    return BLOCK_TYPES[name]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The integers of B blocks.

    codes: int8 (uint8 where codes are not negative) [B, size]. d: float16 [B]; for MXFP4 uint8, the exponent plus 127.
    m: float16 [B] of affine types. scales, mins: int16 [B, parts] of K types; mins where they are affine.
    """

    kind: BlockType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None

    def values(self) -> Tensor:
        """f32 [B, size]."""
        kind, d = self.kind, _scale(self.kind, self.d)
        q = self.codes.to(torch.float32)
        if kind.table is not None:
            table = torch.tensor(kind.table, dtype=torch.float32, device=q.device)
            q = table[self.codes.to(torch.int64)]
        if self.scales is None:
            q = q * d[:, None]
            return q if self.m is None else q + self.m.to(torch.float32)[:, None]
        q = q.reshape(len(q), kind.parts, -1) * (d[:, None] * self.scales.to(torch.float32))[..., None]
        if self.m is not None and self.mins is not None:
            q = q - (self.m.to(torch.float32)[:, None] * self.mins.to(torch.float32))[..., None]
        return q.flatten(1)


def pack(blocks: Blocks) -> Tensor:
    """uint8 [B, nbytes], as a file holds them."""
    data = _PACK[blocks.kind.name](blocks)
    assert data.shape[-1] == blocks.kind.nbytes, (blocks.kind, data.shape)
    return data


def unpack(data: Tensor, kind: BlockType) -> Blocks:
    """The integers of uint8 [B, nbytes]."""
    assert data.dtype == torch.uint8 and data.shape[-1] == kind.nbytes, (data.dtype, data.shape, kind)
    return _UNPACK[kind.name](data, kind)


def exponent_scale(e: Tensor) -> Tensor:
    """2 ** (e - 127) of uint8 exponents, f32."""
    bits = e.to(torch.int32) << 23
    return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)  # 2 ** -127 is subnormal


def _scale(kind: BlockType, d: Tensor) -> Tensor:
    return exponent_scale(d) if kind.name == "MXFP4" else d.to(torch.float32)


# ------------------------------------------------------------------------------------------------ pieces of blocks


def _u8(x: Tensor) -> Tensor:
    return x.to(torch.int16).bitwise_and(255).to(torch.uint8)


def _f16_bytes(x: Tensor | None) -> Tensor:
    assert x is not None and x.dtype == torch.float16
    return x.contiguous().view(torch.uint8).reshape(-1, 2)


def _f16(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16).reshape(-1)


def _interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes [B, n] below 2**bits to bytes: 8/bits runs of `run` values over each other, the first in the low bits."""
    ways = 8 // bits
    runs = _u8(codes).reshape(len(codes), -1, ways, run)
    out = runs[:, :, 0].clone()
    for i in range(1, ways):
        out |= runs[:, :, i] << (i * bits)
    return out.flatten(1)


def _separate(data: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `_interleave`: uint8 [B, n]."""
    runs = data.reshape(len(data), -1, 1, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    separate: Tensor = (runs >> shifts) & (2**bits - 1)
    return separate.flatten(1)


def _top_bits(codes: Tensor) -> Tensor:
    """Bits of 32 codes [B, 32] (0 or 1) as 4 bytes, the first lowest."""
    return _interleave(codes.reshape(-1, 4, 8).transpose(1, 2).flatten(1), 1, 4)


def _from_top_bits(data: Tensor) -> Tensor:
    return _separate(data, 1, 4).reshape(-1, 8, 4).transpose(1, 2).flatten(1)


def _pack_six(s: Tensor, t: Tensor) -> Tensor:
    """8 scales and 8 mins of 6 bits [B, 8] in 12 bytes: the first 4 whole, the last 4 cut into 4 and 2 bits."""
    s, t = _u8(s), _u8(t)
    first = (s[:, :4] & 63) | ((s[:, 4:] >> 4) << 6)
    second = (t[:, :4] & 63) | ((t[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((t[:, 4:] & 15) << 4)], 1)


def _unpack_six(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data.split(4, 1)
    s = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    t = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return s.to(torch.int16), t.to(torch.int16)


# ------------------------------------------------------------------------------------------------ one pair a type


def _pack_plain(blocks: Blocks) -> Tensor:
    kind, low = blocks.kind, min(blocks.kind.low, 0)
    head = [blocks.d[:, None] if kind.name == "MXFP4" else _f16_bytes(blocks.d)]
    if kind.affine:
        head.append(_f16_bytes(blocks.m))
    if kind.name == "Q8_0":
        return torch.cat([*head, _u8(blocks.codes)], 1)
    stored = _u8(blocks.codes.to(torch.int16) - low)
    if kind.high - kind.low > 15:
        head.append(_top_bits(stored >> 4))
    return torch.cat([*head, _interleave(stored & 15, 4, 16)], 1)


def _unpack_plain(data: Tensor, kind: BlockType) -> Blocks:
    if kind.name == "MXFP4":
        return Blocks(kind, _separate(data[:, 1:], 4, 16), data[:, 0])
    d, rest = _f16(data[:, :2]), data[:, 2:]
    m = None
    if kind.affine:
        m, rest = _f16(rest[:, :2]), rest[:, 2:]
    if kind.name == "Q8_0":
        return Blocks(kind, rest.contiguous().view(torch.int8), d)
    if kind.high - kind.low > 15:
        stored = _separate(rest[:, 4:], 4, 16) | (_from_top_bits(rest[:, :4]) << 4)
    else:
        stored = _separate(rest, 4, 16)
    return Blocks(kind, stored if kind.low >= 0 else stored.to(torch.int8) + kind.low, d, m)


def _pack_q2(blocks: Blocks) -> Tensor:
    assert blocks.scales is not None and blocks.mins is not None
    both = _u8(blocks.scales) | (_u8(blocks.mins) << 4)
    return torch.cat([both, _interleave(blocks.codes, 2, 32), _f16_bytes(blocks.d), _f16_bytes(blocks.m)], 1)


def _unpack_q2(data: Tensor, kind: BlockType) -> Blocks:
    both, codes, d, m = data.split([16, 64, 2, 2], 1)
    s, t = (both & 15).to(torch.int16), (both >> 4).to(torch.int16)
    return Blocks(kind, _separate(codes, 2, 32), _f16(d), _f16(m), s, t)


def _pack_q3(blocks: Blocks) -> Tensor:
    assert blocks.scales is not None
    stored, s = _u8(blocks.codes.to(torch.int16) + 4), _u8(blocks.scales + 32)
    scales = torch.cat([_interleave(s & 15, 4, 8), _interleave(s >> 4, 2, 4)], 1)
    high = _interleave(stored >> 2, 1, 32)
    return torch.cat([high, _interleave(stored & 3, 2, 32), scales, _f16_bytes(blocks.d)], 1)


def _unpack_q3(data: Tensor, kind: BlockType) -> Blocks:
    high, low, scales, d = data.split([32, 64, 12, 2], 1)
    s = _separate(scales[:, :8], 4, 8) | (_separate(scales[:, 8:], 2, 4) << 4)
    codes = _separate(low, 2, 32) | (_separate(high, 1, 32) << 2)
    return Blocks(kind, codes.to(torch.int8) - 4, _f16(d), scales=s.to(torch.int16) - 32)


def _pack_q45(blocks: Blocks) -> Tensor:
    assert blocks.scales is not None and blocks.mins is not None
    stored = _u8(blocks.codes)
    head = [_f16_bytes(blocks.d), _f16_bytes(blocks.m), _pack_six(blocks.scales, blocks.mins)]
    if blocks.kind.high > 15:
        head.append(_interleave(stored >> 4, 1, 32))
    return torch.cat([*head, _interleave(stored & 15, 4, 32)], 1)


def _unpack_q45(data: Tensor, kind: BlockType) -> Blocks:
    d, m, six, rest = data.split([2, 2, 12, data.shape[1] - 16], 1)
    codes = _separate(rest[:, -128:], 4, 32)
    if kind.high > 15:
        codes = codes | (_separate(rest[:, :32], 1, 32) << 4)
    return Blocks(kind, codes, _f16(d), _f16(m), *_unpack_six(six))


def _pack_q6(blocks: Blocks) -> Tensor:
    assert blocks.scales is not None
    stored = _u8(blocks.codes.to(torch.int16) + 32)
    low, high = _interleave(stored & 15, 4, 64), _interleave(stored >> 4, 2, 32)
    return torch.cat([low, high, _u8(blocks.scales), _f16_bytes(blocks.d)], 1)


def _unpack_q6(data: Tensor, kind: BlockType) -> Blocks:
    low, high, s, d = data.split([128, 64, 16, 2], 1)
    codes = _separate(low, 4, 64) | (_separate(high, 2, 32) << 4)
    scales = s.contiguous().view(torch.int8).to(torch.int16)
    return Blocks(kind, codes.to(torch.int8) - 32, _f16(d), scales=scales)


_PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
_PACK: dict[str, Callable[[Blocks], Tensor]] = {
    **dict.fromkeys(_PLAIN, _pack_plain),
    "Q2_K": _pack_q2,
    "Q3_K": _pack_q3,
    "Q4_K": _pack_q45,
    "Q5_K": _pack_q45,
    "Q6_K": _pack_q6,
}
_UNPACK: dict[str, Callable[[Tensor, BlockType], Blocks]] = {
    **dict.fromkeys(_PLAIN, _unpack_plain),
    "Q2_K": _unpack_q2,
    "Q3_K": _unpack_q3,
    "Q4_K": _unpack_q45,
    "Q5_K": _unpack_q45,
    "Q6_K": _unpack_q6,
}
