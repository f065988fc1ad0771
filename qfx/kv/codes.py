"""Codes: tokens of some heads in one format, in memory that grows at its end and is never written twice.

    data   [B, G, room, row]     codes of a token, dense bits below 8 bits (`qfx.packing`), signed ones with an offset
    scale  [B, G, room / N, D]   keys in groups of N tokens; else [B, G, room, scales of a token]
    zero   as scale              signed, of affine formats (see `qfx.kv.formats`)

A tile is read as floats of the codes, (code + offset) for signed types below 8 bits. A scale that serves a whole token
is left to the reader, who folds it into scores or probabilities; others are put in. What is to be taken off a code is
always the reader's. To save a pass over a tile, its channels come plane by plane: the first codes of all bytes, then
the second, as `order` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qfx import numerics
from qfx.format import Format
from qfx.kv.formats import row_bytes, scales_of_token, zero_dtype
from qfx.numerics import QParams
from qfx.packing import pack_bits, unpack_bits

ROOM = 256  # tokens by which the memory grows
_E4M3 = 256.0  # between the biases of a half's exponent and of an f8e4m3's
_LARGEST = {torch.int8: 127, torch.int16: 32767}


class Codes:
    """See the module. by_tokens: a group is of tokens (keys), not of channels (values)."""

    def __init__(self, fmt: Format, like: Tensor, *, by_tokens: bool) -> None:
        """like: [B, G, *, D], whose batch, heads, channels and device are those of what comes."""
        self.fmt, self.width = fmt, like.shape[-1]
        self.group = (fmt.group or 1) if by_tokens else 1
        self.by_tokens = self.group > 1
        batch, heads = like.shape[:2]
        row = row_bytes(fmt, self.width) if fmt.bits <= 8 else self.width
        self.data = like.new_empty((batch, heads, 0, row), dtype=_stored_dtype(fmt))
        each = 0 if fmt.is_plain else self.width if self.by_tokens else scales_of_token(fmt, self.width)
        self.scale = like.new_empty((batch, heads, 0, each), dtype=_raw(fmt.scale_dtype))
        self.zero = like.new_empty((batch, heads, 0, each), dtype=zero_dtype(fmt)) if fmt.has_zero else None
        self.planes = _planes(fmt, self.width, by_tokens=self.by_tokens)
        self.order = None if self.planes == 1 else _order(self.width, self.planes, like.device)

    @property
    def one_scale(self) -> bool:
        """A token has one scale, which `scales` gives and `tile` leaves out."""
        return not self.fmt.is_plain and self.scale.shape[-1] == 1 and not self.by_tokens

    def write(self, x: Tensor, at: int) -> None:
        """Store x [B, G, n, D] as tokens at, at + 1, ...; both whole groups."""
        self.put(*encode(x, self.fmt, by_tokens=self.by_tokens), at)

    def put(self, data: Tensor, params: QParams | None, at: int) -> None:
        """Store what `encode` gave."""
        end = at + data.shape[2]
        assert at % self.group == 0 and end % self.group == 0, (at, end, self.group)
        if end > self.data.shape[2]:
            self._grow(end, at)
        self.data[:, :, at:end] = data
        if params is not None:
            rows = slice(at // self.group, end // self.group)
            self.scale[:, :, rows] = params.scale.view(self.scale.dtype)
            if self.zero is not None:
                assert params.zero is not None
                self.zero[:, :, rows] = params.zero

    def tile(self, start: int, end: int, out: Tensor) -> Tensor:
        """Tokens start to end - 1 as f32 [B, G, end - start, D]: codes, channels in `order`, scaled unless `one_scale`.

        out: f32 of at least as many elements as the whole groups of these tokens have; it is written over.
        """
        first, last = start // self.group * self.group, -(-end // self.group) * self.group
        shape = (*self.data.shape[:2], last - first, self.width)
        found = out[: math.prod(shape)].view(shape)
        self._decode(self.data[:, :, first:last], found)
        if not self.fmt.is_plain and not self.one_scale:
            view, shaped = self._by_scale(found)
            view.mul_(shaped(self._float_scale(first // self.group, last // self.group)))
        return found if (first, last) == (start, end) else found[:, :, start - first : end - first]

    def scales(self, start: int, end: int) -> Tensor:
        """The scale of each token, f32 [B, G, 1, n], where there is one."""
        assert self.one_scale
        return self._float_scale(start, end).transpose(-1, -2)

    def zeros(self, start: int, end: int) -> Tensor | None:
        """zero * scale of the groups that hold these tokens, f32, shaped as `scale`; None: nothing is to be taken off.

        Where `one_scale`, the zero alone.
        """
        if self.zero is None and self.middle is None:
            return None
        rows = start // self.group, -(-end // self.group)
        scale = self._float_scale(*rows)
        if self.zero is None:
            zero = torch.full_like(scale, self.middle or 0.0)
        else:
            zero = self.zero[:, :, slice(*rows)].to(torch.float32)
        return zero if self.one_scale else scale * zero

    def values(self, start: int, end: int) -> Tensor:
        """Tokens start to end - 1 as they come back, f32 [B, G, end - start, D]."""
        batch, heads = self.data.shape[:2]
        first, last = start // self.group * self.group, -(-end // self.group) * self.group
        room = self.data.new_empty(batch * heads * (last - first) * self.width, dtype=torch.float32)
        found = self.tile(first, last, room)
        zeros = self.zeros(first, last)
        if zeros is not None:
            view, shaped = self._by_scale(found)
            view -= shaped(zeros)
        if self.one_scale:
            found *= self.scales(start, end).transpose(-1, -2)
        found = found[:, :, start - first : end - first]
        return found if self.order is None else torch.empty_like(found).index_copy_(-1, self.order, found)

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every tensor changed, such as sequences selected or memory moved."""
        other = object.__new__(Codes)
        other.__dict__.update(self.__dict__)
        other.data, other.scale = change(self.data), change(self.scale)
        other.zero = None if self.zero is None else change(self.zero)
        other.order = None if self.order is None else self.order.to(other.data.device)
        return other

    def without(self, tokens: int) -> Codes:
        """The same without the first tokens, whole groups, in other memory: what reads this one is undisturbed."""
        assert tokens % self.group == 0, (tokens, self.group)
        room = self.data.shape[2]
        return self.each(lambda t: t[:, :, tokens * t.shape[2] // max(room, 1) :].clone())

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        tensors = [self.data, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def middle(self) -> float | None:
        """What stored codes of signed types below 8 bits are above the codes."""
        fmt = self.fmt
        return float(1 << (fmt.bits - 1)) if fmt.is_integer and fmt.symmetric and fmt.bits < 8 else None

    def _grow(self, tokens: int, used: int) -> None:
        unit = math.lcm(ROOM, self.group)
        room = -(-tokens // unit) * unit

        def longer(old: Tensor, each: int) -> Tensor:
            new = old.new_empty((*old.shape[:2], room // each, old.shape[-1]))
            new[:, :, : used // each] = old[:, :, : used // each]
            return new

        self.data = longer(self.data, 1)
        self.scale = longer(self.scale, self.group)
        self.zero = None if self.zero is None else longer(self.zero, self.group)

    def _float_scale(self, start: int, end: int) -> Tensor:
        scale = self.scale[:, :, start:end].view(self.fmt.scale_dtype).to(torch.float32)
        return scale * _E4M3 if self.fmt.type == "f8e4m3" else scale

    def _decode(self, data: Tensor, out: Tensor) -> None:
        """Codes as floats, planes one after the other, written to `out`."""
        fmt = self.fmt
        if fmt.bits >= 8:
            _wide(data, fmt, out)
        elif fmt.is_float or self.planes == 1:
            codes = unpack_bits(data, fmt.bits, self.width)
            out.copy_(numerics.dequantize(codes, Format(fmt.type), torch.ones(())) if fmt.is_float else codes)
        elif fmt.bits in (2, 4):
            mask, part = (1 << fmt.bits) - 1, self.width // self.planes
            for i in range(self.planes):
                code = data >> (i * fmt.bits) if i else data
                out[..., i * part : (i + 1) * part] = code & mask if i < self.planes - 1 else code
        else:
            _odd_bits(data, fmt.bits, out)

    def _by_scale(self, found: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A tile with axes for its groups, and what gives scales axes to go with it."""
        if self.by_tokens:
            return found.unflatten(2, (-1, self.group)), lambda t: self._in_order(t).unsqueeze(3)
        part = min(self.fmt.group or self.width, self.width) // self.planes
        if self.width % (part * self.planes):  # the last group is shorter
            return found, lambda t: t.repeat_interleave(part, -1)[..., : self.width]
        return found.unflatten(-1, (self.planes, -1, part)), lambda t: t.unsqueeze(-2).unsqueeze(-1)

    def _in_order(self, scale: Tensor) -> Tensor:
        return scale if self.order is None else scale.index_select(-1, self.order)


def encode(x: Tensor, fmt: Format, *, by_tokens: bool) -> tuple[Tensor, QParams | None]:
    """What is stored of x [B, G, n, D]: rows of codes, and scales and zero points as `Codes` holds them.

    by_tokens: groups are of tokens, of which n is a multiple.
    """
    if fmt.is_plain:
        return x.to(fmt.code_dtype), None
    if fmt.type == "i8" and str(fmt) == "i8/tok/f16":
        return _bytes(x)
    rows = x.transpose(-1, -2) if by_tokens else x
    params = _params(rows, fmt)
    codes = numerics.quantize(rows, fmt, *params)
    if by_tokens:
        codes = codes.transpose(-1, -2)
        params = QParams(*(None if t is None else t.transpose(-1, -2) for t in params))  # type: ignore[arg-type]
    if fmt.bits >= 8:
        return codes.view(_stored_dtype(fmt)), params
    if fmt.is_integer and fmt.symmetric:
        codes = codes + (1 << (fmt.bits - 1))
    return pack_bits(codes, fmt.bits), params


def _bytes(x: Tensor) -> tuple[Tensor, QParams]:
    """i8/tok/f16 as `numerics` rounds it, in few steps, for it is done for every token."""
    scale = (x.abs().amax(-1, keepdim=True).to(torch.float32) / 127).clamp_(2.0**-24, 65504).to(torch.float16)
    codes = (x / scale.to(torch.float32)).round_().clamp_(-127, 127)
    return codes.to(torch.int8), QParams(scale, None)


def _params(rows: Tensor, fmt: Format) -> QParams:
    """Scales of the extremes; zero points of affine formats are signed and need not lie among the codes."""
    low, high = numerics.value_range(rows, fmt)
    share = fmt.clip / 100
    if not fmt.has_zero:
        return numerics.range_qparams(low * share, high * share, fmt)
    middle, half = (high + low) / 2, (high - low) / 2 * share
    low, high = middle - half, middle + half
    dtype = zero_dtype(fmt)
    step = torch.maximum((high - low) / fmt.qmax, low.abs() / _LARGEST[dtype])
    scale = numerics.range_qparams(torch.zeros_like(step), step * fmt.qmax, fmt).scale
    zero = torch.round(-low / scale.to(torch.float32)).clamp(-_LARGEST[dtype], _LARGEST[dtype])
    return QParams(scale, zero.to(dtype))


def _stored_dtype(fmt: Format) -> torch.dtype:
    return torch.uint8 if fmt.bits < 8 or fmt.is_float else fmt.code_dtype


def _raw(dtype: torch.dtype) -> torch.dtype:
    """Types of one byte that few operations know are held as bytes."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def _planes(fmt: Format, width: int, *, by_tokens: bool) -> int:
    """Codes that a unit of whole bytes holds; 1 where channels come in their own order."""
    if fmt.bits >= 8 or fmt.is_float:
        return 1
    planes = {2: 4, 4: 2}.get(fmt.bits, 8)
    unit = math.gcd(width, fmt.group) if fmt.group and not by_tokens and fmt.group < width else width
    whole = not fmt.group or by_tokens or fmt.group >= width or width % fmt.group == 0
    return planes if unit % planes == 0 and whole else 1


def _order(width: int, planes: int, device: torch.device) -> Tensor:
    """Channels in the order in which a tile has them."""
    return torch.arange(width, device=device).view(-1, planes).t().reshape(-1)


def _wide(data: Tensor, fmt: Format, out: Tensor) -> None:
    """Codes of 8 bits and more. The bits of an 8-bit float are those of a half, up to the factor _E4M3."""
    if fmt.type == "f8e4m3":
        halves = (data.view(torch.int8).to(torch.int16) << 7) & -0x4001
        out.copy_(halves.view(torch.float16))
    elif fmt.type == "f8e5m2":
        out.copy_((data.to(torch.int16) << 8).view(torch.float16))
    else:
        out.copy_(data)


def _odd_bits(data: Tensor, bits: int, out: Tensor) -> None:
    """Eight codes in `bits` bytes (3, 5, 6 or 7), plane by plane, each octet as one whole number."""
    octets, part = data.unflatten(-1, (-1, bits)), out.shape[-1] // 8
    word = octets[..., 0].to(torch.int32 if bits == 3 else torch.int64)
    for byte in range(1, bits):
        word = word | (octets[..., byte].to(word.dtype) << 8 * byte)
    for i in range(8):
        out[..., i * part : (i + 1) * part] = (word >> i * bits) & ((1 << bits) - 1)
