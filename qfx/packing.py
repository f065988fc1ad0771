"""Codes to dense bytes and back, and `Packed`: a weight as it is stored.

Formats of 8 bits and more keep one element per code, `[.., N, K]`. Below 8 bits a row is a dense little-endian
bitstream, uint8 `[.., N, ceil(Kp * bits / 8)]` with Kp = K padded to whole groups: element i holds bits i*bits to
(i+1)*bits - 1, so with 4 bits the even element is the low nibble. Signed integers are stored with an offset,
q + 2^(bits-1), so that any stored code is unsigned. Padding decodes to zero; bits after the last element are 0.

Zero points of fewer than 8 bits, one for each scale, lie in the same bitstream, uint8 `[.., ceil(G * bits / 8)]`. Where
that saves no byte of a row (G = 1), and where one serves the whole tensor, each has a byte of its own, as all had in
folders of version 1: the width of a row tells which it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qfx.errors import explain
from qfx.format import Format, dtype_name
from qfx.numerics import NF4_VALUES, QParams, choose_qparams, dequantize, quantize, require_finite
from qfx.storage.spill import beside


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [.., K] below 2**bits to uint8 [.., ceil(K * bits / 8)]."""
    assert 1 <= bits <= 8, bits
    codes = codes.to(torch.uint8)
    count = codes.shape[-1]
    if bits == 8:
        return codes
    if bits == 4:
        codes = _fill(codes, count + count % 2)
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    octets = -(-count // 8)
    eights = _fill(codes, octets * 8).reshape(*codes.shape[:-1], octets, 8)
    data = torch.zeros((*eights.shape[:-1], bits), dtype=torch.uint8, device=codes.device)
    for i in range(8):  # 8 codes fill `bits` bytes; a code lies in one byte or spans two
        byte, shift = divmod(i * bits, 8)
        data[..., byte] |= eights[..., i] << shift
        if shift + bits > 8:
            data[..., byte + 1] |= eights[..., i] >> (8 - shift)
    return data.flatten(-2)[..., : -(-count * bits // 8)].contiguous()


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [.., ceil(count * bits / 8)] to unsigned codes, uint8 [.., count]."""
    assert 1 <= bits <= 8, bits
    assert data.shape[-1] == -(-count * bits // 8), (data.shape, bits, count)
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., :count]
    octets = -(-count // 8)
    data = _fill(data, octets * bits).reshape(*data.shape[:-1], octets, bits)
    codes = torch.empty((*data.shape[:-1], 8), dtype=torch.uint8, device=data.device)
    mask = 2**bits - 1
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code = code | (data[..., byte + 1] << (8 - shift))
        codes[..., i] = code & mask
    return codes.flatten(-2)[..., :count]


def pack_codes(codes: Tensor, fmt: Format, zero: Tensor | None = None) -> Tensor:
    """Codes of `fmt.code_dtype` [.., N, K] to storage. `zero` (affine formats) gives the code of the padding."""
    if fmt.bits >= 8:
        return codes.contiguous()
    if fmt.is_integer and fmt.symmetric:
        codes = (codes + (1 << (fmt.bits - 1))).to(torch.uint8)
    missing = fmt.padded(codes.shape[-1]) - codes.shape[-1]
    if missing:
        codes = torch.cat([codes, _padding(codes, fmt, zero).expand(*codes.shape[:-1], missing)], -1)
    return pack_bits(codes, fmt.bits)


def unpack_codes(data: Tensor, fmt: Format, last_dim: int) -> Tensor:
    """Storage to codes of `fmt.code_dtype` [.., N, last_dim]. Raises ValueError where the data does not fit `fmt`."""
    check_storage(data, fmt, last_dim)
    if fmt.bits >= 8:
        return data
    codes = unpack_bits(data, fmt.bits, fmt.padded(last_dim))[..., :last_dim]
    if fmt.is_integer and fmt.symmetric:
        return codes.to(torch.int8) - (1 << (fmt.bits - 1))
    return codes


def pack_zeros(zero: Tensor | None, fmt: Format) -> Tensor | None:
    """Zero points one each, uint8 [.., G], to storage. What else travels in their place stays as it is."""
    if zero is None or not _zeros_are_dense(fmt, zero.shape):
        return zero
    return pack_bits(zero, fmt.bits)


def unpack_zeros(zero: Tensor | None, fmt: Format, scale: Tensor) -> Tensor | None:
    """Zero points one each, uint8 of the scale's shape, from storage; what else travels in their place as it is.

    Raises ValueError for zero points that fit neither the scales nor their dense form.
    """
    if zero is None or not fmt.has_zero or zero.shape == scale.shape:
        return zero
    lead, groups = scale.shape[:-1], scale.shape[-1] if scale.dim() else 1
    if zero.dtype != torch.uint8 or zero.shape != (*lead, fmt.zero_width(groups)):
        raise ValueError(
            explain(
                f"zero points do not fit format '{fmt}'",
                expected=f"uint8, rows of {fmt.zero_width(groups)} bytes for scales of shape {list(scale.shape)}",
                found=f"{dtype_name(zero.dtype)}, shape {list(zero.shape)}",
            )
        )
    return unpack_bits(zero, fmt.bits, groups)


def _zeros_are_dense(fmt: Format, shape: torch.Size) -> bool:
    return fmt.has_zero and len(shape) > 0 and fmt.zero_width(shape[-1]) < shape[-1]


def check_storage(data: Tensor, fmt: Format, last_dim: int) -> None:
    """Raises ValueError where dtype or row width of stored codes are not those of `fmt` for `last_dim` elements."""
    width = fmt.row_bytes(last_dim) if fmt.bits < 8 else last_dim
    dtype = torch.uint8 if fmt.bits < 8 else fmt.code_dtype
    if data.dtype != dtype or data.shape[-1] != width:
        raise ValueError(
            explain(
                f"packed data does not fit format '{fmt}'",
                expected=f"{dtype}, rows of {width} for {last_dim} elements",
                found=f"{data.dtype}, shape {list(data.shape)}",
                next_step="pass the format and the unpacked last dimension with which the data was packed",
            )
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight as it is stored.

    data: codes, see the module. scale: `format.scale_shape(shape)` in the stored scale type; ones(()) for a plain
    format. zero: zero points of an affine format, packed (see the module), what stands above e4m3 and dq scales, else
    None. shape: the weight's own.
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    shape: tuple[int, ...]

    @classmethod
    def from_codes(cls, codes: Tensor, fmt: Format, scale: Tensor, zero: Tensor | None = None) -> Packed:
        """Pack codes found elsewhere (GPTQ, HQQ, ...): `fmt.code_dtype` [.., N, K] with scales of `fmt.scale_shape`.

        zero: as in `qfx.numerics.QParams`, zero points one each.
        """
        assert codes.dtype == fmt.code_dtype, (codes.dtype, fmt)
        if not fmt.is_plain and tuple(scale.shape) != fmt.scale_shape(codes.shape):
            raise ValueError(
                explain(
                    f"the scale does not fit codes of shape {list(codes.shape)} in format '{fmt}'",
                    expected=f"shape {list(fmt.scale_shape(codes.shape))}",
                    found=f"shape {list(scale.shape)}",
                )
            )
        data = pack_codes(codes, fmt, zero)
        return cls(data, scale.to(fmt.scale_dtype), pack_zeros(zero, fmt), fmt, tuple(codes.shape))

    def part(self, rows: slice) -> Packed:
        """Some rows of a weight [.., N, K], as views. Only of formats in which rows stand alone (`format.by_row`)."""
        assert self.format.by_row, self.format
        data, scale, zero = (
            t[..., rows, :] if t is not None and t.dim() else t for t in (self.data, self.scale, self.zero)
        )
        assert data is not None and scale is not None
        return Packed(data, scale, zero, self.format, (*data.shape[:-1], self.shape[-1]))

    def codes(self) -> Tensor:
        """Unpacked codes, `format.code_dtype`, of the weight's shape."""
        return unpack_codes(self.data, self.format, self.shape[-1])

    def params(self) -> QParams:
        """Scales and zero points (one each) as `qfx.numerics` takes them."""
        return QParams(self.scale, unpack_zeros(self.zero, self.format, self.scale))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it comes back, of the weight's shape."""
        return dequantize(self.codes(), self.format, *self.params(), dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, by name: data, scale, and zero where there is one."""
        named = {"data": self.data, "scale": self.scale}
        return named if self.zero is None else {**named, "zero": self.zero}

    def beside(self, weight: Tensor) -> Packed:
        """The same, in a temporary file where the weight that it was made of lies in a file (`qfx.storage.spill`)."""
        zero = None if self.zero is None else beside(self.zero, weight)
        return replace(self, data=beside(self.data, weight), scale=beside(self.scale, weight), zero=zero)

    @property
    def nbytes(self) -> int:
        """Bytes stored, equal to `format.nbytes(shape)`."""
        tensors = [self.data] if self.format.is_plain else list(self.tensors().values())
        return sum(t.numel() * t.element_size() for t in tensors)


def check_storable(fmt: Format, name: str) -> None:
    """Raises ValueError, naming the weight, for formats that no weight can have: run-time scales, per head."""
    if fmt.dynamic or fmt.granularity == "head":
        raise ValueError(
            explain(
                f"format '{fmt}' cannot store the weight {name!r}",
                expected="a scale for the tensor, or per channel (/ch), group (/gN) or block (/bMxN)",
                found="a scale found at run time" if fmt.dynamic else "a scale per head",
                next_step=f"write '{fmt.type}/ch' or '{fmt.type}/g128'",
            )
        )


def pack_weight(w: Tensor, fmt: Format, *, name: str = "weight") -> Packed:
    """Round `w` [.., N, K] to nearest in `fmt` and pack it. Any leading dimensions (3-D experts).

    Raises ValueError naming `name` for NaN or Inf, and for formats that no weight can have (run-time scales, per head).
    """
    w = w.detach()
    check_storable(fmt, name)
    if fmt.is_plain:
        require_finite(w, name)
        return Packed.from_codes(quantize(w, fmt), fmt, torch.ones((), device=w.device))
    scale, zero = choose_qparams(w, fmt, name=name)
    return Packed.from_codes(quantize(w, fmt, scale, zero), fmt, scale, zero)


def _fill(codes: Tensor, size: int) -> Tensor:
    missing = size - codes.shape[-1]
    if missing == 0:
        return codes
    return torch.cat([codes, codes.new_zeros((*codes.shape[:-1], missing))], -1)


def _padding(codes: Tensor, fmt: Format, zero: Tensor | None) -> Tensor:
    """The stored code that decodes to 0, shaped [.., 1] against `codes`."""
    if fmt.has_zero:
        assert zero is not None, f"{fmt} needs its zero point to be padded"
        last = zero[..., -1:]
        return last.repeat_interleave(fmt.block[0], -2)[..., : codes.shape[-2], :] if fmt.block else last
    neutral = {"nf4": NF4_VALUES.index(0.0), "f4e2m1": 0}.get(fmt.type, 1 << (fmt.bits - 1))
    return codes.new_full((1,), neutral)
