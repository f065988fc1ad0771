"""Observers: statistics of a tensor over many batches in memory that does not grow with them, and scales from them.

    observer = create("percentile", Format.parse("u8"), name="encoder.fc1 x")
    observer.update(x); ...; scale, zero = observer.qparams(Format.parse("u8"))

An observer works for the whole tensor (granularity ""), per channel ("ch": last axis) or per head ("head": axis -3).
Formats that find their scale at run time (`/tok`, `/dyn`) need none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from qfx.calibration.histogram import BINS, ROW_BINS, Histogram, entropy_range, mse_range, percentile_range
from qfx.calibration.padding import Attended, without
from qfx.errors import explain, nearest
from qfx.format import Format
from qfx.numerics import QParams, range_qparams
from qfx.ops.attention import centre


class Observer:
    """Base: exact least and greatest value per row (tensor, channel or head), f32 [G]; `range` is theirs.

    seen: values seen so far. low, high: f32 [G] or None before any data. centred: the mean over axis -2 is taken off
    first, as attention does with keys. `update` raises ValueError for NaN and Inf
    (naming `name` and the batch), for tensors that are no floats and for a changed number of channels.
    """

    def __init__(self, granularity: str = "", name: str = "tensor") -> None:
        if granularity not in ("", "ch", "head"):
            raise ValueError(
                f"observers work per tensor (''), channel ('ch') or head ('head'), found granularity {granularity!r}; "
                "next step: give the activation a format without groups, or one found at run time such as 'i8/tok'"
            )
        self.granularity = granularity
        self.name = name
        self.centred = False
        self.seen = 0
        self.batches = 0
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    @property
    def config(self) -> tuple[Any, ...]:
        """What makes two observers interchangeable: class, granularity, settings."""
        return (type(self).__name__, self.granularity, self.centred)

    def update(self, x: Tensor, batch: int | None = None, kept: Attended | None = None) -> None:
        """Take in one batch (f16, bf16, f32 or f64, any shape), of it the positions that are `kept` (see `padding`).

        An empty one changes nothing.
        """
        if not x.is_floating_point():
            raise ValueError(f"cannot observe {self.name!r}: expected floats, found {x.dtype}")
        if x.numel() == 0:
            return
        x = centre(x.detach())[0] if self.centred else x.detach()  # over all of it, as attention does
        x = without(x, kept or {})
        if x.numel() == 0:
            return
        rows = self._rows(x)
        low, high = rows.amin(1).to(torch.float32), rows.amax(1).to(torch.float32)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            raise ValueError(self._not_finite(rows, self.batches if batch is None else batch))
        if self.low is not None and self.low.shape != low.shape:
            raise ValueError(
                f"{self.name!r} had {len(self.low)} {self.granularity} rows in earlier batches, now it has {len(low)}"
            )
        self._take(rows, low, high)
        self._extend(low, high)
        self.seen += x.numel()
        self.batches += 1

    def merge(self, other: Self) -> Self:
        """Take in what `other`, an observer with the same settings, saw after this one; returns this one."""
        if other.config != self.config:
            raise ValueError(f"cannot merge observers {self.config} and {other.config}")
        if other.low is None or other.high is None:
            return self
        if self.low is not None and self.low.shape != other.low.shape:
            raise ValueError(f"cannot merge observers of {len(self.low)} and {len(other.low)} rows")
        device = other.low.device if self.low is None else self.low.device
        self._join(other)
        self._extend(other.low.to(device), other.high.to(device))
        self.seen += other.seen
        self.batches += other.batches
        return self

    def range(self, fmt: Format | None = None) -> tuple[Tensor, Tensor]:
        """Least and greatest value to represent: f32, shaped () per tensor, [C] per channel, [H, 1, 1] per head.

        `fmt` (default u8) matters only to observers that weigh clipping against rounding. Raises ValueError naming the
        observer where it saw no data.
        """
        low, high = self._ends(fmt or Format("u8"))
        shape = {"": (), "ch": (len(low),), "head": (len(low), 1, 1)}[self.granularity]
        return low.reshape(shape), high.reshape(shape)

    def qparams(self, fmt: Format) -> QParams:
        """Scale and zero point of `fmt`, whose granularity must be the observer's."""
        if fmt.granularity != self.granularity or fmt.dynamic or fmt.is_plain:
            raise ValueError(
                f"{self.name!r} was observed with granularity {self.granularity!r}, so it gives no scale for '{fmt}'"
            )
        return range_qparams(*self.range(fmt), fmt)

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The exact least and greatest values, f32 [G]. Raises ValueError where there was no data."""
        if self.low is None or self.high is None:
            raise ValueError(
                explain(
                    f"no data reached {self.name!r}",
                    expected="at least one value from the calibration data",
                    found="none (seen == 0)",
                    next_step="give data that reaches this node, or a format found at run time such as 'i8/tok'",
                )
            )
        return self.low, self.high

    def _ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        return self.extremes()

    def _take(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Further statistics of a batch, before the extremes change."""

    def _join(self, other: Self) -> None:
        """Further statistics of `other`, before the extremes change."""

    def _extend(self, low: Tensor, high: Tensor) -> None:
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def _rows(self, x: Tensor) -> Tensor:
        """[G, M]: one row per tensor, channel or head."""
        if self.granularity == "":
            return x.reshape(1, -1)
        dim = -1 if self.granularity == "ch" else -3
        if x.dim() < -dim:
            raise ValueError(f"{self.name!r} has no axis {dim}: shape {list(x.shape)}")
        return x.movedim(dim, 0).reshape(x.shape[dim], -1)

    def _not_finite(self, rows: Tensor, batch: int) -> str:
        nan, inf = int(torch.isnan(rows).sum()), int(torch.isinf(rows).sum())
        found = f"{nan} NaN and {inf} Inf of {rows.numel()} values" if nan + inf else "values beyond float32"
        return explain(
            f"cannot calibrate: the values are not finite in batch {batch}",
            expected="finite values",
            found=found,
            node=self.name,
            next_step="look for bad inputs in that batch, or for an overflow in half precision",
        )


