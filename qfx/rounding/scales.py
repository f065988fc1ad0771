"""Scales (and zero points) under which rounding a weight costs the least, searched instead of taken from the extremes.

For each scale of the format, candidates are tried and the cheapest stays:

    extremes     those of `choose_qparams`, and shares of them (SHARES): of few bits values beyond are clipped; of many
                 bits each step puts other values near to codes, and the best of some that are wider than needed, which
                 clip nothing, has up to a quarter less squared error in groups of 32
    signs        i2..i7 reach one code further below zero than above; a negative scale turns that side to where the
                 greatest magnitude is (the scale max / -8 of llama.cpp's Q4_0), so both signs are tried
    refits       the scale that is best for the codes found, s = <w, v> / <v, v>; of few bits also with the next zero
                 points, which of many bits give the same codes

The cost is the squared error, or weighted by an `Importance`: what the linear's inputs make of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.format import Format
from qfx.numerics import (
    TINY,
    QParams,
    dequantize,
    effective_scale,
    join,
    quantize,
    range_qparams,
    signed_scale,
    split,
    spread,
    sums_by_scale,
    value_range,
    zero_points,
)

_REFITS = {2: 4, 3: 4, 4: 4, 5: 3}  # by bits
_MANY = 2  # refits of more bits
_MOVING = 5  # the most bits for which other zero points are tried


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * step / (count - 1) for step in range(count))


SHARES: dict[int, tuple[float, ...]] = {  # by bits: the more, the less is worth clipping, and the finer the steps
    2: (1.0, 1.04, 0.95, 0.9, 0.85, 0.8, 0.74, 0.68, 0.62, 0.56, 0.5, 0.44, 0.37, 0.3),
    3: (1.0, 1.04, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.67, 0.62, 0.57, 0.52, 0.47, 0.42, 0.36, 0.3),
    4: (1.0, 1.04, 1.02, 0.98, 0.96, 0.93, 0.9, 0.86, 0.82, 0.78, 0.73, 0.68, 0.62, 0.56, 0.5, 0.44, 0.37, 0.3),
    5: (1.0, *_evenly(1.12, 0.8, 15)),
    6: (1.0, *_evenly(1.12, 0.86, 17)),
    7: (1.0, *_evenly(1.1, 0.9, 19)),
    8: (1.0, *_evenly(1.08, 0.985, 20)),
}

Cost = Callable[[Tensor], Tensor]  # the difference [.., N, K] to the weight -> what each element adds to the cost
Product = Callable[[Tensor, Tensor], Tensor]  # elements whose sums are an inner product of two weights


def _plain(a: Tensor, b: Tensor) -> Tensor:
    return a * b


class Best:
    """The cheapest parameters so far, for each scale of a weight. full: f32 [.., N, K]."""

    def __init__(self, full: Tensor, fmt: Format, cost: Cost, start: QParams) -> None:
        self.full, self.fmt, self.cost = full, fmt, cost
        self.params = start
        self.least = self._of(start)

    def _of(self, params: QParams) -> Tensor:
        return sums_by_scale(self.cost(rounded(self.full, self.fmt, params) - self.full), self.fmt)

    def offer(self, params: QParams) -> None:
        """Take these parameters wherever they cost less."""
        found = self._of(params)
        better = found < self.least
        zero = params.zero if self.fmt.has_global_scale else _chosen(better, params.zero, self.params.zero)
        scale = _chosen(better, params.scale, self.params.scale)
        assert scale is not None
        self.params, self.least = QParams(scale, zero), torch.where(better, found, self.least)


def search(full: Tensor, fmt: Format, importance: Importance | None = None) -> QParams:
    """Scales and zero points for a weight, f32 [.., N, K], with the least (weighted) squared error that was found.

    Never worse than the extremes. importance: of the input channels, see `Importance`; None: all count alike.
    """
    product = _plain if importance is None else importance.product_with(full)
    best = explore(full, fmt, lambda difference: product(difference, difference))
    for _ in range(_REFITS.get(fmt.bits, _MANY)):
        params = best.params
        best.offer(refit_scale(full, fmt, quantize(full, fmt, *params), params, product))
        for step in (-1, 1) if fmt.has_zero and fmt.bits <= _MOVING else ():
            assert params.zero is not None
            moved = params._replace(zero=(params.zero.to(torch.int16) + step).clamp(0, fmt.qmax).to(torch.uint8))
            best.offer(refit_scale(full, fmt, quantize(full, fmt, *moved), moved, product))
    return best.params


def shares_of(fmt: Format) -> tuple[float, ...]:
    """Shares of the extremes that are worth trying, 1 first. 8-bit floats have 3 or 2 bits between powers of two."""
    return SHARES[5 if fmt.is_float and fmt.bits == 8 else fmt.bits]


def explore(full: Tensor, fmt: Format, cost: Cost, shares: Sequence[float] | None = None) -> Best:
    """The best among shares of the extremes (None: `shares_of`), the first of which is 1, and signs."""
    shares = shares_of(fmt) if shares is None else shares
    low, high = value_range(full, fmt)
    start = range_qparams(low, high, fmt)
    best = Best(full, fmt, cost, start)
    if fmt.has_zero:
        for share in shares[1:]:
            best.offer(range_qparams(low * share, high * share, fmt))
        return best
    greatest = effective_scale(start.scale, start.zero, fmt)
    signed = fmt.is_integer and fmt.qmin != -fmt.qmax and fmt.scale_type != "e8m0"
    shares = (0.5, 2.0) if fmt.scale_type == "e8m0" else shares
    for share in shares:
        for factor in (share, -share) if signed else (share,):
            best.offer(QParams(signed_scale(greatest * factor, start.zero, fmt), start.zero))
    return best


def refit_scale(full: Tensor, fmt: Format, codes: Tensor, params: QParams, product: Product = _plain) -> QParams:
    """The scale that brings `codes` nearest to a weight, f32 [.., N, K]; that of `params` where there is no such."""
    scale = effective_scale(params.scale, params.zero, fmt)
    plain = Format(fmt.type, fmt.granularity)
    values = dequantize(codes, plain, torch.ones_like(scale), params.zero if fmt.has_zero else None)
    power = sums_by_scale(product(values, values), fmt)
    fitted = sums_by_scale(product(values, full), fmt) / power.clamp(min=TINY)
    usable = (power > 0) & (fitted != 0) & torch.isfinite(fitted)
    return QParams(signed_scale(torch.where(usable, fitted, scale), params.zero, fmt), params.zero)


def refit_zero(full: Tensor, fmt: Format, codes: Tensor, params: QParams) -> QParams:
    """The stored zero point that brings `codes` of an affine format nearest to a weight: mean(q - w / s), rounded."""
    steps = split(full, fmt) / spread(effective_scale(params.scale, params.zero, fmt), fmt)
    each = codes.to(torch.float32) - join(steps, fmt, full.shape)
    mean = sums_by_scale(each, fmt) / sums_by_scale(torch.ones_like(each), fmt)
    return QParams(params.scale, mean.round().clamp(0, fmt.qmax).to(torch.uint8))


def rounded(full: Tensor, fmt: Format, params: QParams) -> Tensor:
    """The weight as it comes back, f32."""
    if not fmt.is_integer or full.dtype != torch.float32 or full.requires_grad:
        return dequantize(quantize(full, fmt, *params), fmt, *params)
    # The same numbers without codes in between, in one tensor: a search asks for them dozens of times.
    scale = spread(effective_scale(params.scale, params.zero, fmt), fmt)
    zero = spread(zero_points(params.zero, params.scale, fmt), fmt) if fmt.has_zero else None
    steps = (split(full, fmt) / scale).round_()
    if zero is not None:
        steps.add_(zero)
    steps.clamp_(fmt.qmin, fmt.qmax)
    if zero is not None:
        steps.sub_(zero)
    return join(steps.mul_(scale), fmt, full.shape)


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None:
        return None
    if new.dtype.itemsize == 1 and new.is_floating_point():  # torch.where has no kernel for 8-bit floats
        return torch.where(better, new.view(torch.uint8), old.view(torch.uint8)).view(new.dtype)
    return torch.where(better, new, old)
