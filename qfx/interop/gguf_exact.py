"""Weights that qfx packed and GGUF's blocks that hold the same values: either way without rounding anew.

Integers with one scale for 32 columns (or more: then it is repeated) are Q4_0, Q5_0 or Q8_0, whichever holds all codes
less their zero points. Both store w = d q with a float16 d: other scales are rounded to float16, which is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.format import Format
from qfx.interop.gguf_blocks import Blocks, block_type, exponent_scale, pack, unpack
from qfx.numerics import spread
from qfx.packing import Packed

_BY_RANGE = ("Q4_0", "Q5_0", "Q8_0")
_FORMATS = {"Q8_0": "i8/g32/f16", "Q4_0": "i4/g32/f16", "Q5_0": "i5/g32/f16", "MXFP4": "f4e2m1/g32/e8m0"}
_PARTS = {"Q6_K": "i6/g16", "Q3_K": "i3/g16"}
_AFFINE = {"Q4_1": "u4/g32/f16", "Q5_1": "u5/g32/f16"}


@dataclass(frozen=True, eq=False)
class Exact:
    """A packed weight as blocks: the type, uint8 [N, row bytes], and the greatest relative error of a scale."""

    kind: str
    data: Tensor
    scale_error: float


def as_blocks(packed: Packed) -> Exact | str:
    """The blocks that hold the values of a packed matrix [N, K], or the reason why none do."""
    fmt, columns = packed.format, packed.shape[-1]
    if str(fmt) == _FORMATS["MXFP4"] and columns % 32 == 0:
        exponents = packed.scale.view(torch.uint8).flatten()
        blocks = Blocks(block_type("MXFP4"), packed.codes().reshape(-1, 32), exponents)
        return Exact("MXFP4", pack(blocks).reshape(packed.shape[0], -1), 0.0)
    if not fmt.is_integer:
        return f"no block type holds {fmt}"
    if columns % 32:
        return f"{columns} columns are no whole number of blocks of 32"
    step = fmt.group or (fmt.block[1] if fmt.block else columns)
    if step % 32:
        return f"{fmt} has a scale for each {step} columns, blocks for 32"
    codes = packed.codes().to(torch.int16)
    if (zero := packed.params().zero) is not None:
        codes = codes - _over_codes(zero.to(torch.int16), fmt, packed.shape)
    low, high = int(codes.min()), int(codes.max())
    for name in _BY_RANGE:
        kind = block_type(name)
        if kind.low <= low and high <= kind.high:
            break
    else:
        return f"its codes lie in {low} to {high}, those of Q8_0 in -127 to 127"
    scale = _over_codes(packed.scale.to(torch.float32), fmt, packed.shape)[:, ::32]
    d = scale.to(torch.float16)
    if not bool(torch.isfinite(d).all()) or bool(((d == 0) & (scale != 0)).any()):
        return "its scales are beyond float16"
    error = ((d.float() - scale).abs() / scale.abs().clamp_min(1e-38)).max()
    blocks = Blocks(kind, codes.to(torch.int8).reshape(-1, 32), d.flatten())
    return Exact(name, pack(blocks).reshape(packed.shape[0], -1), float(error))


def as_packed(data: Tensor, name: str, shape: tuple[int, int]) -> Packed | str:
    """The packed form of the values of blocks uint8 [N, row bytes] of type `name`, or the reason why there is none."""
    formats = {**_FORMATS, **_PARTS, **_AFFINE}
    if name not in formats:
        return f"no format has the values of {name} blocks"
    kind = block_type(name)
    blocks = unpack(data.reshape(-1, kind.nbytes), kind)
    fmt = Format.parse(formats[name])
    rows = shape[0]
    zero = None
    if name == "MXFP4":
        if bool((blocks.d == 255).any()):
            return "an exponent of 255 stands for no number"
        scale = blocks.d.reshape(rows, -1).view(torch.float8_e8m0fnu)
        assert bool((scale.float() == exponent_scale(blocks.d).reshape(rows, -1)).all())
    elif blocks.scales is not None:
        scale = (blocks.d.float()[:, None] * blocks.scales.float()).reshape(rows, -1)
    else:
        scale = blocks.d.reshape(rows, -1)
        if blocks.m is not None:
            found = _zero_points(blocks)
            if found is None:
                return f"its {name} blocks have offsets that are no whole steps"
            zero = found.reshape(rows, -1)
    return Packed.from_codes(blocks.codes.reshape(shape), fmt, scale.contiguous(), zero)


def _zero_points(blocks: Blocks) -> Tensor | None:
    """z of blocks whose m is -z d for a code z, uint8 [B]; None where one has no such z."""
    assert blocks.m is not None
    d, m = blocks.d.float(), blocks.m.float()
    zero = torch.where(d == 0, 0.0, -m / d).round().clamp(0, blocks.kind.high)
    return zero.to(torch.uint8) if bool((-zero * d == m).all()) else None


def _over_codes(values: Tensor, fmt: Format, shape: tuple[int, ...]) -> Tensor:
    """One value for each code, [N, K], of a tensor of `fmt.scale_shape`."""
    if fmt.group:
        return values.repeat_interleave(fmt.group, -1)[..., : shape[-1]]
    if fmt.block:
        over = values.repeat_interleave(fmt.block[0], -2).repeat_interleave(fmt.block[1], -1)
        return over[..., : shape[-2], : shape[-1]]
    return spread(values, fmt).expand(shape)
