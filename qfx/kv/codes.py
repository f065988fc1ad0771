"""Codes: tokens of some heads in one format, in memory that grows at its end and is never written twice.

    data   [B, G, rows, D]       codes, below 8 bits those of consecutive tokens in one byte, the bits as `qfx.packing`
                                 has them, signed ones with an offset: 8 / bits tokens a row, or 8 in `bits` rows
    scale  [B, G, room / N, D]   keys in groups of N tokens; else [B, G, room, scales of a token]
    zero   as scale              signed, of affine formats (see `qfx.kv.formats`)

A tile is read as floats of the codes, (code + offset) for signed types below 8 bits, plane by plane: first the tokens
whose codes are the first of their bytes, then the second ones. So whole rows are read and written, and nothing is
interleaved. A scale that serves a whole token is left to the reader, who folds it into scores or probabilities, and so
is what is to be taken off a code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qfx import numerics
from qfx.format import Format
from qfx.kv.formats import planes_of, scales_of_token, zero_dtype
from qfx.numerics import QParams
from qfx.packing import pack_bits

ROOM = 256  # tokens by which the memory grows
_E4M3 = 256.0  # between the biases of a half's exponent and of an f8e4m3's
_LARGEST = {torch.int8: 127, torch.int16: 32767}


class Codes:
    """See the module. by_tokens: a group is of tokens (keys), not of channels (values)."""

    def __init__(self, fmt: Format, like: Tensor, *, by_tokens: bool) -> None:
        """like: [B, G, *, D], whose batch, heads, channels and device are those of what comes."""
        self.fmt, self.width, self.kind = fmt, like.shape[-1], str(fmt)
        self.group = (fmt.group or 1) if by_tokens else 1
        self.by_tokens = self.group > 1
        self.planes = planes_of(fmt)
        self.unit = math.lcm(self.group, self.planes)  # tokens that are written and read together
        batch, heads = like.shape[:2]
        self.data = like.new_empty((batch, heads, 0, self.width), dtype=stored_dtype(fmt))
        each = 0 if fmt.is_plain else self.width if self.by_tokens else scales_of_token(fmt, self.width)
        self.scale = like.new_empty((batch, heads, 0, each), dtype=_raw(fmt.scale_dtype))
        self.zero = like.new_empty((batch, heads, 0, each), dtype=zero_dtype(fmt)) if fmt.has_zero else None
        self.native: tuple[Tensor, Tensor, Any] | None = None  # what `qfx.kv.native` made of this memory

    def __getstate__(self) -> dict[str, Any]:
        """Without what knows addresses of this memory, which a copy and another process have not."""
        return {**self.__dict__, "native": None}

    @property
    def one_scale(self) -> bool:
        """A token has one scale, which `scales` gives and `tile` leaves out."""
        return not self.fmt.is_plain and self.scale.shape[-1] == 1 and not self.by_tokens

    @property
    def middle(self) -> float | None:
        """What stored codes of signed types below 8 bits are above the codes."""
        fmt = self.fmt
        return float(1 << (fmt.bits - 1)) if fmt.is_integer and fmt.symmetric and fmt.bits < 8 else None

    @property
    def room(self) -> int:
        """Tokens for which there is memory."""
        return self._tokens(self.data.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        tensors = [self.data, self.scale] + ([] if self.zero is None else [self.zero])
        return sum(t.numel() * t.element_size() for t in tensors)

    def write(self, x: Tensor, at: int) -> None:
        """Store x [B, G, n, D] as tokens at, at + 1, ...; both whole units."""
        self.put(*encode(x, self.fmt, by_tokens=self.by_tokens), at)

    def put(self, data: Tensor, params: QParams | None, at: int) -> None:
        """Store what `encode` gave."""
        end = at + self._tokens(data.shape[2])
        assert at % self.unit == 0 and end % self.unit == 0, (at, end, self.unit)
        self.reserve(end, at)
        self.data[:, :, self._rows(at) : self._rows(end)] = data
        if params is not None:
            rows = slice(at // self.group, end // self.group)
            self.scale[:, :, rows] = params.scale.view(self.scale.dtype)
            if self.zero is not None:
                assert params.zero is not None
                self.zero[:, :, rows] = params.zero

    def reserve(self, end: int, used: int) -> None:
        """Have memory for tokens up to `end`, of which `used` are there."""
        if end > self.room:
            self._grow(end, used)

    def tile(self, start: int, end: int, out: Tensor, *, scaled: bool = True) -> Tensor:
        """Codes of tokens start to end - 1, whole units, as f32 [B, G, planes, (end - start) / planes, D].

        out: f32 of at least as many elements; it is written over. scaled: times their scales, unless `one_scale`.
        """
        shape = (*self.data.shape[:2], self.planes, (end - start) // self.planes, self.width)
        found = out[: math.prod(shape)].view(shape)
        self._decode(self.data[:, :, self._rows(start) : self._rows(end)], found)
        if scaled and not self.fmt.is_plain and not self.one_scale:
            view, shaped = self._by_scale(found)
            view.mul_(shaped(self._float_scale(start, end)))
        return found

    def scales(self, start: int, end: int) -> Tensor:
        """The scales of each token, f32 [B, G, scales, n], where groups are not of tokens."""
        return self._float_scale(start, end).transpose(-1, -2).contiguous()

    def zeros(self, start: int, end: int) -> Tensor | None:
        """zero * scale of the groups that hold these tokens, f32, shaped as `scale`; None: nothing is to be taken off.

        Where `one_scale`, the zero alone.
        """
        if self.zero is None and self.middle is None:
            return None
        scale = self._float_scale(start, end)
        if self.zero is None:
            zero = torch.full_like(scale, self.middle or 0.0)
        else:
            zero = self.zero[:, :, start // self.group : -(-end // self.group)].to(torch.float32)
        return zero if self.one_scale else scale * zero

    def values(self, start: int, end: int) -> Tensor:
        """Tokens start to end - 1 as they come back, f32 [B, G, end - start, D]."""
        batch, heads = self.data.shape[:2]
        first, last = self.around(start, end)
        room = self.data.new_empty(batch * heads * (last - first) * self.width, dtype=torch.float32)
        found = self.tile(first, last, room)
        zeros = self.zeros(first, last)
        if zeros is not None:
            view, shaped = self._by_scale(found)
            view -= shaped(zeros)
        found = found.transpose(2, 3).flatten(2, 3)
        if self.one_scale:
            found = found * self._float_scale(first, last)
        return found[:, :, start - first : end - first]

    def around(self, start: int, end: int) -> tuple[int, int]:
        """The least range of whole units that holds these tokens."""
        return start // self.unit * self.unit, -(-end // self.unit) * self.unit

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every tensor changed, such as sequences selected or memory moved."""
        with torch.inference_mode(False):
            zero = None if self.zero is None else change(self.zero)
            return self.of(change(self.data), change(self.scale), zero)

    def of(self, data: Tensor, scale: Tensor, zero: Tensor | None) -> Codes:
        """The same format in other memory."""
        other = object.__new__(Codes)
        other.__dict__.update(self.__dict__)
        other.data, other.scale, other.zero = data, scale, zero
        return other

    def fixed(self, tokens: int) -> list[Tensor]:
        """New memory for exactly so many tokens, whole units: what `of` takes, without a zero point that is None."""
        pairs = [(self.data, self._rows(tokens)), (self.scale, tokens // self.group), (self.zero, tokens // self.group)]
        return [t.new_zeros((*t.shape[:2], rows, t.shape[3])) for t, rows in pairs if t is not None]

    def without(self, tokens: int) -> Codes:
        """The same without the first tokens, whole units, in other memory: what reads this one is undisturbed."""
        assert tokens % self.unit == 0, (tokens, self.unit)
        room = max(self.room, 1)
        return self.each(lambda t: t[:, :, tokens * t.shape[2] // room :].clone())

    def _rows(self, tokens: int) -> int:
        return tokens * self.fmt.bits // 8 if self.planes > 1 else tokens

    def _tokens(self, rows: int) -> int:
        return rows * 8 // self.fmt.bits if self.planes > 1 else rows

    def _grow(self, tokens: int, used: int) -> None:
        unit = math.lcm(ROOM, self.unit)
        room = -(-tokens // unit) * unit

        def longer(old: Tensor, length: int, kept: int) -> Tensor:
            new = old.new_empty((*old.shape[:2], length, old.shape[-1]))
            new[:, :, :kept] = old[:, :, :kept]
            return new

        with torch.inference_mode(False):  # it may be written to without inference mode later
            self.data = longer(self.data, self._rows(room), self._rows(used))
            self.scale = longer(self.scale, room // self.group, used // self.group)
            self.zero = None if self.zero is None else longer(self.zero, room // self.group, used // self.group)

    def _float_scale(self, start: int, end: int) -> Tensor:
        """Scales of the groups that hold these tokens."""
        stored = self.scale[:, :, start // self.group : -(-end // self.group)]
        scale = stored.view(self.fmt.scale_dtype).to(torch.float32)
        return scale * _E4M3 if self.fmt.type == "f8e4m3" else scale

    def _by_scale(self, found: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """A tile with axes for its groups, and what gives scales of whole units axes to go with it."""
        planes = self.planes
        if self.by_tokens and self.group % planes == 0:
            return found.unflatten(3, (-1, self.group // planes)), lambda t: t.unsqueeze(3).unsqueeze(2)

        def by_token(t: Tensor) -> Tensor:
            t = t.repeat_interleave(self.group, 2) if self.by_tokens else t
            apart: Tensor = t.unflatten(2, (-1, planes))
            return apart.transpose(2, 3)

        group = self.fmt.group or 0
        if self.by_tokens or group == 0 or group >= self.width:
            return found, by_token
        if self.width % group:
            return found, lambda t: by_token(t).repeat_interleave(group, -1)[..., : self.width]
        return found.unflatten(-1, (-1, group)), lambda t: by_token(t).unsqueeze(-1)

    def _decode(self, data: Tensor, out: Tensor) -> None:
        """Codes as floats, planes one after the other, written to `out`."""
        fmt = self.fmt
        if fmt.bits >= 8:
            _wide(data.unsqueeze(2), fmt, out)
            return
        for i in range(self.planes):
            code = _plane(data, fmt.bits, i)
            if fmt.is_float:
                code = numerics.dequantize(code, Format(fmt.type), torch.ones((), device=code.device))
            out[:, :, i] = code


def _plane(data: Tensor, bits: int, i: int) -> Tensor:
    """The i-th codes of all bytes, or of all 8 codes in `bits` rows."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        code = data >> i * bits if i else data
        return code & mask if (i + 1) * bits < 8 else code
    rows: Tensor = data.unflatten(2, (-1, bits))
    byte, shift = divmod(i * bits, 8)
    code = rows[:, :, :, byte] >> shift
    if shift + bits > 8:
        code = code | (rows[:, :, :, byte + 1] << (8 - shift))
    return code & mask


def encode(x: Tensor, fmt: Format, *, by_tokens: bool) -> tuple[Tensor, QParams | None]:
    """What is stored of x [B, G, n, D]: rows of codes, and scales and zero points as `Codes` holds them.

    by_tokens: groups are of tokens, of which n is a multiple; it is one of the tokens that share bytes, too.
    """
    if fmt.is_plain:
        return x.to(fmt.code_dtype), None
    if fmt.type == "i8" and str(fmt) == "i8/tok/f16":
        return _bytes(x)
    rows = x.transpose(-1, -2) if by_tokens else x
    params = _params(rows, fmt)
    codes = numerics.quantize(rows, fmt, *params)
    if by_tokens:
        params = QParams(*(None if t is None else t.transpose(-1, -2) for t in params))  # type: ignore[arg-type]
    if fmt.bits >= 8:
        return (codes.transpose(-1, -2) if by_tokens else codes).view(stored_dtype(fmt)), params
    if fmt.is_integer and fmt.symmetric:
        codes = codes + (1 << (fmt.bits - 1))
    packed = pack_bits(codes if by_tokens else codes.transpose(-1, -2), fmt.bits)
    return packed.transpose(-1, -2), params


def _bytes(x: Tensor) -> tuple[Tensor, QParams]:
    """i8/tok/f16 as `numerics` rounds it, in few steps, for it is done for every token."""
    scale = numerics.divided(x.abs().amax(-1, keepdim=True).to(torch.float32), 127)
    scale = scale.clamp_(2.0**-24, 65504).to(torch.float16)
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
    step = torch.maximum(numerics.divided(high - low, fmt.qmax), numerics.divided(low.abs(), _LARGEST[dtype]))
    scale = numerics.range_qparams(torch.zeros_like(step), step * fmt.qmax, fmt).scale
    zero = torch.round(-low / scale.to(torch.float32)).clamp(-_LARGEST[dtype], _LARGEST[dtype])
    return QParams(scale, zero.to(dtype))


def stored_dtype(fmt: Format) -> torch.dtype:
    """dtype of the memory that holds the codes: bytes below 8 bits and for 8-bit floats."""
    return torch.uint8 if fmt.bits < 8 or fmt.is_float else fmt.code_dtype


def _raw(dtype: torch.dtype) -> torch.dtype:
    """Types of one byte that few operations know are held as bytes."""
    return torch.uint8 if dtype.itemsize == 1 else dtype


def _wide(data: Tensor, fmt: Format, out: Tensor) -> None:
    """Codes of 8 bits and more. The bits of an 8-bit float are those of a half, up to the factor _E4M3."""
    if fmt.type == "f8e4m3":
        halves = (data.view(torch.int8).to(torch.int16) << 7) & -0x4001
        out.copy_(halves.view(torch.float16))
    elif fmt.type == "f8e5m2":
        out.copy_((data.to(torch.int16) << 8).view(torch.float16))
    else:
        out.copy_(data)
