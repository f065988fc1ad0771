"""Packed weights of the model in the layouts of ONNX Runtime's kernels. Unpacked once per weight, at lowering."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.values import Dim, Value
from qfx.format import Format
from qfx.numerics import dequantize, effective_scale
from qfx.packing import pack_bits, unpack_codes, unpack_zeros

# Since 1.27 ONNX Runtime evaluates nothing of more bytes when it loads a model, but in each call.
MOST_FOLDED = 1 << 30


def _only_size(b: Builder, fmt: Format, stored: int) -> int | None:
    """The last size of an input that was traced with a symbol and can only be what the weight's codes fill (channels of
    a convolution over audio): that of the traced call. None where the codes were packed of another size."""
    x = b.node.args[0] if b.node is not None and b.node.args else None
    size = x.meta["val"].shape[-1] if isinstance(x, fx.Node) else None
    if fmt.bits == 8 or not isinstance(size, torch.SymInt) or not size.node.has_hint():
        return stored if fmt.bits == 8 else None
    traced, group = int(size.node.hint), fmt.group or 1
    whole = torch.zeros(1, -(-traced // group) * group, dtype=torch.uint8)  # codes fill whole groups
    return traced if pack_bits(whole, fmt.bits).shape[-1] == stored else None


def together(names: Iterable[str]) -> str:
    """What the name of the first of several tensors gains where they are one: something else in any other company."""
    return f".packed-{hashlib.sha256(chr(10).join(names).encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Weight:
    """A packed weight [.., N, K] whose tensors the model holds; `name` is that of its codes. zero: one each."""

    name: str
    data: Tensor
    scale: Tensor
    zero: Tensor | None
    format: Format
    k: int

    @classmethod
    def of(cls, b: Builder, nodes: Sequence[Any], fmt: Format, k: Dim) -> Weight:
        """From the arguments (codes, scale, zero), which must be the model's own tensors."""
        codes = nodes[0]
        if not isinstance(k, int) and isinstance(codes, fx.Node) and codes.op == "get_attr":
            k = _only_size(b, fmt, b.tensor(codes).shape[-1]) or k
        if not isinstance(k, int):
            raise NotImplementedError("a packed weight with a size that is not a number")
        for node in nodes:
            if isinstance(node, fx.Node) and node.op != "get_attr":
                raise NotImplementedError("a packed weight that is computed in the graph")
        data, scale, zero = (b.tensor(node) if isinstance(node, fx.Node) else None for node in nodes)
        assert data is not None and scale is not None, "a packed weight without codes or scale"
        zero = None if zero is None else unpack_zeros(zero.detach(), fmt, scale)
        return cls(str(nodes[0].target), data.detach(), scale.detach(), zero, fmt, k)

    @property
    def n(self) -> int:
        """Number of output features."""
        return self.data.shape[-2]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return self.data.dim()

    def codes(self) -> Tensor:
        """Unpacked codes, [.., N, K]."""
        return unpack_codes(self.data, self.format, self.k)

    def factor(self) -> Tensor:
        """The f32 scale of the codes."""
        return effective_scale(self.scale, self.zero if self.format.has_global_scale else None, self.format)

    def pieces(self, rows: int) -> Iterator[Tensor]:
        """f32 [rows, K] after each other: some rows at a time, since floats need far more memory than codes."""
        rows = self.n if self.format.block is not None or self.format.nested else rows
        for start in range(0, self.n, rows):
            part = slice(start, start + rows)
            scale = self.scale[part] if self.scale.dim() else self.scale
            whole = self.zero is None or self.format.has_global_scale or not self.zero.dim()
            zero = self.zero if whole or self.zero is None else self.zero[part]
            yield dequantize(unpack_codes(self.data[part], self.format, self.k), self.format, scale, zero)

    def dequantized(self, b: Builder) -> Value:
        """f32 [.., N, K] as an initializer."""

        def make() -> Tensor:
            return dequantize(self.codes(), self.format, self.scale, self.zero)

        return self._made(b, "f32", torch.float32, (*self.data.shape[:-1], self.k), make)

    def columns(self, b: Builder) -> tuple[Value, Value, Value | None]:
        """int8 codes [K, N], scale [N] or [], zero points [N] or [] where int8 cannot hold the codes without them."""
        zero = None
        if self.format.type == "u8":
            shape = self._flat(self.zero)
            zero = self._made(b, "zero_s8", torch.int8, shape, lambda: _shifted(self.zero).reshape(shape))
        return self._columns(b), self._row_scale(b), zero

    def _columns(self, b: Builder) -> Value:
        """int8 [K, N]."""
        turned = self.turned(b)
        if turned is not None:
            return turned
        return self._made(b, "columns", torch.int8, (self.k, self.n), lambda: self._signed().t().contiguous())

    def turned(self, b: Builder) -> Value | None:
        """int8 codes [K, N] made of rows that the model has already (a tied embedding), when it is loaded.

        None where it has none, where ONNX Runtime would turn them in each call, and for a second product: on some
        processors it wants a weight for each.
        """
        key = ("turned", self.name)
        if ("rows", self.name) not in b.memo or key in b.memo or self.format.type != "i8":
            return None
        if self.data.nbytes > MOST_FOLDED:
            return None
        b.memo[key] = True
        turned = b.op("Transpose", b.weight(self.data, self.name), perm=[1, 0])
        return Value(turned.name, torch.int8, (self.k, self.n))

    def _row_scale(self, b: Builder) -> Value:
        """f32 [N] or []."""
        shape = self._flat(self.scale)
        return self._made(b, "scale", torch.float32, shape, lambda: self.factor().reshape(shape))

    def column_sums(self, b: Builder) -> Value:
        """f32 [N]: sum of (code - zero) * scale over K, for inputs with a zero point of their own."""

        def make() -> Tensor:
            return dequantize(self.codes(), self.format, self.scale, self.zero, torch.float64).sum(-1).to(torch.float32)

        return self._made(b, "sums", torch.float32, (self.n,), make)

    def rows(self, b: Builder) -> tuple[Value, Value, Value | None]:
        """Codes [N, K] of 8 bits as they are stored, scale [N] or [], zero points [N, 1] or []."""
        b.memo["rows", self.name] = True
        codes, scale = b.weight(self.data, self.name), self._row_scale(b)
        zero = None if self.zero is None else b.weight(self.zero, f"{self.name}.zero")
        return codes, scale, zero

    def _signed(self) -> Tensor:
        """Codes as int8: u8 shifted by 128 (zero points too), narrower affine codes with their zero point taken off."""
        codes = self.codes()
        if not self.format.has_zero:
            return codes
        assert self.zero is not None
        if self.format.bits == 8:
            return _shifted(codes)
        return (codes.to(torch.int16) - self.zero.to(torch.int16)).to(torch.int8)

    def _flat(self, tensor: Tensor | None) -> tuple[int, ...]:
        assert tensor is not None, f"{self.format} without its zero point"
        return (tensor.numel(),) if tensor.dim() else ()

    def _made(
        self, b: Builder, what: str, dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]
    ) -> Value:
        return b.derived(f"{self.name}.{what}", dtype, shape, make)


def _shifted(codes: Tensor | None) -> Tensor:
    assert codes is not None
    return (codes.to(torch.int16) - 128).to(torch.int8)
