"""Round a large weight part by part, in the memory of a part instead of several copies of the weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qfx.calibration.importance import Importance
from qfx.format import Format
from qfx.numerics import require_finite
from qfx.packing import Packed
from qfx.rounding.nearest import round_weight
from qfx.storage.spill import beside, is_mapped, rest, write_beside

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
        return joined((again(part, fmt, method) for part in weight), fmt, tuple(weight.shape))
    rows = max(1, elements // max(1, weight.shape[-1]))
    parts = (
        round_in_parts(w, fmt, method, name=name, elements=w.numel(), importance=importance) for w in weight.split(rows)
    )
    packed = joined(parts, fmt, tuple(weight.shape))
    rest(weight)  # reading a part brings pages of its neighbours back
    return packed


def dequantize_in_parts(packed: Packed, dtype: torch.dtype, near: Tensor | None = None) -> Tensor:
    """`packed.dequantize(dtype)` in the memory of the result and of a part. What lies in a file goes to rest.

    near: a tensor; where it lies in a file, so does the result, which then takes the memory of a part alone.
    """
    shape = packed.shape
    if len(shape) != 2 or not packed.format.by_row or packed.format.is_plain:
        value = packed.dequantize(dtype)
        rest(*packed.tensors().values())
        return value if near is None else beside(value, near)
    if near is not None and is_mapped(near) and math.prod(shape) > ELEMENTS:
        return write_beside(_dequantized(packed, dtype), shape, near)
    whole = packed.scale.new_empty(shape, dtype=dtype)
    at = 0
    for part in _dequantized(packed, dtype):
        whole[at : at + len(part)] = part
        at += len(part)
    return whole if near is None else beside(whole, near)


def _dequantized(packed: Packed, dtype: torch.dtype) -> Iterator[Tensor]:
    """The values of a weight [N, K], some rows after the other."""
    step = max(1, ELEMENTS // max(1, packed.shape[-1]))
    for start in range(0, packed.shape[0], step):
        part = packed.part(slice(start, start + step))
        yield part.dequantize(dtype)
        rest(*part.tensors().values())
    rest(*packed.tensors().values())


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError for NaN or Inf in a weight, naming it. Needs no memory where all is well."""
    for dim, stride in enumerate(weight.stride()):
        if not stride and weight.shape[dim] > 1:  # one value, spread (see `qfx.storage.hollow`)
            weight = weight.narrow(dim, 0, 1)
    if not weight.numel() or not weight.dim():
        return require_finite(weight.detach(), name)
    for part in weight.detach().split(max(1, 4 * ELEMENTS * len(weight) // weight.numel())):
        if not torch.isfinite(torch.stack(part.aminmax())).all():
            require_finite(weight.detach(), name)
        rest(part)
    rest(weight)
    return None


def joined(parts: Iterable[Packed], fmt: Format, shape: tuple[int, ...]) -> Packed:
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
