"""Double quantization: scales in 8 bits themselves (QLoRA, Dettmers et al. 2023, section 3), as bitsandbytes has them.

    scale = table[code] * block + mean      code uint8, block f32 for each 256 scales (flat, row-major), mean f32

The table holds the values of the signed dynamic 8-bit type, see `dynamic_map`. What stands above the codes travels as
one f32 tensor [1 + blocks]: the mean, then the blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 256  # scales of a block


def _dynamic() -> Tensor:
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return torch.cat(values).sort().values


_TABLE = _dynamic()  # made here, not when it is first needed: Dynamo would trace its making into the graph


def dynamic_map() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, float32.

    0, 1, and for each power of ten 10^-6 to 1 the middles of 2^i equal parts of [0.1, 1], i = 0 to 6, with both signs
    (8-bit Approximations for Parallelism in Deep Learning, Dettmers 2015, section 2.2).
    """
    return _TABLE.clone()


def above(scale: Tensor) -> Tensor:
    """Mean and block scales, f32 [1 + blocks], for f32 scales of any shape."""
    flat = scale.reshape(-1)
    mean = flat.mean() if flat.numel() else flat.new_zeros(())
    blocks = torch.nn.functional.pad(flat - mean, (0, -flat.numel() % SIZE)).reshape(-1, SIZE)
    return torch.cat([mean.reshape(1), blocks.abs().amax(1) if len(blocks) else flat.new_zeros(0)])


def encode(scale: Tensor, whole: Tensor) -> Tensor:
    """The codes, uint8 of the same shape, nearest to f32 scales under `above`."""
    spread = _spread(whole, scale.shape)
    steps = (scale - whole[0]) / torch.where(spread > 0, spread, torch.ones_like(spread))
    table = _TABLE.to(scale.device)
    return torch.bucketize(steps.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.uint8)


def decode(codes: Tensor, whole: Tensor) -> Tensor:
    """The f32 scales of codes."""
    table = _TABLE.to(codes.device)
    values = table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)
    return values * _spread(whole, codes.shape) + whole[0]


def nbytes(scales: int) -> int:
    """Bytes of that many scales: codes, block scales, mean."""
    return scales + 4 * (1 + -(-scales // SIZE))


def _spread(whole: Tensor, shape: torch.Size) -> Tensor:
    return whole[1:].repeat_interleave(SIZE)[: shape.numel()].reshape(shape)
