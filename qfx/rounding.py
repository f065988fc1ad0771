"""Rounding a weight into its format: nearest, or with the clip that leaves the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import fake_quantize, join, split, spread, sums_by_scale, value_range
from qfx.packing import Packed, pack_weight

NEED_DATA = ("gptq",)  # methods that round by what a layer reads
# Shares of the extremes that the clip search tries.
SHRINK = tuple(1.0 - 0.02 * step for step in range(1, 25))


def round_weight(weight: Tensor, fmt: Format, method: str, *, name: str) -> Packed:
    """A weight [.., N, K] packed in `fmt`.

    method "rtn": nearest, the scale from the extremes. "mse": the values of each scale are clipped at the share of
    their extremes (1.0 down to 0.52) that leaves the least squared error; the result is never worse than "rtn".
    Methods of `qfx.sequential` ("gptq") round so what they have not rounded before: tables, for which there is no data.
    Raises ValueError for NaN or Inf in the weight (named).
    """
    packed = pack_weight(weight, fmt, name=name)
    if method == "rtn" or fmt.is_plain:
        return packed
    assert method in ("mse", *NEED_DATA), method
    full = weight.detach().to(torch.float32)
    clipped = _clip(full, fmt, best_shares(full, fmt))
    better = pack_weight(clipped, fmt, name=name)
    return better if _error(better.dequantize(), full) < _error(packed.dequantize(), full) else packed


def best_shares(full: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """For each scale the share of its extremes at which clipping leaves the least squared error.

    full: f32 [.., N, K]. importance: of each column, f32 [K] or [.., 1, K]; None: all are equal.
    """

    def error(rounded: Tensor) -> Tensor:
        squares = (rounded - full).square()
        return sums_by_scale(squares if importance is None else squares.mul_(importance), fmt)

    least = error(fake_quantize(full, fmt))
    best = torch.ones_like(least)
    for share in SHRINK:
        rounded = fake_quantize(_clip(full, fmt, torch.full_like(least, share)), fmt)
        found = error(rounded)
        best, least = torch.where(found < least, share, best), torch.minimum(found, least)
    return best


def _clip(full: Tensor, fmt: Format, shares: Tensor) -> Tensor:
    low, high = value_range(full, fmt)
    clipped = split(full, fmt).clamp(spread(low * shares, fmt), spread(high * shares, fmt))
    return join(clipped, fmt, full.shape)


def _error(rounded: Tensor, full: Tensor) -> float:
    return float((rounded - full).square().sum())
