"""Encoders: their error against the gguf package's and against bounds; weights by energy; refusal of bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.interop.gguf_blocks import BLOCK_TYPES, BlockType, block_type, unpack
from qfx.interop.gguf_encode import encode

NAMES = sorted(BLOCK_TYPES)
# Relative squared error on normal numbers, of which the best known encoders leave about as much.
BOUNDS = {
    "Q8_0": 3e-5, "Q6_K": 3.1e-4, "Q5_1": 1.25e-3, "Q5_K": 1.3e-3, "Q5_0": 1.75e-3, "Q4_1": 5.2e-3, "Q4_K": 5.2e-3,
    "IQ4_NL": 5.7e-3, "Q4_0": 7e-3, "MXFP4": 1.3e-2, "Q3_K": 2.2e-2, "Q2_K": 7.5e-2,
}  # fmt: skip


def normal(rows: int = 24, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def decoded(data: Tensor, name: str) -> Tensor:
    kind = block_type(name)
    return unpack(data.reshape(-1, kind.nbytes), kind).values().reshape(len(data), -1)


def error(w: Tensor, data: Tensor, name: str, by: Tensor | float = 1.0) -> float:
    return float((by * (decoded(data, name) - w).square()).sum() / (by * w.square()).sum())


@pytest.mark.parametrize("name", NAMES)
def test_errors_on_normal_numbers(name: str) -> None:
    w = normal()
    data = encode(w, name)
    assert data.dtype == torch.uint8 and data.shape == (24, block_type(name).row_bytes(512))
    assert error(w, data, name) <= BOUNDS[name]


def test_more_bits_leave_less_error() -> None:
    w = normal(seed=3)
    ranked = sorted(BOUNDS, key=lambda name: error(w, encode(w, name), name))
    assert ranked[0] == "Q8_0" and ranked[1] == "Q6_K" and ranked[-1] == "Q2_K"


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_no_worse_than_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the peer: pip install qfx[interop]")
    w = normal(seed=1) * (1 + 20 * (torch.rand(24, 512, generator=torch.Generator().manual_seed(2)) < 0.004))
    peer = torch.from_numpy(gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[name]))
    assert error(w, encode(w, name), name) < error(w, peer, name)


@pytest.mark.parametrize("name", NAMES)
def test_energy_lowers_the_weighted_error(name: str) -> None:
    w = normal(seed=5)
    energy = torch.rand(512, generator=torch.Generator().manual_seed(6)).pow(6) + 1e-3
    assert error(w, encode(w, name, energy), name, energy) < error(w, encode(w, name), name, energy)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_block_holds_comes_back(name: str) -> None:
    """Values of blocks, encoded again, are the same values."""
    w = decoded(encode(normal(8, 256, seed=9), name), name)
    again = decoded(encode(w, name), name)
    two_levels = {"Q2_K": 0.03, "Q4_K": 3e-3, "Q5_K": 4e-3}  # where other integers are as good
    assert float((again - w).norm() / w.norm()) <= two_levels.get(name, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zero(name: str) -> None:
    w = torch.zeros(3, 512)
    w[1] = normal(1)
    found = decoded(encode(w, name), name)
    assert torch.equal(found[0], torch.zeros(512)) and torch.equal(found[2], torch.zeros(512))
    assert float(found[1].abs().max()) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_any_magnitude(name: str, scale: float) -> None:
    w = normal(4) / 0.03 * scale
    assert error(w, encode(w, name), name) <= 1.15 * BOUNDS[name] + (0.02 if scale == 1e-4 else 0)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**16), shift=st.floats(-3, 3), spread=st.just(0.0) | st.floats(0.01, 3.0))
@settings(max_examples=12, deadline=None)
def test_no_value_is_far_off(name: str, seed: int, shift: float, spread: float) -> None:
    """Shifted, one-sided and constant rows: the error of a row is at most that of writing zeros, and finite."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(2, 256, generator=generator) * spread + shift
    found = decoded(encode(w, name), name)
    assert bool(torch.isfinite(found).all())
    held = 1e-4  # 512 values of 4e-6: the largest whose scale is 0 in float16
    assert float((found - w).norm()) <= 0.6 * float(w.norm()) + held


def test_rows_do_not_depend_on_each_other() -> None:
    w = normal(700, 512, seed=4)  # more than is searched at once
    whole = encode(w, "Q4_K")
    assert torch.equal(whole[600:], encode(w[600:], "Q4_K"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    w = normal(4).to(dtype)
    assert torch.equal(encode(w, "Q4_0"), encode(w.float(), "Q4_0"))


def test_columns_without_energy_are_kept_near() -> None:
    """A dead column has little to say about the scale, but is rounded to the nearest code."""
    w = normal(8)
    energy = torch.ones(512)
    energy[7] = 0
    off = (decoded(encode(w, "Q4_0", energy), "Q4_0") - w)[:, 7].abs()
    assert float(off.max()) < 0.03


def test_energy_of_nothing_is_no_energy() -> None:
    w = normal(4)
    assert torch.equal(encode(w, "Q4_K", torch.zeros(512)), encode(w, "Q4_K"))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_is_named(bad: float) -> None:
    w = normal(4)
    w[1, 3] = bad
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight.*not finite"):
        encode(w, "Q4_K", tensor="blk.0.ffn_up.weight")


def test_values_beyond_float16_are_refused() -> None:
    w = normal(2)
    w[0, 0] = 1e9
    with pytest.raises(ValueError, match=r"weight holds values that Q4_0 cannot[\s\S]*at most 524032[\s\S]*1e\+09"):
        encode(w, "Q4_0")
    assert float(decoded(encode(w, "MXFP4"), "MXFP4").abs().max()) > 9e8


def test_a_width_that_the_block_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="192 columns are no whole number of Q4_K blocks of 256"):
        encode(torch.ones(2, 192), "Q4_K")


def test_an_unknown_type() -> None:
    with pytest.raises(ValueError, match="unknown GGUF block type 'Q9'"):
        encode(torch.ones(2, 256), "Q9")


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_factor_of_a_row_makes_its_error_less(name: str, weighted: bool) -> None:
    """Rows as they are have the least error; stretched to the length of the weight they would have more."""
    w = normal(16, 512, seed=8)
    energy = torch.rand(512, generator=torch.Generator().manual_seed(6)) if weighted else torch.ones(512)
    found = decoded(encode(w, name, energy if weighted else None), name)
    best = (energy * found * w).sum(1) / (energy * found * found).sum(1)
    assert float((best - 1).abs().max()) <= (0.015 if name == "Q2_K" else 4e-3)
    stretched = found * ((energy * w * w).sum(1) / (energy * found * w).sum(1))[:, None]
    assert float((energy * (found - w).square()).sum()) < float((energy * (stretched - w).square()).sum())


def test_codes_stay_in_their_range() -> None:
    for kind in BLOCK_TYPES.values():
        assert isinstance(kind, BlockType)
        codes = unpack(encode(normal(4) ** 3, kind.name).reshape(-1, kind.nbytes), kind).codes
        assert int(codes.min()) >= kind.low and int(codes.max()) <= kind.high
