"""Weights of `qfx::linear` in the layout of the weight-only kernels.

A list of tensors for a format text, in this order: codes uint8 [N, row bytes]; of three bits their upper plane; scales
[N, groups] as stored, 8-bit ones as uint8; whole f32 [2] (a factor of all scales; a power of two that brings scales
into the range of f16); of affine formats zero points uint8 [N, groups]; of nf4 and f4e2m1 the 16 values, f32. The text
returned beside them is the format that they have now.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qfx.backends.triton.decode_asm import TABLES
from qfx.backends.triton.layout import UNIT_THREE, pack_halves, pack_three, padded
from qfx.errors import UnsupportedError, explain
from qfx.format import Format
from qfx.numerics import effective_scale
from qfx.packing import unpack_codes, unpack_zeros

_LEAST_GROUP = 16


def stored_bits(fmt: Format) -> int:
    """Bits of a code in the kernels' layout: integers of 5 to 7 bits have a byte."""
    return fmt.bits if fmt.bits <= 4 else 8


def group_of(fmt: Format) -> int:
    """Columns that share a scale in the kernels: the greatest power of two in the group; 0 for whole rows."""
    width = fmt.group or (fmt.block[1] if fmt.block else 0)
    return width & -width


@functools.lru_cache(maxsize=256)
def reason_against_weight(w_format: str) -> str | None:
    """Why weights in this format cannot be packed, or None."""
    fmt = Format.parse(w_format)
    if fmt.is_plain:
        return f"'{fmt}' is not quantized"
    if fmt.dynamic or fmt.granularity in ("tok", "head"):
        return f"weights have no scales found at run time or per head, as '{fmt}' says"
    if 0 < group_of(fmt) < _LEAST_GROUP:
        return f"groups of '{fmt}' are no multiples of {_LEAST_GROUP} columns"
    return None


def pack_weight_only(
    w: Tensor, w_scale: Tensor, w_zero: Tensor | None, w_format: str, k: int
) -> tuple[list[Tensor], str]:
    """The tensors of a `qfx.packing.Packed` weight [N, k] for the kernels, and the format that they have then.

    Scales of the tensor, of blocks, of groups that are no powers of two and nested ones are written out: a row has its
    own. Raises UnsupportedError for formats that the kernels do not take, ValueError for data that does not fit.
    """
    fmt = Format.parse(w_format)
    if reason := reason_against_weight(w_format):
        raise UnsupportedError(explain(f"the weight cannot be packed: {reason}", found=w_format))
    codes = unpack_codes(w, fmt, k)
    n = len(codes)
    zero = unpack_zeros(w_zero, fmt, w_scale)
    scale, total = w_scale, torch.ones((), device=w.device)
    scale_type = fmt.scale_type
    if fmt.nested:
        scale, scale_type = effective_scale(w_scale, zero, fmt), "f32"
    elif fmt.has_global_scale:
        assert zero is not None, f"{fmt} needs its global scale"
        total = zero.to(torch.float32).reshape(())
    group = group_of(fmt)
    found = Format(fmt.type, f"g{group}" if group else "ch", scale_type)
    whole = torch.stack([total, _into_f16(scale)]).to(torch.float32)
    tensors = [*_codes(codes, fmt), _by_row(scale, fmt, n, k, group), whole]
    if fmt.has_zero:
        assert zero is not None, f"{fmt} needs a zero point"
        tensors.append(_by_row(zero, fmt, n, k, group))
    if fmt.type in TABLES:
        tensors.append(torch.tensor(TABLES[fmt.type], dtype=torch.float32, device=w.device))
    return tensors, str(found)


def _codes(codes: Tensor, fmt: Format) -> list[Tensor]:
    """One plane of bytes, of three bits two."""
    bits = stored_bits(fmt)
    if fmt.is_integer and fmt.symmetric:
        codes = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    codes = codes.view(torch.uint8)
    return list(pack_three(codes)) if bits == 3 else [pack_halves(codes, bits)]


def _by_row(scale: Tensor, fmt: Format, n: int, k: int, group: int) -> Tensor:
    """Scales (or zero points) [n, groups of the kernels]; 0 bytes for columns of the padding."""
    raw = scale.view(torch.uint8) if scale.dtype.itemsize == 1 else scale
    if fmt.granularity == "":
        return raw.reshape(1, 1).expand(n, 1).contiguous()
    if group:
        width = fmt.group or (fmt.block[1] if fmt.block else group)
        raw = raw.repeat_interleave(width // group, -1)
        if fmt.block:
            raw = raw.repeat_interleave(fmt.block[0], 0)[:n]
        unit = UNIT_THREE if stored_bits(fmt) == 3 else 128
        count = -(-padded(k, unit) // group)
        raw = torch.nn.functional.pad(raw[:, :count], (0, max(count - raw.shape[1], 0)))
    return raw.contiguous()


def _into_f16(scale: Tensor) -> Tensor:
    """The power of two that brings the greatest scale into [0.5, 1); 1 where there is none."""
    if scale.numel() == 0:
        return torch.ones((), device=scale.device)
    _, exponent = torch.frexp(scale.to(torch.float32).abs().amax())
    return torch.ldexp(torch.ones((), device=scale.device), -exponent.clamp(-120, 120))
