"""A change of a packed weight: the weight that it gives, rounded again, or kept beside the codes as float factors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.format import Format
from qfx.measure import energies
from qfx.mixed import QuantMixed
from qfx.modules import QuantLinear, rotated
from qfx.numerics import quantize
from qfx.packing import Packed
from qfx.parts import round_in_parts
from qfx.segments import in_order, stem_of, take

Base = QuantLinear | QuantMixed


@dataclass(frozen=True)
class Change:
    """Buffers that put a change D [N, K] into a packed linear, and sums of squares, in the basis of the packed weight.

    signal: of W + D. moved: of D. noise: of what rounding W + D loses.
    """

    buffers: dict[str, Tensor]
    signal: float
    moved: float
    noise: float


def rounded_again(base: Base, delta: Tensor, method: str, *, name: str) -> Change:
    """The weight of `base` with `delta` f32 [N, K], which acts on the linear's own input, in the formats that it has.

    Of the scales that `method` finds (see `qfx.rounding.round_weight`) and those that the weight has, the ones with the
    smaller squared error are taken, part by part. Raises ValueError for NaN and Inf, naming `name`.
    """
    held = parts_of(base)
    cut = _cut(base, as_packed(base, delta))
    buffers: dict[str, Tensor] = {}
    signal = moved = noise = 0.0
    for (stem, packed), part in zip(held.items(), cut, strict=True):
        wanted = packed.dequantize() + part
        found = _nearer(wanted, packed, round_in_parts(wanted, packed.format, method, name=name))
        buffers |= {f"{stem}_codes": found.data, f"{stem}_scale": found.scale}
        if found.zero is not None:
            buffers[f"{stem}_zero"] = found.zero
        all_of_it, lost = energies(wanted, found.dequantize())
        signal, moved, noise = signal + all_of_it, moved + float(part.double().square().sum()), noise + lost
    return Change(buffers, signal, moved, noise)


def beside(base: QuantLinear, a: Tensor, b: Tensor) -> Change:
    """The change b a, of f32 factors [r, K] and [N, r], as the float factors beside the packed weight; none is lost."""
    a = rotated(a, base.rotation)
    smooth = base._buffers["smooth"]
    a = a if smooth is None else a * smooth
    (packed,) = parts_of(base).values()
    wanted = packed.dequantize() + b @ a
    a, b = a.to(base.dtype), b.to(base.dtype)
    if base.low is not None:
        a, b = torch.cat((base.low[0].to(a.dtype), a)), torch.cat((base.low[1].to(b.dtype), b), 1)
    moved = float((wanted - packed.dequantize()).double().square().sum())
    return Change({"low_a": a, "low_b": b}, float(wanted.double().square().sum()), moved, 0.0)


def parts_of(base: Base) -> dict[str, Packed]:
    """The packed parts by the stem of their buffers, in the order of the segments."""
    if isinstance(base, QuantMixed):
        formats = {stem_of(base.axis, i): (s.format, s.size) for i, s in enumerate(base.segments)}
        axis = base.axis
    else:
        formats, axis = {"w": (Format.parse(base.w_format), base.shape[0])}, 0
    found = {}
    for stem, (fmt, size) in formats.items():
        data, scale, zero = (base._buffers[f"{stem}_{leaf}"] for leaf in ("codes", "scale", "zero"))
        assert data is not None and scale is not None
        shape = (base.shape[0], size) if axis else (size, base.shape[1])
        found[stem] = Packed(data, scale, zero, fmt, shape)
    return found


def weight_of(base: Base) -> Tensor:
    """The packed weight f32 [N, K], in its own basis: inputs come to it rotated and divided by `smooth`."""
    found = [packed.dequantize() for packed in parts_of(base).values()]
    return in_order(found, base.segments, base.axis) if isinstance(base, QuantMixed) else found[0]


def as_packed(base: Base, delta: Tensor) -> Tensor:
    """A change [N, K] of what is multiplied with the linear's input, in the basis of the packed weight."""
    delta = rotated(delta.to(torch.float32), base.rotation)
    smooth = base._buffers["smooth"]
    return delta if smooth is None else delta * smooth


def with_buffers(base: Base, buffers: dict[str, Tensor]) -> Base:
    """A module like `base` with other buffers in their places; all else is shared."""
    found = copy.copy(base)
    found.__dict__["_buffers"] = {**base._buffers, **buffers}
    return found


def _cut(base: Base, delta: Tensor) -> list[Tensor]:
    if isinstance(base, QuantMixed):
        return [take(delta, segment, base.axis) for segment in base.segments]
    return [delta]


def _nearer(wanted: Tensor, before: Packed, found: Packed) -> Packed:
    """Of `found` and the same weight with the scales that it had, the one with the smaller error."""
    fmt = before.format
    if fmt.is_plain:
        return found
    params = before.params()
    kept = Packed.from_codes(quantize(wanted, fmt, *params), fmt, *params)
    errors = [energies(wanted, packed.dequantize())[1] for packed in (kept, found)]
    return kept if errors[0] <= errors[1] else found
