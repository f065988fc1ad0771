"""Rounding a weight into its format: nearest, or with the scales that are best for it."""

from __future__ import annotations

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.format import Format
from qfx.numerics import quantize, require_finite
from qfx.packing import Packed, check_storable, pack_weight
from qfx.rounding.hqq import half_quadratic
from qfx.rounding.scales import search

NEED_DATA = ("gptq", "learned")  # methods that round by what a layer reads


def round_weight(
    weight: Tensor, fmt: Format, method: str, *, name: str, importance: Importance | None = None
) -> Packed:
    """A weight [.., N, K] packed in `fmt`.

    method "rtn": nearest, the scale from the extremes. "mse": scales (and zero points) with the least squared error
    that `qfx.rounding.scales.search` finds, weighted by `importance` where that is given; never worse than "rtn".
    "hqq": those of `qfx.rounding.hqq`. Methods of NEED_DATA round so ("mse") what they have not rounded before: tables,
    for which there is no data. Raises ValueError for NaN or Inf in the weight (named).
    """
    if method == "rtn" or fmt.is_plain:
        return pack_weight(weight, fmt, name=name)
    assert method in ("mse", "hqq", *NEED_DATA), method
    check_storable(fmt, name)
    full = weight.detach().to(torch.float32)
    require_finite(full, name)
    params = half_quadratic(full, fmt) if method == "hqq" else search(full, fmt, importance)
    return Packed.from_codes(quantize(full, fmt, *params), fmt, *params)
