"""Round a large weight part by part, in the memory of a part instead of several copies of the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import require_finite
from qfx.packing import Packed
from qfx.rounding import round_weight

ELEMENTS = 1 << 22  # of one part


def round_in_parts(weight: Tensor, fmt: Format, method: str, *, name: str, elements: int = ELEMENTS) -> Packed:
    """`round_weight` of a weight [.., N, K] in parts of whole rows of at most `elements` values (one row at least).

    Formats whose scale serves more than one row are rounded at once. Raises ValueError as `round_weight` does.
    """
    if weight.numel() <= elements or not fmt.by_row:
        return round_weight(weight, fmt, method, name=name)
    if weight.dim() > 2:
        parts = [round_in_parts(part, fmt, method, name=name, elements=elements) for part in weight.unbind(0)]
        return _joined(parts, fmt, tuple(weight.shape), torch.stack)
    rows = max(1, elements // max(1, weight.shape[-1]))
    parts = [round_weight(part, fmt, method, name=name) for part in weight.split(rows)]
    return _joined(parts, fmt, tuple(weight.shape), torch.cat)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError for NaN or Inf in a weight, naming it. Needs no memory where all is well."""
    if weight.numel() and not torch.isfinite(torch.stack(weight.detach().aminmax())).all():
        require_finite(weight.detach(), name)


def _joined(parts: list[Packed], fmt: Format, shape: tuple[int, ...], join: Any) -> Packed:
    if fmt.is_plain:
        return Packed(join([p.data for p in parts]), parts[0].scale, None, fmt, shape)
    zeros = [p.zero for p in parts if p.zero is not None]
    zero = join(zeros) if zeros else None
    return Packed(join([p.data for p in parts]), join([p.scale for p in parts]), zero, fmt, shape)
