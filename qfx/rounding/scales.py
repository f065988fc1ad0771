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
from dataclasses import replace

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
_ELEMENTS = 1 << 18  # searched at once


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


def _square(a: Tensor) -> Tensor:
    return a.mul_(a)


class Best:
    """The cheapest parameters so far, for each scale of a weight. full: f32 [.., N, K]. cost: may write into what it is
    given. least: what `start` costs, None where that is not known."""

    def __init__(self, full: Tensor, fmt: Format, cost: Cost, start: QParams, least: Tensor | None = None) -> None:
        self.full, self.fmt, self.cost = full, fmt, cost
        self.params = start
        # Every candidate is rounded into the same memory: fresh memory costs several times what the arithmetic does.
        self.work = torch.empty_like(split(full, fmt)) if in_one(full, fmt) else None
        self.least = self._of(start) if least is None else least

    def _of(self, params: QParams) -> Tensor:
        return sums_by_scale(self.cost(rounded(self.full, self.fmt, params, self.work).sub_(self.full)), self.fmt)

    def offer(self, params: QParams) -> Tensor:
        """Take these parameters wherever they cost less, and tell where that was."""
        found = self._of(params)
        better = found < self.least
        zero = params.zero if self.fmt.has_global_scale else _chosen(better, params.zero, self.params.zero)
        scale = _chosen(better, params.scale, self.params.scale)
        assert scale is not None
        self.params, self.least = QParams(scale, zero), torch.where(better, found, self.least)
        return better

    def only(self, rows: Tensor) -> Best:
        """The same of some rows of a matrix [N, K] with a scale for each row."""
        scale, zero = (None if value is None else value[rows] for value in self.params)
        assert scale is not None
        return Best(self.full[rows], self.fmt, self.cost, QParams(scale, zero), self.least[rows])

    def take(self, rows: Tensor, other: Best) -> None:
        """What `only` has become."""
        for own, new in zip((*self.params, self.least), (*other.params, other.least), strict=True):
            if own is not None and new is not None:
                own[rows] = new


def search(full: Tensor, fmt: Format, importance: Importance | None = None) -> QParams:
    """Scales and zero points for a weight, f32 [.., N, K], with the least (weighted) squared error that was found.

    Never worse than the extremes. importance: of the input channels, see `Importance`; None: all count alike.
    """
    if importance is None and fmt.by_row and fmt.scale_type != "e8m0" and full.numel():
        return _by_rows(full, fmt)
    product, square = (_plain, _square) if importance is None else (importance.product_with(full), importance.square)
    best = explore(full, fmt, square)
    for _ in range(_REFITS.get(fmt.bits, _MANY)):
        _refit(best, product)
    return best.params


def _by_rows(full: Tensor, fmt: Format) -> QParams:
    """`search` where all values count alike: groups are rows then, which have nothing to do with each other."""
    rows = split(full, fmt)
    rows = rows.reshape(-1, rows.shape[-1])
    own = replace(fmt, granularity="ch")
    found = []
    for part in rows.split(max(1, _ELEMENTS // rows.shape[-1])):
        best = explore(part, own, _square)
        _refit_rows(best, _REFITS.get(fmt.bits, _MANY))
        found.append(best.params)
    shape = fmt.scale_shape(full.shape)
    scale, zero = (torch.cat(each).reshape(shape) if each[0] is not None else None for each in zip(*found, strict=True))
    assert scale is not None
    return QParams(scale, zero)


def _refit_rows(best: Best, times: int) -> None:
    """Refit so many times. A row that a refit left as it was would be left so again."""
    changed = _refit(best, _plain)[:, 0].nonzero()[:, 0]
    if times == 1 or not len(changed):
        return
    some = best.only(changed)
    _refit_rows(some, times - 1)
    best.take(changed, some)


def _refit(best: Best, product: Product) -> Tensor:
    """Offer refits of the best so far, and tell where one was better."""
    fmt, params = best.fmt, best.params
    better = best.offer(_fitted(best, params, product))
    for step in (-1, 1) if fmt.has_zero and fmt.bits <= _MOVING else ():
        assert params.zero is not None
        moved = params._replace(zero=(params.zero.to(torch.int16) + step).clamp(0, fmt.qmax).to(torch.uint8))
        better = better | best.offer(_fitted(best, moved, product))
    return better


def _fitted(best: Best, params: QParams, product: Product) -> QParams:
    """`refit_scale` of the codes that these parameters give."""
    full, fmt = best.full, best.fmt
    if best.work is None:
        return refit_scale(full, fmt, quantize(full, fmt, *params), params, product)
    values = join(_values(full, fmt, params, best.work), fmt, full.shape)
    cross = sums_by_scale(product(values, full), fmt)
    power = _square(values) if product is _plain else product(values, values)
    return _scaled(sums_by_scale(power, fmt), cross, fmt, params)


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
    return _scaled(sums_by_scale(product(values, values), fmt), sums_by_scale(product(values, full), fmt), fmt, params)


def _scaled(power: Tensor, cross: Tensor, fmt: Format, params: QParams) -> QParams:
    """The scale cross / power as it is stored."""
    scale = effective_scale(params.scale, params.zero, fmt)
    fitted = cross / power.clamp(min=TINY)
    usable = (power > 0) & (fitted != 0) & torch.isfinite(fitted)
    return QParams(signed_scale(torch.where(usable, fitted, scale), params.zero, fmt), params.zero)


def refit_zero(full: Tensor, fmt: Format, codes: Tensor, params: QParams) -> QParams:
    """The stored zero point that brings `codes` of an affine format nearest to a weight: mean(q - w / s), rounded."""
    steps = split(full, fmt) / spread(effective_scale(params.scale, params.zero, fmt), fmt)
    each = codes.to(torch.float32) - join(steps, fmt, full.shape)
    mean = sums_by_scale(each, fmt) / sums_by_scale(torch.ones_like(each), fmt)
    return QParams(params.scale, mean.round().clamp(0, fmt.qmax).to(torch.uint8))


def rounded(full: Tensor, fmt: Format, params: QParams, work: Tensor | None = None) -> Tensor:
    """The weight as it comes back, f32. work: what may be written into, shaped as `split(full)`."""
    if not in_one(full, fmt):
        return dequantize(quantize(full, fmt, *params), fmt, *params)
    values = _values(full, fmt, params, work)
    return join(values.mul_(spread(effective_scale(params.scale, params.zero, fmt), fmt)), fmt, full.shape)


def in_one(full: Tensor, fmt: Format) -> bool:
    """Can it be rounded in one tensor, without codes in between?"""
    return fmt.is_integer and full.dtype == torch.float32 and not full.requires_grad


def _values(full: Tensor, fmt: Format, params: QParams, work: Tensor | None) -> Tensor:
    """Codes minus zero points, f32, shaped as `split(full)`: the numbers of `quantize`, which a search asks for dozens
    of times."""
    scale = spread(effective_scale(params.scale, params.zero, fmt), fmt)
    steps = torch.div(split(full, fmt), scale, out=work).round_()
    if not fmt.has_zero:
        return steps.clamp_(fmt.qmin, fmt.qmax)
    zero = spread(zero_points(params.zero, params.scale, fmt), fmt)
    return steps.add_(zero).clamp_(fmt.qmin, fmt.qmax).sub_(zero)


def _chosen(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None:
        return None
    if new.dtype.itemsize == 1 and new.is_floating_point():  # torch.where has no kernel for 8-bit floats
        return torch.where(better, new.view(torch.uint8), old.view(torch.uint8)).view(new.dtype)
    return torch.where(better, new, old)
