"""qfx.rounding.hqq: half-quadratic scales and zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.format import Format
from qfx.numerics import choose_qparams
from qfx.rounding.hqq import _shrink, half_quadratic
from qfx.rounding.scales import rounded
from tests.qfx.rounding.test_scales import FORMATS, weight


def distance(w: Tensor, fmt: str, *, nearest: bool = False) -> float:
    f = Format.parse(fmt)
    return float((rounded(w, f, choose_qparams(w, f) if nearest else half_quadratic(w, f)) - w).abs().sum())


@pytest.mark.parametrize("fmt", ["u4/g16", "u3/g16", "u2/g16", "i4/g16", "i3/ch", "i2/g16", "u4/ch", "nf4/g16"])
def test_it_is_nearer_than_nearest_rounding(fmt: str) -> None:
    w = weight(16, 64, seed=1)
    assert distance(w, fmt) < 0.995 * distance(w, fmt, nearest=True)


@pytest.mark.parametrize(("fmt", "most"), [("u8/g32", 0.88), ("i8/g32", 0.9), ("u6/g32", 0.93)])
def test_of_many_bits_it_searches_steps(fmt: str, most: float) -> None:
    """Zero points are integers there, and leave no choice between codes: the steps are what is gained by."""
    w = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    assert distance(w, fmt) < most * distance(w, fmt, nearest=True)


@settings(deadline=None, max_examples=30)
@given(fmt=st.sampled_from(FORMATS), seed=st.integers(0, 1000), rows=st.integers(1, 6), columns=st.integers(1, 40))
def test_it_never_hurts(fmt: str, seed: int, rows: int, columns: int) -> None:
    w = weight(rows, columns, seed=seed)
    assert distance(w, fmt) <= distance(w, fmt, nearest=True) * (1 + 1e-5) + 1e-6


def test_zero_points_stay_integers_in_their_range() -> None:
    for shift in (0.3, -9, 9):
        found = half_quadratic(weight(32, 64, seed=2) + shift, Format.parse("u2/g16"))
        assert found.zero is not None and found.zero.dtype == torch.uint8 and int(found.zero.max()) <= 3


def test_shrink_is_the_proximal_operator() -> None:
    """Against a fine grid: e that minimises |e|^p + beta' / 2 (e - x)^2 is near to it, 0 for small x, x for large."""
    x = torch.linspace(-2, 2, 41)
    found = _shrink(x, 10.0)
    assert bool((found.abs() <= x.abs()).all()) and bool((found * x >= 0).all())
    assert float(found[20]) == 0 and float(_shrink(torch.tensor(0.05), 10.0)) == 0
    assert float(_shrink(torch.tensor(1.0), 10.0)) == pytest.approx(0.9)
    assert float(_shrink(torch.tensor(2.0), 10.0)) == pytest.approx(2 - 2**-0.3 / 10)


def test_zeros() -> None:
    for fmt in ("u4/g16", "i4/g16", "nf4/ch"):
        f = Format.parse(fmt)
        assert torch.equal(rounded(torch.zeros(3, 32), f, half_quadratic(torch.zeros(3, 32), f)), torch.zeros(3, 32))
