"""Histograms of fixed size that grow with the data, and the three ways to choose a clipping range from one.

Bins are `2^e` wide with edges at whole multiples of it, so that growing (which joins neighbours in pairs) is exact: the
counts do not depend on the order of the data or on how it was cut into batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import dequantize, quantize, range_qparams

BINS = 1 << 13  # of one histogram for a whole tensor
ROW_BINS = 1 << 11  # of each row where there are many (channels, heads)
_CHUNK = 1 << 22  # elements binned at once, to bound the memory for their indices
_SHRINK = 256.0  # the hardest clipping that the MSE search tries, as a divisor of the full range
_KL_BINS = 2048
_LEAST = -150  # the exponent of an empty histogram: every f32 is a multiple of a bin


@dataclass(eq=False)
class Histogram:
    """Counts int64 [G, bins] of values in [-2^exponent, 2^exponent), one row per channel or head."""

    counts: Tensor
    exponent: int

    @classmethod
    def empty(cls, rows: int, bins: int, device: torch.device) -> Histogram:
        return cls(torch.zeros(rows, bins, dtype=torch.int64, device=device), _LEAST)

    def add(self, rows: Tensor, absmax: float) -> None:
        """Count the values of `rows` [G, M], all finite and at most `absmax` in magnitude."""
        self._grow(_exponent(absmax))
        groups, bins = self.counts.shape
        step = max(_CHUNK // groups, 1)
        offset = (torch.arange(groups, device=rows.device) * bins + bins // 2).unsqueeze(1)
        for part in rows.split(step, dim=1):
            index = torch.floor(part.to(torch.float64) * (0.5 * bins * 2.0**-self.exponent)).to(torch.int64) + offset
            self.counts += torch.bincount(index.reshape(-1), minlength=groups * bins).reshape(groups, bins)

    def merge(self, other: Histogram) -> None:
        """Add the counts of `other`, which keeps its own."""
        twin = Histogram(other.counts.to(self.counts.device), other.exponent)
        self._grow(twin.exponent)
        twin._grow(self.exponent)
        self.counts = self.counts + twin.counts

    def centers(self) -> Tensor:
        """f64 [bins]: the middle of each bin."""
        bins = self.counts.shape[1]
        steps = torch.arange(bins, dtype=torch.float64, device=self.counts.device) - bins // 2 + 0.5
        return steps * self.width

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0 * 2.0**self.exponent / self.counts.shape[1]

    def _grow(self, exponent: int) -> None:
        half = self.counts.shape[1] // 2
        while self.exponent < exponent:
            if not bool(self.counts.any()):
                self.exponent = exponent
                return
            paired = self.counts.unflatten(1, (half, 2)).sum(2)
            self.counts = torch.nn.functional.pad(paired, (half // 2, half // 2))
            self.exponent += 1


def _exponent(absmax: float) -> int:
    """e with absmax < 2^e."""
    if absmax == 0:
        return _LEAST
    return int(torch.frexp(torch.tensor(absmax, dtype=torch.float64)).exponent)


def percentile_range(counts: Tensor, hist: Histogram, percentile: float) -> tuple[float, float]:
    """Values below which lie 100 - `percentile` and `percentile` of the data of one row, interpolated within a bin."""
    total = counts.cumsum(0).to(torch.float64)
    ends = torch.tensor([1 - percentile / 100, percentile / 100], dtype=torch.float64, device=counts.device) * total[-1]
    at = torch.searchsorted(total, ends).clamp(max=len(total) - 1)
    inside = (ends - (total[at] - counts[at])) / counts[at].clamp(min=1)
    values = hist.centers()[at] + (inside - 0.5) * hist.width
    return float(values[0]), float(values[1])


def mse_range(counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
    """The clipping range within [low, high] with the least squared error of `fmt`: both ends together, then each."""
    used = counts > 0
    centers, weights = hist.centers()[used].clamp(low, high), counts[used].to(torch.float64)
    ends = torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float64)
    shrink = _SHRINK ** -torch.linspace(0, 1, 81, dtype=torch.float64)
    around = torch.linspace(0.7, 1.3, 31, dtype=torch.float64)
    best = torch.ones(2, dtype=torch.float64)
    moves = (shrink, 2), (around, 0), (around, 1), (around, 0)  # factors, and which end they move: low, high, both
    for factors, end in moves if fmt.has_zero else ((shrink, 2), (around, 2)):
        tried = best.repeat(len(factors), 1)
        columns = slice(None) if end == 2 else slice(end, end + 1)
        tried[:, columns] = (tried[:, columns] * factors.unsqueeze(1)).clamp(max=1.0)
        best = tried[int(_errors(centers, weights, fmt, tried * ends).argmin())]
    found = best * ends
    return float(found[0]), float(found[1])


def _errors(centers: Tensor, weights: Tensor, fmt: Format, ranges: Tensor) -> Tensor:
    """Squared error [C] of the histogram for each candidate range [C, 2]."""
    per_row = Format(fmt.type, "ch", fmt.scale_type)
    low, high = (end.to(torch.float32).unsqueeze(1).to(centers.device) for end in ranges.unbind(1))
    scale, zero = range_qparams(low, high, per_row)
    values = centers.to(torch.float32).expand(len(ranges), -1)
    error = dequantize(quantize(values, per_row, scale, zero), per_row, scale, zero).to(torch.float64) - centers
    return (error.square() * weights).sum(1).cpu()


def entropy_range(counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
    """The clipping range with the least Kullback-Leibler divergence between the clipped and the quantized histogram.

    TensorRT's calibration (Migacz 2017): magnitudes for symmetric formats, both ends shrunk together for affine ones.
    """
    if low >= 0 and high <= 0:
        return low, high
    levels = fmt.qmax + 1
    if not fmt.has_zero:
        low, high = 0.0, max(-low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    centers = hist.centers() if fmt.has_zero else hist.centers().abs()
    place = ((centers - low) / (high - low) * _KL_BINS).long().clamp(0, _KL_BINS - 1)
    fine = torch.zeros(_KL_BINS, dtype=torch.float64, device=counts.device)
    fine.index_add_(0, place, counts.to(torch.float64))
    zero = round(-low / (high - low) * _KL_BINS)
    best, kept = float("inf"), 1.0
    first = -(-levels * 1024 // _KL_BINS)
    for step in range(first, 1025, 4):
        begin, end = zero - round(zero * step / 1024), zero + round((_KL_BINS - zero) * step / 1024)
        divergence = _divergence(fine, begin, end, levels)
        if divergence < best:
            best, kept = divergence, step / 1024
    return (low * kept, high * kept) if fmt.has_zero else (-high * kept, high * kept)


def _divergence(fine: Tensor, begin: int, end: int, levels: int) -> float:
    """KL(clipped || quantized) of the bins [begin, end), what lies outside added to the outermost bins."""
    inside = fine[begin:end]
    clipped = inside.clone()
    clipped[0] += fine[:begin].sum()
    clipped[-1] += fine[end:].sum()
    used = (clipped > 0).to(torch.float64)
    size = end - begin
    level = (torch.arange(size, device=fine.device) * levels) // size
    sums, kinds = fine.new_zeros(levels), fine.new_zeros(levels)
    sums.index_add_(0, level, inside)
    kinds.index_add_(0, level, used)
    quantized = (sums / kinds.clamp(min=1))[level] * used
    p, q = clipped / clipped.sum(), quantized / quantized.sum().clamp(min=1e-30)
    both = p > 0
    return float((p[both] * torch.log(p[both] / q[both].clamp(min=1e-12))).sum())
