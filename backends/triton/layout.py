"""Codes of a few bits as kernels unpack them: a byte's codes are far apart, neighbours lie side by side.

Within a unit of K, which has unit * bits / 8 bytes, byte j holds the codes

    j, j + part, j + 2 part, ...    part = unit * bits / 8, the first in the lowest bits

so that shifting and masking a tile of bytes gives contiguous columns: 8 / bits tiles, each times its own part of x, and
no interleaving in registers. 3 bits are two planes, see `pack_three`: the units of both meet in the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 128  # columns
UNIT_THREE = 256  # columns of a unit of the upper of three bits, two units of the lower two


def padded(k: int, unit: int = UNIT) -> int:
    """`k` columns rounded up to whole units."""
    return -(-k // unit) * unit


def pack_halves(codes: Tensor, bits: int, unit: int = UNIT) -> Tensor:
    """Unsigned codes uint8 [.., K] below 2**bits to uint8 [.., padded(K) * bits / 8]; bits 1, 2, 4 or 8.

    Symmetric codes come with their offset, q + 2^(bits-1). Padding is the code 0; kernels read x as 0 there.
    """
    assert codes.dtype == torch.uint8 and bits in (1, 2, 4, 8) and unit * bits % 8 == 0, (codes.dtype, bits, unit)
    lead, k = codes.shape[:-1], codes.shape[-1]
    full = torch.nn.functional.pad(codes, (0, padded(k, unit) - k))
    parts = full.reshape(*lead, full.shape[-1] // unit, 8 // bits, unit * bits // 8)
    data = parts[..., 0, :].clone()
    for i in range(1, 8 // bits):
        data |= parts[..., i, :] << (i * bits)
    return data.flatten(-2).contiguous()


def pack_three(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Unsigned codes uint8 [.., K] below 8 to the lower two bits [.., Kp / 4] and the upper bit [.., Kp / 8].

    Kp = K padded to 256. Byte j of the upper plane's unit, 32 bytes, holds the upper bits of the four codes in byte j
    of the lower plane's first unit in bits 0, 2, 4, 6, and those of its second unit in bits 1, 3, 5, 7: shifted as a
    whole they lie above the lower two.
    """
    full = torch.nn.functional.pad(codes, (0, padded(codes.shape[-1], UNIT_THREE) - codes.shape[-1]))
    return pack_halves(full & 3, 2), pack_halves(_interleaved(full >> 2, 2, 4), 1, UNIT_THREE)


def _interleaved(codes: Tensor, a: int, b: int) -> Tensor:
    """Within units of 256, a x b parts of 32 columns in the order b x a."""
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // UNIT_THREE, a, b, 32)
    return parts.transpose(-3, -2).reshape(codes.shape)
