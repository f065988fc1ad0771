"""Fake quantization of an operand of attention (q, k, v, or the weights p): of all heads alike, or head by head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qfx.annotation import Formats, PerHead, show
from qfx.backends.qat.fake_quant import fake_quantize
from qfx.backends.qat.quantizers import InputQuantizer, RunTimeInput, Scales
from qfx.format import Format
from qfx.numerics import QParams
from qfx.ops.attention import is_centred, needs_scale, of_weights
from qfx.ops.heads import of_rows


def operand(
    role: str, formats: Formats, params: QParams | None, scales: Scales, freeze_after: int | None
) -> FixedWeights | InputQuantizer | RunTimeInput | ByHeads:
    """The quantizer of a role. params: of static formats, as a plan holds them."""
    if isinstance(formats, tuple):
        return ByHeads(role, formats, params, scales, freeze_after)
    assert isinstance(formats, Format), formats
    if needs_scale(role, formats):
        assert params is not None, f"{role}={formats} needs a scale"
        return InputQuantizer(formats, params, scales, freeze_after=freeze_after)
    fixed = role == "p" and not formats.is_plain and not formats.dynamic
    return FixedWeights(formats) if fixed else RunTimeInput(formats)


class FixedWeights(nn.Module):
    """Fake quantization of attention weights by the range from 0 to 1. It has no state."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.format = fmt

    def forward(self, p: Tensor) -> Tensor:
        """p [B, H, S, L] f32 as it comes back from the format."""
        scale, zero = of_weights(p, self.format)
        return fake_quantize(p, self.format, scale, None if zero is None else zero.to(torch.float32))

    def extra_repr(self) -> str:
        return str(self.format)


class ByHeads(nn.Module):
    """Heads with formats of their own (see `qfx.ops.heads`): those of one format are rounded together.

    parts: a quantizer for each format. params: scales and zero points [H, 1, 1] of all heads, where any needs them.
    """

    def __init__(
        self, role: str, formats: PerHead, params: QParams | None, scales: Scales, freeze_after: int | None
    ) -> None:
        super().__init__()
        self.role, self.formats, self.params = role, formats, params
        count = len(formats) if params is None else len(params.scale)
        self.kinds = list(dict.fromkeys(of_rows(role, formats, count)))
        self.parts = nn.ModuleList()
        for fmt in self.kinds:
            assert fmt is not None
            own = None
            if params is not None and needs_scale(role, fmt):
                heads = self._heads(fmt, count)
                zero = params.zero[heads] if params.zero is not None and fmt.has_zero else None
                own = QParams(params.scale[heads], zero)
            self.parts.append(operand(role, fmt, own, scales, freeze_after))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, H, S, D] as its heads come back from their formats."""
        order: list[int] = []
        found = []
        for part, fmt in zip(self.parts, self.kinds, strict=True):
            heads = self._heads(fmt, x.shape[1])
            order += heads
            found.append(part(x[:, heads]))
        return torch.cat(found, 1)[:, sorted(range(len(order)), key=order.__getitem__)]

    def centred(self, x: Tensor) -> Tensor:
        """Which heads of keys are centred before they are rounded: f32 [H, 1, 1], 1 or 0."""
        chosen = [float(is_centred(fmt)) for fmt in of_rows(self.role, self.formats, x.shape[1])]
        return torch.tensor(chosen, device=x.device).reshape(-1, 1, 1)

    def qparams(self) -> QParams:
        """As a plan holds them: [H, 1, 1], 1 and 0 of heads that need none."""
        assert self.params is not None
        scale, zero = (None if t is None else t.clone() for t in self.params)
        assert scale is not None
        for part, fmt in zip(self.parts, self.kinds, strict=True):
            if isinstance(part, InputQuantizer):
                heads, own = self._heads(fmt, len(scale)), part.qparams()
                scale[heads] = own.scale.to(scale)
                if zero is not None and own.zero is not None:
                    zero[heads] = own.zero.to(zero)
        return QParams(scale, zero)

    def _heads(self, fmt: Format | None, rows: int) -> list[int]:
        return [row for row, own in enumerate(of_rows(self.role, self.formats, rows)) if own == fmt]

    def extra_repr(self) -> str:
        return show(self.formats)
