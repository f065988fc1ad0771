"""`QuantMixed`: a linear whose weight has several formats, in the place of nn.Linear or Conv1D (`segments.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qfx.live.modules import PackedModule, as_read, linear_formats, linear_repr, stored_as, turned
from qfx.live.segments import Segment, asked, in_order, stem_of, take
from qfx.packing import Packed
from qfx.reporting.rows import Row


class QuantMixed(PackedModule):
    """y = x W^T + b, the rows (axis 0) or columns (axis 1) of W [out_features, in_features] packed in segments.

    Segments are the buffers rows0_codes, rows0_scale, rows0_zero, rows1_codes, ... (columns0_codes, ...). The input is
    as for QuantLinear: x_format "" leaves it in float, static formats carry x_scale (and x_zero), smooth [in_features]
    divides it first, and before that rotation (block, seed) rotates it, around a gain [in_features] where there is one.
    """

    bias: nn.Parameter | None
    x_scale: Tensor | None
    x_zero: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        packed: Sequence[Packed],
        segments: Sequence[Segment],
        axis: int,
        bias: Tensor | None,
        *,
        x_format: str = "",
        x_scale: Tensor | None = None,
        x_zero: Tensor | None = None,
        smooth: Tensor | None = None,
        rotation: tuple[int, int] | None = None,
        gain: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert [p.shape[axis] for p in packed] == [s.size for s in segments], (packed, segments)
        other = packed[0].shape[1 - axis]
        size = sum(segment.size for segment in segments)
        super().__init__((other, size) if axis else (size, other), dtype)
        self.segments, self.axis, self.x_format = tuple(segments), axis, x_format
        self.rotation = rotation
        if gain is not None:
            self.register_buffer("gain", gain)
        self.out_features, self.in_features = self.shape
        self.nf = self.out_features  # Conv1D's name for it
        for number, part in enumerate(packed):
            self._hold(stem_of(axis, number), part)
        self._hold_operands(bias, x_scale, x_zero, smooth)

    @property
    def stored(self) -> str:
        parts = (f"{s.format} {', '.join(f'{start}:{stop}' for start, stop in s.ranges)}" for s in self.segments)
        return stored_as(f"{'columns' if self.axis else 'rows'} {'; '.join(parts)}", self.rotation)

    @property
    def weight(self) -> Tensor:
        """The weight dequantized, [N, K] in the model's dtype: for code that reads `.weight` itself."""
        parts = []
        for number, segment in enumerate(self.segments):
            last = segment.size if self.axis else self.in_features
            held = self._held(number)
            parts.append(torch.ops.qfx.dequantize(*held, str(segment.format), last, self.dtype))
        return as_read(in_order(parts, self.segments, self.axis), self.rotation, self._buffers.get("gain"))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x.dtype."""
        x = turned(x, self.rotation, self._buffers.get("gain"))
        if self.axis:
            return self._columns(x)
        static = (self.x_scale, self.x_zero, self.smooth, self.x_format)
        parts = [
            torch.ops.qfx.linear(x, *self._held(i), None, *static, str(segment.format))
            for i, segment in enumerate(self.segments)
        ]
        y = in_order(parts, self.segments, -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _columns(self, x: Tensor) -> Tensor:
        x = x if self.smooth is None else (x / self.smooth).to(x.dtype)
        total: Tensor | None = None
        for i, segment in enumerate(self.segments):
            given = (None, None) if segment.float_input else (self.x_scale, self.x_zero)
            static = [s if s is None or not s.dim() else take(s, segment, 0) for s in given]
            x_format = "" if segment.float_input else self.x_format
            bias = self.bias if total is None else None
            part: Tensor = torch.ops.qfx.linear(
                take(x, segment, x.dim() - 1), *self._held(i), bias, *static, None, x_format, str(segment.format)
            )
            total = part if total is None else total + part
        assert total is not None
        return total

    def _held(self, number: int) -> list[Tensor | None]:
        stem = stem_of(self.axis, number)
        return [self._buffers[f"{stem}_{part}"] for part in ("codes", "scale", "zero")]

    def _asked(self) -> str:
        w = asked([(segment.format, segment.size) for segment in self.segments], self.axis)
        return linear_formats(self.x_format, w)

    def extra_repr(self) -> str:
        return linear_repr(self, self._asked())

    def qfx_row(self, fqn: str) -> Row:
        """This module's row of the report: the formats and bytes of all segments."""
        n, k = self.shape
        shapes = [((n, s.size) if self.axis else (s.size, k), s.format) for s in self.segments]
        gain = self._buffers.get("gain")
        extra = 0 if gain is None else gain.nbytes
        return self._row_of(fqn, "linear", self._asked(), extra + sum(fmt.nbytes(shape) for shape, fmt in shapes))
