"""A change of a packed weight: the weight that it gives, rounded again, or kept beside the codes as float factors."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.format import Format
from qfx.live import modules
from qfx.live.mixed import QuantMixed
from qfx.live.modules import QuantLinear, turned
from qfx.live.segments import stem_of, take
from qfx.measuring.measure import energies
from qfx.numerics import quantize
from qfx.packing import Packed
from qfx.passes._hessian import Hessian
from qfx.passes.gptq import round_by
from qfx.rounding.method_options import GptqOptions
from qfx.rounding.parts import round_in_parts

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


def rounded_again(base: Base, delta: Tensor, method: str, *, name: str, seen: Hessian | None = None) -> Change:
    """The weight of `base` with `delta` f32 [N, K], which acts on the linear's own input, in the formats that it has.

    Of what `method` finds (see `qfx.rounding.nearest.round_weight`; with `seen`, inputs as `read_by` gives them, by
    GPTQ) and the nearest values at the scales that the weight has, what loses less is taken, part by part: squared
    error of the weight, with `seen` of the output. Raises ValueError for NaN and Inf, naming `name`.
    """
    held = parts_of(base)
    cut = _cut(base, as_packed(base, delta))
    buffers: dict[str, Tensor] = {}
    signal = moved = noise = 0.0
    for i, ((stem, packed), part) in enumerate(zip(held.items(), cut, strict=True)):
        wanted = packed.dequantize() + part
        ranges = base.segments[i].ranges if isinstance(base, QuantMixed) and base.axis else None
        found = _found(wanted, packed, method, name, None if seen is None else seen.columns(ranges))
        buffers |= {f"{stem}_codes": found.data, f"{stem}_scale": found.scale}
        if found.zero is not None:
            buffers[f"{stem}_zero"] = found.zero
        all_of_it, lost = energies(wanted, found.dequantize())
        signal, moved, noise = signal + all_of_it, moved + float(part.double().square().sum()), noise + lost
    return Change(buffers, signal, moved, noise)


def beside(base: QuantLinear, a: Tensor, b: Tensor) -> Change:
    """The change b a, of f32 factors [r, K] and [N, r], as the float factors beside the packed weight; none is lost."""
    a = as_packed(base, a)
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


def as_packed(base: Base, delta: Tensor) -> Tensor:
    """A change [N, K] of what is multiplied with the linear's input, in the basis of the packed weight, f32."""
    delta = _sorted(base, delta.to(torch.float32))
    delta = modules.as_packed(delta, base.rotation, base._buffers.get("gain"))
    smooth = base._buffers["smooth"]
    return delta if smooth is None else delta * smooth


def read_by(base: Base, x: Tensor) -> Tensor:
    """What the packed weight is multiplied with, before it is rounded, for an input x [.., K] of the linear."""
    x, smooth = turned(_sorted(base, x), base.rotation, base._buffers.get("gain")), base._buffers["smooth"]
    return x if smooth is None else x / smooth


def _sorted(base: Base, x: Tensor) -> Tensor:
    """x [.., K] with its columns in the order in which the weight has them (see `qfx.live.permuted`)."""
    columns = base._buffers.get("columns")
    return x if columns is None else x.index_select(-1, columns)


def with_buffers(base: Base, buffers: dict[str, Tensor]) -> Base:
    """A module like `base` with other buffers in their places; all else is shared."""
    found = copy.copy(base)
    found.__dict__["_buffers"] = {**base._buffers, **buffers}
    return found


def _cut(base: Base, delta: Tensor) -> list[Tensor]:
    if isinstance(base, QuantMixed):
        return [take(delta, segment, base.axis) for segment in base.segments]
    return [delta]


def _found(wanted: Tensor, before: Packed, method: str, name: str, seen: Hessian | None) -> Packed:
    """Of what `method` finds and what the scales of before allow, what loses least."""
    fmt, params = before.format, before.params()
    if fmt.is_plain:
        return round_in_parts(wanted, fmt, "rtn", name=name)
    found = [Packed.from_codes(quantize(wanted, fmt, *params), fmt, *params)]
    if seen is None:
        found.append(round_in_parts(wanted, fmt, method, name=name))
    else:
        options = GptqOptions(sweeps=0)
        found += [round_by(wanted, [seen], fmt, options, name=name, kept=kept)[0] for kept in (params, None)]
    return min(found, key=lambda packed: _loss(wanted - packed.dequantize(), seen))


def _loss(error: Tensor, seen: Hessian | None) -> float:
    return float(error.double().square().sum()) if seen is None or not seen.rows else seen.energy(error)
