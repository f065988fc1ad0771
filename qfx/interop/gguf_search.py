"""Scales of one level: for each part [.., n] of a weight the scale (and offset) that leave the least weighted error.

Many roundings are tried, each from other ends of the range; with the codes q of a try the best scale has a closed form:
without an offset s = sum(w x q) / sum(w q^2), whose error is sum(w x^2) - s sum(w x q); with one the 2 x 2 normal
equations. The try of least error wins. All sums run over the last axis.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from qfx.interop.gguf_blocks import BlockType

# Shares of the extreme value that the end of the codes stands for; below 1 values are clipped. Of many bits more of
# them are above 1: what they gain by is that values come to lie nearer to codes (see `qfx.rounding.scales`).
_SHARES = {
    8: (1.0, *(0.99 + 0.005 * step for step in range(18) if step != 2)),
    6: (1.0, 0.98, 0.96, 0.94, 0.92, 1.015, 1.03, 1.045, 1.06, 1.075, 1.09),
    5: (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 1.03),
    4: (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.75, 0.7, 0.65, 1.03, 1.07),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58, 0.52, 0.46, 1.06, 1.12, 1.2),
}
_AGAIN = 2  # rounds of codes and scales in turn after the tries
# Shares of the range that are cut off at either end, by the number of steps.
_CUTS = {
    3: (0.0, 0.06, 0.12, 0.18, 0.24, 0.3, -0.05),
    15: (0.0, 0.03, 0.06, 0.1, 0.15, -0.02),
    31: (0.0, 0.02, 0.05, 0.09, -0.01),
}


class Affine(NamedTuple):
    """x is about scale * q + offset."""

    scale: Tensor
    offset: Tensor


def nearest(steps: Tensor, kind: BlockType) -> Tensor:
    """The values of the codes nearest to x / scale, as floats; of a table its values."""
    table = kind.table
    if table is None:
        return steps.round().clamp_(kind.low, kind.high)
    return _values(table, steps)[nearest_index(steps, table)]


def nearest_index(steps: Tensor, table: tuple[float, ...]) -> Tensor:
    """Index into a table of the value nearest to each step, int64."""
    values, order = _values(table, steps).sort(stable=True)
    middles = (values[1:] + values[:-1]) / 2
    return order[torch.bucketize(steps.contiguous(), middles)]


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale with the scale on the axes before the last; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    return x * inverse.nan_to_num(0.0, 0.0, 0.0)[..., None]


def fit_scale(x: Tensor, w: Tensor, kind: BlockType) -> Tensor:
    """Scales [..] of x [.., n] with error weights w (broadcast against x). A scale may be negative."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.zeros_like(extreme)
    least = torch.zeros_like(extreme)  # greatest gain so far
    for end, share in itertools.product(_ends(kind), _shares(kind)):
        q = nearest(divide(x, extreme * (share / end)), kind)
        wq = w * q
        num, den = (wq * x).sum(-1), (wq * q).sum(-1)
        gain = torch.where(den > 0, num * num / den.clamp_min(1e-38), 0.0)
        better = gain > least
        best = torch.where(better, num / den.clamp_min(1e-38), best)
        least = torch.where(better, gain, least)
    for _ in range(_AGAIN):  # codes for the best scale, and the best scale for these codes
        q = nearest(divide(x, best), kind)
        wq = w * q
        den = (wq * q).sum(-1)
        best = torch.where(den > 0, (wq * x).sum(-1) / den.clamp_min(1e-38), best)
    return best


def fit_affine(x: Tensor, w: Tensor, kind: BlockType, *, below: bool) -> Affine:
    """Scales and offsets [..] of x [.., n]. below: offsets are at most 0, so that zero lies in the range."""
    w = w.expand_as(x) if w.dim() == x.dim() else w
    low, high = x.amin(-1), x.amax(-1)
    if below:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    span = high - low
    sums = (w.expand_as(x).sum(-1), (w * x).sum(-1))
    best = Affine(span / kind.high, low)
    least = torch.full_like(low, -torch.inf)
    for under, over in itertools.product(_CUTS[kind.high], repeat=2):
        start, scale = low + span * under, span * ((1 - under - over) / kind.high)
        q = divide(x - start[..., None], scale).round_().clamp_(0, kind.high)
        fit, gain = _solve(x, w, q, sums, below=below)
        better = gain > least
        best = Affine(*(torch.where(better, new, old) for new, old in zip(fit, best, strict=True)))
        least = torch.where(better, gain, least)
    for _ in range(_AGAIN):
        q = divide(x - best.offset[..., None], best.scale).round_().clamp_(0, kind.high)
        fit, gain = _solve(x, w, q, sums, below=below)
        better = gain > least
        best = Affine(*(torch.where(better, new, old) for new, old in zip(fit, best, strict=True)))
        least = torch.where(better, gain, least)
    return best


def _solve(x: Tensor, w: Tensor, q: Tensor, sums: tuple[Tensor, Tensor], *, below: bool) -> tuple[Affine, Tensor]:
    """Least squares for given codes, and what it takes from sum(w x^2)."""
    one, wx = sums
    weighted = w * q
    wq, wqq, wqx = weighted.sum(-1), (weighted * q).sum(-1), (weighted * x).sum(-1)
    determinant = one * wqq - wq * wq
    flat = determinant <= 1e-6 * one * wqq  # all codes are equal
    safe = torch.where(flat, 1.0, determinant)
    scale = torch.where(flat, 0.0, (one * wqx - wq * wx) / safe)
    offset = torch.where(flat, wx / one.clamp_min(1e-38), (wqq * wx - wq * wqx) / safe)
    if below:
        bare = torch.where(wqq > 0, wqx / wqq.clamp_min(1e-38), 0.0)
        scale, offset = torch.where(offset > 0, bare, scale), offset.clamp(max=0.0)
    scale_ok = scale >= 0
    gain = scale * wqx + offset * wx
    if not below:
        return Affine(scale, offset), gain
    return Affine(scale, offset), torch.where(scale_ok, gain, -torch.inf)


def _ends(kind: BlockType) -> tuple[float, ...]:
    """The values of the codes on which the extreme value may come to lie."""
    if kind.table is not None:
        return min(kind.table), max(kind.table)
    return (kind.low, kind.high) if kind.low != -kind.high else (kind.high,)


def _shares(kind: BlockType) -> tuple[float, ...]:
    return _SHARES[(kind.high - kind.low).bit_length()]


def _values(table: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(table, dtype=torch.float32, device=like.device)
