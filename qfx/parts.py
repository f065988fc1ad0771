"""Round a large weight part by part, in the memory of a part instead of several copies of the weight."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from qfx.format import Format
from qfx.importance import Importance
from qfx.numerics import require_finite
from qfx.packing import Packed
from qfx.rounding import round_weight
from qfx.spill import rest

ELEMENTS = 1 << 18  # of one part


def round_in_parts(
    weight: Tensor, fmt: Format, method: str, *, name: str, elements: int = ELEMENTS,
    importance: Importance | None = None,
) -> Packed:  # fmt: skip
    """`round_weight` of a weight [.., N, K] in parts of whole rows of at most `elements` values (one row at least).

    Formats whose scale serves more than one row are rounded at once. A weight in a file goes to rest part by part.
    Raises ValueError as `round_weight` does.
    """
    whole = functools.partial(round_weight, fmt=fmt, method=method, name=name, importance=importance)
    if weight.numel() <= elements or not fmt.by_row:
        packed = whole(weight)
        rest(weight)
        return packed
    if weight.dim() > 2:
        again = functools.partial(round_in_parts, name=name, elements=elements, importance=importance)
        return _joined((again(part, fmt, method) for part in weight), fmt, tuple(weight.shape))
    rows = max(1, elements // max(1, weight.shape[-1]))
    parts = (
        round_in_parts(w, fmt, method, name=name, elements=w.numel(), importance=importance) for w in weight.split(rows)
    )
    return _joined(parts, fmt, tuple(weight.shape))


def dequantize_in_parts(packed: Packed, dtype: torch.dtype) -> Tensor:
    """`packed.dequantize(dtype)` in the memory of the result and of a part. What lies in a file goes to rest."""
    fmt, shape = packed.format, packed.shape
    if len(shape) != 2 or not fmt.by_row or fmt.is_plain:
        value = packed.dequantize(dtype)
        rest(*packed.tensors().values())
        return value
    whole = packed.scale.new_empty(shape, dtype=dtype)
    step = max(1, ELEMENTS // max(1, shape[-1]))
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        zero = packed.zero[rows] if packed.zero is not None and packed.zero.dim() else packed.zero
        part = Packed(packed.data[rows], packed.scale[rows], zero, fmt, (rows.stop - start, shape[1]))
        whole[rows] = part.dequantize(dtype)
        rest(*part.tensors().values())
    return whole


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError for NaN or Inf in a weight, naming it. Needs no memory where all is well."""
    for dim, stride in enumerate(weight.stride()):
        if not stride and weight.shape[dim] > 1:  # one value, spread (see `qfx.hollow`)
            weight = weight.narrow(dim, 0, 1)
    if not weight.numel() or not weight.dim():
        return require_finite(weight.detach(), name)
    for part in weight.detach().split(max(1, 4 * ELEMENTS * len(weight) // weight.numel())):
        if not torch.isfinite(torch.stack(part.aminmax())).all():
            require_finite(weight.detach(), name)
        rest(part)
    return None


def _joined(parts: Iterable[Packed], fmt: Format, shape: tuple[int, ...]) -> Packed:
    """The whole of parts along the first dimension, each let go as it is copied."""
    whole: dict[str, Tensor] = {}
    at = 0
    for part in parts:
        count = part.shape[0] if len(part.shape) == len(shape) else 1
        for name, tensor in part.tensors().items():
            if name == "scale" and fmt.is_plain:
                whole[name] = tensor
                continue
            if name not in whole:
                lead = shape[: len(shape) - 1]
                whole[name] = tensor.new_empty((*lead, tensor.shape[-1]))
            whole[name][at : at + count] = tensor
        at += count
    assert at == shape[0], (at, shape)
    return Packed(whole["data"], whole["scale"], whole.get("zero"), fmt, shape)
