"""Blocks of GGUF against the decoder of the gguf package, on random bytes and on random integers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qfx.interop.gguf_blocks import BLOCK_TYPES, Blocks, BlockType, block_type, pack, unpack

NAMES = sorted(BLOCK_TYPES)
HALVES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "MXFP4": []}


def random_bytes(kind: BlockType, count: int = 64) -> Tensor:
    """Any bytes, but float16 numbers that are finite; an exponent of MXFP4 that does not overflow."""
    generator = torch.Generator().manual_seed(len(kind.name) + kind.nbytes)
    data = torch.randint(0, 256, (count, kind.nbytes), dtype=torch.uint8, generator=generator)
    for at in HALVES.get(kind.name, [0, 2] if kind.affine else [0]):
        data[:, at + 1] &= 0xBF  # no exponent of all ones
    if kind.name == "MXFP4":
        data[:, 0] %= 250
    return data


def oracle(data: Tensor, name: str) -> Tensor:
    gguf = pytest.importorskip("gguf", reason="the container and the oracle: pip install qfx[interop]")
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_gguf_package(name: str) -> None:
    kind = block_type(name)
    data = random_bytes(kind)
    found, wanted = unpack(data, kind).values(), oracle(data, name)
    assert found.dtype == torch.float32 and found.shape == (64, kind.size)
    assert torch.equal(found, wanted), "bit for bit"


@pytest.mark.parametrize("name", NAMES)
def test_bytes_come_back(name: str) -> None:
    kind = block_type(name)
    data = random_bytes(kind)
    assert torch.equal(pack(unpack(data, kind)), data)


@pytest.mark.parametrize("name", NAMES)
def test_integers_come_back(name: str) -> None:
    kind = block_type(name)
    rng = np.random.default_rng(7)
    codes = torch.from_numpy(rng.integers(kind.low, kind.high + 1, (5, kind.size)))
    d = torch.from_numpy(rng.normal(size=5).astype(np.float16))
    if name == "MXFP4":
        d = torch.from_numpy(rng.integers(100, 140, 5).astype(np.uint8))
    ranges = (kind.scale_low, kind.scale_high + 1, (5, kind.parts))
    scales = torch.from_numpy(rng.integers(*ranges)).to(torch.int16) if kind.parts > 1 else None
    mins = torch.from_numpy(rng.integers(*ranges)).to(torch.int16) if kind.parts > 1 and kind.affine else None
    m = torch.from_numpy(rng.normal(size=5).astype(np.float16)) if kind.affine else None
    blocks = Blocks(kind, codes.to(torch.uint8 if kind.low >= 0 else torch.int8), d, m, scales, mins)
    back = unpack(pack(blocks), kind)
    for field in ("codes", "d", "m", "scales", "mins"):
        before, after = getattr(blocks, field), getattr(back, field)
        assert (before is None) == (after is None), field
        assert before is None or (before.dtype == after.dtype and torch.equal(before, after)), field


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the container and the oracle: pip install qfx[interop]")
    kind = block_type(name)
    assert (kind.size, kind.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert kind.row_bytes(512) == 512 // kind.size * kind.nbytes


def test_a_bit_in_the_wrong_place_is_seen() -> None:
    """The negative control of the comparison: exchanged halves of the codes are other values."""
    kind = block_type("Q4_K")
    data = random_bytes(kind)
    turned = torch.cat([data[:, :16], data[:, 16:].roll(32, 1)], 1)
    assert not torch.equal(unpack(turned, kind).values(), oracle(data, "Q4_K"))


def test_an_unknown_type_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown GGUF block type 'Q4K': did you mean 'Q4_K'"):
        block_type("Q4K")
