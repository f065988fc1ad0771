"""qfx.calibration.histogram: exact counts while the range grows, and the divergence against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from qfx.calibration.histogram import Histogram, _divergence, entropy_range, mse_range, percentile_range
from qfx.format import Format
from tests.seeded import randn


def filled(x: Tensor, bins: int = 64) -> Histogram:
    histogram = Histogram.empty(1, bins, x.device)
    for part in x.split(7):
        histogram.add(part.reshape(1, -1), float(part.abs().max()))
    return histogram


@pytest.mark.parametrize("scale", [1e-38, 1e-3, 1.0, 1e30])
def test_counts_against_numpy(scale: float) -> None:
    x = randn(500) * scale
    histogram = filled(x)
    edge = 2.0**histogram.exponent
    expected, _ = np.histogram(x.double().numpy(), bins=64, range=(-edge, edge))
    assert histogram.counts[0].tolist() == expected.tolist()
    assert edge > float(x.abs().max()) >= edge / 2
    assert histogram.width == 2 * edge / 64


def test_powers_of_two_and_zeros_fall_into_bins() -> None:
    histogram = filled(torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 0.0]), bins=16)
    assert histogram.exponent == 3
    assert histogram.counts[0].tolist() == [0, 0, 0, 0, 1, 0, 1, 1, 3, 1, 1, 0, 1, 0, 0, 0]


def test_only_zeros() -> None:
    histogram = filled(torch.zeros(5))
    assert int(histogram.counts[0, 32]) == 5
    histogram.add(torch.ones(1, 3), 1.0)
    assert int(histogram.counts[0, 32]) == 5 and int(histogram.counts.sum()) == 8


def test_many_rows_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(3, 1000)
    whole = Histogram.empty(3, 32, x.device)
    whole.add(x, float(x.abs().max()))
    monkeypatch.setattr("qfx.calibration.histogram._CHUNK", 100)
    parts = Histogram.empty(3, 32, x.device)
    parts.add(x, float(x.abs().max()))
    assert torch.equal(whole.counts, parts.counts)


def test_percentile_inside_a_bin() -> None:
    histogram = filled(torch.linspace(0, 1, 1001), bins=16)
    low, high = percentile_range(histogram.counts[0], histogram, 75.0)
    assert low == pytest.approx(0.25, abs=2e-2)
    assert high == pytest.approx(0.75, abs=2e-2)


def test_divergence_against_scipy() -> None:
    fine = torch.tensor([1.0, 0, 4, 2, 8, 3, 0, 5, 2, 1], dtype=torch.float64)
    found = _divergence(fine, 2, 8, 3)
    clipped = np.array([4 + 1, 2, 8, 3, 0, 5 + 3.0])
    quantized = np.array([3, 3, 5.5, 5.5, 0, 5])
    assert found == pytest.approx(entropy(clipped, np.where(clipped > 0, quantized, 0)), rel=1e-12)


def test_the_least_divergence_is_taken() -> None:
    x = randn(20000)
    x[:4] = torch.tensor([50.0, -50.0, 45.0, -45.0])
    histogram = filled(x, bins=1 << 13)
    low, high = entropy_range(histogram.counts[0], histogram, Format("u8"), -50.0, 50.0)
    assert 2.0 < high < 25.0 and low == pytest.approx(-high, rel=0.05)
    assert entropy_range(histogram.counts[0] * 0, histogram, Format("u8"), 0.0, 0.0) == (0.0, 0.0)


def test_ends_move_apart_for_affine_formats() -> None:
    x = randn(20000).abs()
    x[0] = -30.0
    histogram = filled(x, bins=1 << 13)
    low, high = mse_range(histogram.counts[0], histogram, Format("u4"), -30.0, float(x.max()))
    assert -15.0 < low < 0.0 and high > 2.0
    low, high = mse_range(histogram.counts[0], histogram, Format("i4"), -30.0, float(x.max()))
    assert -15.0 < low < 0.0
