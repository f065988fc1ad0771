"""Packed weights and blocks of the same values, both ways."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from qfx.format import Format
from qfx.interop.gguf_blocks import Blocks, block_type, pack, unpack
from qfx.interop.gguf_encode import encode
from qfx.interop.gguf_exact import Exact, as_blocks, as_packed
from qfx.packing import Packed, pack_weight


def weight(rows: int = 8, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.1


def values(held: Exact, shape: tuple[int, ...]) -> Tensor:
    kind = block_type(held.kind)
    return unpack(held.data.reshape(-1, kind.nbytes), kind).values().reshape(shape)


@pytest.mark.parametrize(
    ("fmt", "kind"),
    [
        ("i8/g32/f16", "Q8_0"), ("i8/ch/f16", "Q8_0"), ("i8/g128/f16", "Q8_0"), ("i8/f16", "Q8_0"),
        ("i4/g32/f16", "Q4_0"), ("i4/g64/f16", "Q4_0"), ("i3/g32/f16", "Q4_0"), ("i2/g128/f16", "Q4_0"),
        ("i5/g32/f16", "Q5_0"), ("i6/g32/f16", "Q8_0"), ("i4/b4x64/f16", "Q4_0"),
        ("u4/g32/f16", "Q5_0"), ("u3/g32/f16", "Q4_0"), ("u2/g64/f16", "Q4_0"), ("u6/ch/f16", "Q8_0"),
        ("f4e2m1/g32/e8m0", "MXFP4"),
    ],
)  # fmt: skip
def test_values_are_the_same(fmt: str, kind: str) -> None:
    packed = pack_weight(weight(), Format.parse(fmt))
    held = as_blocks(packed)
    assert isinstance(held, Exact) and held.kind == kind and held.scale_error == 0
    assert torch.equal(values(held, packed.shape), packed.dequantize()), "bit for bit"


def test_scales_that_float16_does_not_hold_are_told() -> None:
    packed = pack_weight(weight(), Format.parse("i4/g32"))
    held = as_blocks(packed)
    assert isinstance(held, Exact) and 0 < held.scale_error <= 2**-11
    off = (values(held, packed.shape) - packed.dequantize()).abs() / packed.dequantize().abs().clamp_min(1e-9)
    assert 0 < float(off.max()) <= 2**-10


@pytest.mark.parametrize(
    ("fmt", "columns", "reason"),
    [
        ("i4/g16/f16", 128, "a scale for each 16 columns, blocks for 32"),
        ("i4/g32/f16", 80, "80 columns are no whole number of blocks of 32"),
        ("nf4/g64", 128, "no block type holds nf4/g64"),
        ("f8e4m3/ch", 128, "no block type holds f8e4m3/ch"),
        ("u8/ch/f16", 128, "its codes lie in .*, those of Q8_0 in -127 to 127"),
    ],
)
def test_reasons_against(fmt: str, columns: int, reason: str) -> None:
    w = weight(columns=columns).abs() + (torch.arange(columns) == 0)
    held = as_blocks(pack_weight(w, Format.parse(fmt)))
    assert isinstance(held, str)
    assert re.search(reason, held), held


def test_scales_beyond_float16_are_a_reason() -> None:
    held = as_blocks(pack_weight(weight() * 1e-9, Format.parse("i4/g32")))
    assert held == "its scales are beyond float16"


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("Q8_0", "i8/g32/f16"), ("Q4_0", "i4/g32/f16"), ("Q5_0", "i5/g32/f16"), ("MXFP4", "f4e2m1/g32/e8m0"),
        ("Q6_K", "i6/g16"), ("Q3_K", "i3/g16"),
    ],
)  # fmt: skip
def test_blocks_become_packed(name: str, fmt: str) -> None:
    w = weight(4, 256)
    data, kind = encode(w, name), block_type(name)
    packed = as_packed(data, name, (4, 256))
    assert isinstance(packed, Packed) and str(packed.format) == fmt
    assert torch.equal(packed.dequantize(), unpack(data.reshape(-1, kind.nbytes), kind).values().reshape(4, 256))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q5_0", "MXFP4"])
def test_there_and_back_are_the_same_bytes(name: str) -> None:
    """Of float16 weights: any d that a file may hold comes back, negative ones too."""
    data = encode(weight(4, 256), name)
    packed = as_packed(data, name, (4, 256))
    assert isinstance(packed, Packed)
    held = as_blocks(packed)
    assert isinstance(held, Exact) and held.kind == name and torch.equal(held.data, data)


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_offsets_of_whole_steps_become_zero_points(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    kind = block_type(name)
    codes = torch.randint(0, kind.high + 1, (8, 32), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, kind.high + 1, (8,), generator=generator)
    d = torch.full((8,), 0.25, dtype=torch.float16)
    data = pack(Blocks(kind, codes, d, (-zero * 0.25).half())).reshape(2, -1)
    packed = as_packed(data, name, (2, 128))
    assert isinstance(packed, Packed) and str(packed.format) == f"{'u4' if name == 'Q4_1' else 'u5'}/g32/f16"
    assert torch.equal(packed.dequantize().reshape(8, 32), (codes - zero[:, None]) * 0.25)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Q4_K", "no format has the values of Q4_K"),
        ("IQ4_NL", "no format"),
        ("Q4_1", "offsets that are no whole steps"),
    ],
)
def test_blocks_without_a_format(name: str, reason: str) -> None:
    held = as_packed(encode(weight(4, 256), name), name, (4, 256))
    assert isinstance(held, str) and reason in held


def test_an_exponent_that_is_no_number() -> None:
    data = encode(weight(4, 256), "MXFP4")
    data[0, 0] = 255
    assert as_packed(data, "MXFP4", (4, 256)) == "an exponent of 255 stands for no number"
