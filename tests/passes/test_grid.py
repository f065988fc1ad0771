"""Columns rounded one by one are what the whole matrix is rounded to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import dequantize, fake_quantize, range_qparams, value_range
from qfx.packing import pack_weight
from qfx.passes._grid import Grid, scales

FORMATS = [
    *("i2/ch", "i4/g8", "i8", "u3/g8/f16", "u4/ch", "u8/g16", "i4/b4x8", "u4/b3x5"),
    *("nf4/g16", "f4e2m1/g8/e8m0", "f4e2m1/g16/e4m3", "f8e4m3/ch", "f8e5m2/g8/bf16"),
]


def weight(rows: int = 10, columns: int = 20) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def grid_of(w: Tensor, text: str) -> Grid:
    packed = pack_weight(w, Format.parse(text))
    return Grid(packed.format, *packed.params(), (w.shape[0], w.shape[1]))


@pytest.mark.parametrize("text", FORMATS)
def test_columns(text: str) -> None:
    w, fmt = weight(), Format.parse(text)
    packed, grid = pack_weight(w, fmt), grid_of(w, text)
    wanted = packed.dequantize()
    for rows in (slice(None), slice(3, 7)):
        for j in range(w.shape[1]):
            codes, values = grid.round(j, w[rows, j].contiguous(), rows)
            assert torch.equal(values, wanted[rows, j])
            kept = codes.to(fmt.code_dtype)
            assert torch.equal(kept.float(), packed.codes()[rows, j].float())


@pytest.mark.parametrize("text", ["i3/g8", "u3/g8", "u4/g8/f16", "f4e2m1/g8/e8m0"])
def test_scales_of_a_group_are_found_anew(text: str) -> None:
    w, fmt = weight(), Format.parse(text)
    grid = grid_of(w, text)
    before = grid.scale.float().clone()
    moved = 3 * w[2:6, 8:16]
    grid.refit(8, moved, slice(2, 6), None)
    changed = (grid.scale.float() != before).nonzero()
    assert changed[:, 0].unique().tolist() == [2, 3, 4, 5] and changed[:, 1].unique().tolist() == [1]
    column = Format(fmt.type, "ch", fmt.scale_type)
    found = torch.stack([grid.round(j, moved[:, j - 8].contiguous(), slice(2, 6))[1] for j in range(8, 16)], 1)
    assert torch.equal(found, fake_quantize(moved, column))
    assert torch.equal(
        dequantize(pack_weight(w, fmt).codes()[6:], fmt, grid.scale[6:], None if grid.zero is None else grid.zero[6:]),
        pack_weight(w, fmt).dequantize()[6:],
    ), "other rows are as they were"


def test_the_stored_scales_of_others_are_not_changed() -> None:
    packed = pack_weight(weight(), Format.parse("u3/g8"))
    kept = packed.scale.clone()
    Grid(packed.format, *packed.params(), (10, 20)).refit(0, 5 * weight()[:, :8], slice(None), None)
    assert torch.equal(packed.scale, kept)


@pytest.mark.parametrize("text", ["i4/ch", "u4/g8", "f8e4m3/ch", "nf4/g8"])
def test_what_lies_beyond(text: str) -> None:
    w = weight()
    grid = grid_of(w, text)
    columns = torch.arange(20)
    assert grid.beyond(columns, w.T, slice(None)) == 0
    greatest = torch.maximum(*(bound.abs().amax(1) for bound in value_range(w, Format.parse(text))))
    far = w.T.clone()
    far[4, 3], far[17, 8] = 4 * greatest[3], -4 * greatest[8]
    assert grid.beyond(columns, far, slice(None)) == 2
    assert grid.beyond(columns[16:], far[16:], slice(None)) == 1
    assert grid.beyond(columns, far[:, :5], slice(0, 5)) == 1


def test_searched_scales_mind_the_energy() -> None:
    w, fmt = weight(4, 16), Format.parse("i3/ch")
    w[:, 2] = 9.0
    plain = range_qparams(*value_range(w, fmt), fmt)
    assert torch.equal(scales(w, fmt, None).scale, plain.scale)
    energy = torch.ones(16)
    energy[2] = 0.0  # nothing is ever put into it
    assert (scales(w, fmt, energy).scale.abs() < 0.7 * plain.scale).all()
