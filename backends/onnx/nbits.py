"""The layout of com.microsoft MatMulNBits: which bits and block size serve a format, and the weight packed for them.

Codes go to 2, 4 or 8 bits: i3 is held in 4 bits and i6 in 8 without a change of value. 2 bits with blocks of 16 or 256
are slow in ONNX Runtime and are avoided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qfx.backends.onnx.build import Builder
from qfx.backends.onnx.quant_weights import Weight, together
from qfx.backends.onnx.scales import scales, widened
from qfx.backends.onnx.values import Value
from qfx.packing import pack_bits

BLOCKS = (128, 64, 32, 16)
Operands = tuple[Value, Value, Value | None]


@dataclass(frozen=True)
class NBits:
    """bits 2, 4 or 8; block: elements per scale along K."""

    bits: int
    block: int

    def weights(self, b: Builder, *parts: Weight) -> Operands:
        """Codes [N, K/block, block*bits/8], scales [N, K/block] and packed zero points.

        Several weights of one format and K lie one below the other: N is the sum of theirs.
        """
        first, n = parts[0], sum(weight.n for weight in parts)
        blocks = -(-first.k // self.block)
        name = f"{first.name}.{self.bits}b{self.block}" + (together(w.name for w in parts) if len(parts) > 1 else "")
        shape = (n, blocks, self.block * self.bits // 8)

        def stacked(make: Callable[[Weight], Tensor], width: tuple[int, ...]) -> Tensor:
            made = [make(weight).reshape(weight.n, *width) for weight in parts]
            return made[0] if len(made) == 1 else torch.cat(made)

        data = b.derived(name, torch.uint8, shape, lambda: stacked(lambda w: self._codes(w, blocks), shape[1:]))
        steps = self._scales(b, f"{name}.scale", parts)
        if not first.format.has_zero:
            return data, steps, None
        width = -(-blocks * self.bits // 8)
        zeros = b.derived(
            f"{name}.zero", torch.uint8, (n, width), lambda: stacked(lambda w: self._zeros(w, blocks), (width,))
        )
        return data, steps, zeros

    def _scales(self, b: Builder, name: str, parts: Sequence[Weight]) -> Value:
        """f32 [N, K/block] of weights that lie one below the other."""
        first, n = parts[0], sum(weight.n for weight in parts)
        blocks = -(-first.k // self.block)
        by_row = first.format.group is None and first.format.block is None
        width = 1 if by_row and b.portable else blocks  # a session of this process gets them as its kernels want them

        def make() -> Tensor:
            return torch.cat([self._spread(w, w.factor(), width).reshape(w.n, width) for w in parts])

        return widened(b, scales(b, name, first.format, (n, width), make), (n, blocks))

    def points(self, b: Builder, weight: Weight) -> Value | None:
        """Zero points one by one, u8 [N, K/block, 1]; None where they are 2^(bits-1).

        A file for ONNX Runtime holds those of `weights`; they are taken apart when it is loaded.
        """
        if not weight.format.has_zero:
            return None
        assert weight.zero is not None
        blocks, zero = -(-weight.k // self.block), weight.zero
        if b.runtime == "onnxruntime":
            return self._apart(b, weight, blocks)
        name = f"{weight.name}.{self.bits}b{self.block}.points"
        make = lambda: self._spread(weight, zero, blocks).unsqueeze(-1)  # noqa: E731
        return b.derived(name, torch.uint8, (weight.n, blocks, 1), make)

    def _apart(self, b: Builder, weight: Weight, blocks: int) -> Value:
        packed = self.weights(b, weight)[2]
        assert packed is not None
        shape, each = (weight.n, blocks, 1), 8 // self.bits
        points = b.op("Unsqueeze", packed, b.ints([-1]))
        if each > 1:
            shifts = b.const([self.bits * i for i in range(each)], torch.uint8)
            mask = b.const((1 << self.bits) - 1, torch.uint8)
            points = b.op("BitwiseAnd", b.op("BitShift", points, shifts, direction="RIGHT"), mask)
            points = b.op("Reshape", points, b.ints([weight.n, -1, 1]))
            if blocks % each:
                points = b.op("Slice", points, b.ints([0]), b.ints([blocks]), b.ints([1]))
        return Value(points.name, torch.uint8, shape)

    def halves(self, b: Builder, weight: Weight) -> tuple[Operands, Operands]:
        """Codes of 8 bits as two weights of 4 bits each, (codes, scales, zero points) as `weights` gives them:

        (code - zero) * s = (high - high zero) * 16 s + (low - low zero) * s
        """
        assert self.bits == 8, self
        return self._half(b, weight, "high", 4), self._half(b, weight, "low", 0)

    def _half(self, b: Builder, weight: Weight, word: str, shift: int) -> Operands:
        blocks, n = -(-weight.k // self.block), weight.n
        name = f"{weight.name}.8b{self.block}.{word}"
        shape = (n, blocks, self.block // 2)

        def codes() -> Tensor:
            return pack_bits((self._codes(weight, blocks) >> shift) & 15, 4).reshape(shape)

        def zeros() -> Tensor:
            return pack_bits((self._all_zeros(weight, blocks) >> shift) & 15, 4)

        steps = self._scales(b, f"{weight.name}.8b{self.block}.scale", [weight])
        return (
            b.derived(name, torch.uint8, shape, codes),
            b.op("Mul", steps, b.scalar(float(1 << shift), torch.float32)) if shift else steps,
            b.derived(f"{name}.zero", torch.uint8, (n, -(-blocks // 2)), zeros),
        )

    def _all_zeros(self, weight: Weight, blocks: int) -> Tensor:
        """Zero points u8 [N, blocks], those of signed formats too."""
        if weight.format.has_zero:
            assert weight.zero is not None
            return self._spread(weight, weight.zero, blocks)
        return torch.full((weight.n, blocks), 1 << (self.bits - 1), dtype=torch.uint8)

    def experts(
        self, b: Builder, parts: Sequence[Weight], order: Tensor | None = None
    ) -> tuple[Value, Value, Value | None]:
        """The weights [N, K] of experts for QMoE: codes [E, N, K*bits/8], scales [E, N, K/block], packed zero points.

        order: the rows of each weight in another order.
        """
        first, count = parts[0], len(parts)
        assert first.k % self.block == 0, (first.k, self.block)
        blocks = first.k // self.block
        name = f"{first.name.removesuffix('.0')}.{self.bits}b{self.block}.experts"

        def stacked(width: int, make: Callable[[Weight], Tensor]) -> tuple[tuple[int, ...], Callable[[], Tensor]]:
            def made() -> Tensor:
                rows = [make(weight).reshape(weight.n, width) for weight in parts]
                return torch.stack(rows if order is None else [one[order] for one in rows])

            return (count, first.n, width), made

        data = b.derived(name, torch.uint8, *stacked(first.k * self.bits // 8, lambda w: self._codes(w, blocks)))
        steps = stacked(blocks, lambda w: self._spread(w, w.factor(), blocks))
        found = scales(b, f"{name}.scale", first.format, *steps)
        if not first.format.has_zero:
            return data, found, None
        points = stacked(-(-blocks * self.bits // 8), lambda w: self._zeros(w, blocks))
        return data, found, b.derived(f"{name}.zero", torch.uint8, *points)

    def _codes(self, weight: Weight, blocks: int) -> Tensor:
        if self._same_bytes(weight, blocks):
            return weight.data
        codes = weight.codes().to(torch.int16)
        if not weight.format.has_zero:
            codes = codes + (1 << (self.bits - 1))
        missing = blocks * self.block - weight.k
        padded = torch.nn.functional.pad(codes, (0, missing), value=1 << (self.bits - 1))
        return pack_bits(padded.to(torch.uint8), self.bits)

    def _same_bytes(self, weight: Weight, blocks: int) -> bool:
        """Is the stored bitstream this layout already? Then it is used where it lies."""
        fmt = weight.format
        if fmt.bits != self.bits or (fmt.bits == 8 and not fmt.has_zero):
            return False
        stored = fmt.padded(weight.k) if fmt.bits < 8 else weight.k  # codes of 8 bits are not padded
        return stored == blocks * self.block

    def _zeros(self, weight: Weight, blocks: int) -> Tensor:
        assert weight.zero is not None
        return pack_bits(self._spread(weight, weight.zero, blocks), self.bits)

    def _spread(self, weight: Weight, values: Tensor, blocks: int) -> Tensor:
        """One value per row and block: repeated where the format has fewer."""
        fmt = weight.format
        if values.dim() == 0:
            return values.reshape(1, 1).repeat(weight.n, blocks)
        if fmt.block is not None:
            values = values.repeat_interleave(fmt.block[0], 0)[: weight.n]
        group = fmt.group or (fmt.block[1] if fmt.block else blocks * self.block)
        return values.repeat_interleave(group // self.block, 1)[:, :blocks].contiguous()


def nbits_layout(weight: Weight) -> NBits | None:
    """The layout that holds a weight exactly, or None."""
    fmt = weight.format
    if not fmt.is_integer or weight.rank != 2:
        return None
    group = fmt.group or (fmt.block[1] if fmt.block else None)
    block = next((size for size in BLOCKS if group is None or group % size == 0), None)
    if block is None:
        return None
    while group is None and block > 16 and block // 2 >= weight.k:
        block //= 2
    bits = next(size for size in (2, 4, 8) if fmt.bits <= size)
    return NBits(4 if bits == 2 and block == 16 else bits, block)