class MinMax(Observer):
    """The range is from the least to the greatest value."""


class AbsMax(Observer):
    """The range is symmetric: plus and minus the greatest magnitude."""

    def _ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        absmax = self.absmax()
        return -absmax, absmax

    def absmax(self) -> Tensor:
        """f32 [G]."""
        low, high = self.extremes()
        return torch.maximum(-low, high)


class EMA(Observer):
    """The range is the exponential moving average of each batch's least and greatest value, without start-up bias.

    A merge counts the other observer's batches as later ones, and is exact.
    """

    def __init__(self, granularity: str = "", name: str = "tensor", decay: float = 0.9) -> None:
        super().__init__(granularity, name)
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a moving average is at least 0 and below 1, found {decay}")
        self.decay = decay
        self._mean: Tensor | None = None  # f64 [2, G], weights sum to 1 - decay^batches

    @property
    def config(self) -> tuple[Any, ...]:
        return (*super().config, self.decay)

    def _take(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        new = torch.stack([low, high]).to(torch.float64) * (1 - self.decay)
        self._mean = new if self._mean is None else self._mean * self.decay + new

    def _join(self, other: Self) -> None:
        assert other._mean is not None
        if self._mean is None:
            self._mean = other._mean.clone()
        else:
            self._mean = self._mean * self.decay**other.batches + other._mean.to(self._mean.device)

    def _ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        self.extremes()
        assert self._mean is not None
        low, high = self._mean / (1 - self.decay**self.batches)
        return low.to(torch.float32), high.to(torch.float32)


class _Histogrammed(Observer):
    """Keeps a histogram per row beside the exact extremes."""

    def __init__(self, granularity: str = "", name: str = "tensor", bins: int | None = None) -> None:
        super().__init__(granularity, name)
        self.bins = bins or (ROW_BINS if granularity else BINS)
        if self.bins < 4 or self.bins & (self.bins - 1):
            raise ValueError(f"the number of bins is a power of two from 4 on, found {self.bins}")
        self.histogram: Histogram | None = None

    @property
    def config(self) -> tuple[Any, ...]:
        return (*super().config, self.bins)

    def _take(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self.histogram is None:
            self.histogram = Histogram.empty(len(rows), self.bins, rows.device)
        self.histogram.add(rows, float(torch.maximum(-low, high).max()))

    def _join(self, other: Self) -> None:
        assert other.histogram is not None
        if self.histogram is None:
            self.histogram = Histogram(other.histogram.counts.clone(), other.histogram.exponent)
        else:
            self.histogram.merge(other.histogram)

    def _ends(self, fmt: Format) -> tuple[Tensor, Tensor]:
        low, high = self.extremes()
        assert self.histogram is not None
        ends = [
            self._clip(counts, self.histogram, fmt, least, greatest)
            for counts, least, greatest in zip(self.histogram.counts, low.tolist(), high.tolist(), strict=True)
        ]
        found = torch.tensor(ends, dtype=torch.float32, device=low.device)
        return torch.maximum(found[:, 0], low), torch.minimum(found[:, 1], high)

    def _clip(self, counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
        raise NotImplementedError


class Percentile(_Histogrammed):
    """The range leaves out 100 - `percentile` percent of the values at each end."""

    def __init__(
        self, granularity: str = "", name: str = "tensor", percentile: float = 99.99, bins: int | None = None
    ) -> None:
        super().__init__(granularity, name, bins)
        if not 50 < percentile <= 100:
            raise ValueError(f"a percentile is above 50 and at most 100, found {percentile}")
        self.percentile = percentile

    @property
    def config(self) -> tuple[Any, ...]:
        return (*super().config, self.percentile)

    def _clip(self, counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
        if self.percentile == 100:
            return low, high
        return percentile_range(counts, hist, self.percentile)


class MSE(_Histogrammed):
    """The range with the least squared error of the format, found on the histogram."""

    def _clip(self, counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
        if fmt.is_plain or fmt.has_global_scale:
            return low, high
        return mse_range(counts, hist, fmt, low, high)


class Entropy(_Histogrammed):
    """The range with the least information lost (Kullback-Leibler), as in TensorRT; for integer formats."""

    def _clip(self, counts: Tensor, hist: Histogram, fmt: Format, low: float, high: float) -> tuple[float, float]:
        if not fmt.is_integer:
            return low, high
        return entropy_range(counts, hist, fmt, low, high)


_KINDS: dict[str, Callable[..., Observer]] = {
    "absmax": AbsMax,
    "minmax": MinMax,
    "ema": EMA,
    "percentile": Percentile,
    "mse": MSE,
    "entropy": Entropy,
}


def create(
    kind: str, fmt: Format | None = None, *, name: str = "tensor", percentile: float = 99.99, centred: bool = False
) -> Observer:
    """The observer of this kind (a Recipe's `observer`) for a static format. centred: of values without their mean.

    Raises ValueError for unknown kinds and for formats that no observer serves (groups and blocks of an activation).
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown observer {kind!r}, {nearest(kind, _KINDS)}")
    granularity = fmt.granularity if fmt is not None else ""
    made = Percentile(granularity, name, percentile) if kind == "percentile" else _KINDS[kind](granularity, name)
    made.centred = centred
    return made
