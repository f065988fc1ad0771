"""Rounding a weight into its format: nearest, or with the clip that leaves the least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.format import Format
from qfx.packing import Packed, pack_weight

# Shares of the absolute maximum that the clip search tries.
SHRINK = tuple(1.0 - 0.02 * step for step in range(25))


def round_weight(weight: Tensor, fmt: Format, method: str, *, name: str) -> Packed:
    """A weight [.., N, K] packed in `fmt`.

    method "rtn": nearest, the scale from the extremes. "mse": each row is clipped at the share of its extremes (1.0 down to
    0.52) that leaves the least squared error; rows whose extremes serve best stay as they are.
    Raises ValueError for NaN or Inf in the weight (named).
    """
    packed = pack_weight(weight, fmt, name=name)
    if method == "rtn" or fmt.is_plain:
        return packed
    assert method == "mse", method
    full = weight.detach().to(torch.float32)
    best = full
    error = _row_error(packed, full)
    high, low = full.amax(-1, keepdim=True), full.amin(-1, keepdim=True)
    for share in SHRINK[1:]:
        clipped = torch.maximum(torch.minimum(full, high * share), low * share)
        found = _row_error(pack_weight(clipped, fmt, name=name), full)
        better = found < error
        best, error = torch.where(better, clipped, best), torch.where(better, found, error)
    return pack_weight(best, fmt, name=name)


def _row_error(packed: Packed, weight: Tensor) -> Tensor:
    return (packed.dequantize() - weight).square().sum(-1, keepdim=True)
