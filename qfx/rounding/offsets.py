"""Learned rounding of one weight: an offset for each value and shares of the extremes for each scale.

    u = W / s + V        q = clamp(round(u) + z)        W' = s (q - z)        s, z of the range (a low, b high)

V moves a value by at most half a step away from where it started, so that it can take either neighbour; with a greater
reach it is the weight itself that learns (block-wise training: Chen et al. 2024, EfficientQAT, "Block-AP"). Table types
(nf4, f4e2m1, f8) are treated alike: a step is the distance of the two values of the type around W / s. Gradients pass
the rounding as if it were not there (straight-through estimator), so those of all parameters follow from that of W':

    dL/dV ~ dL/dW' [in range]     dL/ds = sum dL/dW' (q - z - [in range] W / s)     dL/dz = -s sum dL/dW' [clamped]

The parameters and gradients are those of Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent"
(SignRound, AutoRound), which goes by the signs alone; Adam weighs them by how steady they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qfx.format import Format
from qfx.numerics import (
    QParams,
    choose_qparams,
    dequantize,
    effective_scale,
    join,
    quantize,
    range_qparams,
    signed_scale,
    split,
    spread,
    sums_by_scale,
)
from qfx.packing import Packed

SHARES = 0.1, 2.0  # of the range at the start, between which it is learned
SLACK = 1.001  # beyond a table's ends, so that the extremes themselves are no clipped values
_LEAST = 1e-30  # of a gradient


class Offsets:
    """A weight [.., N, K] in a format with scales, its offsets and shares, and what gradient descent does to them.

    weight: f32. params: scales and zero points from which the search starts (None: from the extremes). optimizer: one
    of OPTIMIZERS. reach: how far a value may move, in steps.
    """

    def __init__(
        self, weight: Tensor, fmt: Format, *, params: QParams | None = None, optimizer: str = "adam",
        reach: float = 0.5,
    ) -> None:  # fmt: skip
        assert not fmt.is_plain, f"{fmt} is not rounded to steps"
        assert optimizer in OPTIMIZERS, optimizer
        self.format, self.shape, self.reach = fmt, tuple(weight.shape), reach
        self._ways = {key: OPTIMIZERS[optimizer]() for key in ("offset", "lower", "upper")}
        self.weight = weight.detach().to(torch.float32)
        first = choose_qparams(self.weight, fmt) if params is None else params
        self.scale, self.zero = first
        self._first = effective_scale(self.scale, self.zero, fmt)
        if fmt.has_zero:
            assert self.zero is not None
            zero = self.zero.to(torch.float32)
            self.low, self.high = -zero * self._first, (fmt.qmax - zero) * self._first
        self.lower = torch.ones_like(self._first)  # of `low`; without zero points of the scale
        self.upper = self.lower.clone() if fmt.has_zero else self.lower
        self._scale = spread(self._first, fmt)
        self._steps = split(self.weight, fmt) / self._scale
        self.width = _widths(self._steps, fmt) if fmt.is_float else None
        self.offset = torch.zeros_like(self._steps)

    def value(self) -> Tensor:
        """W' [.., N, K] in f32 as the parameters now make it; keeps what `step` needs."""
        fmt = self.format
        self._steps = split(self.weight, fmt) / self._scale
        moved = self._steps + (self.offset if self.width is None else self.offset * self.width)
        if fmt.is_integer:
            whole = moved.round_()
            zero = None if not fmt.has_zero or self.zero is None else spread(self.zero.to(torch.float32), fmt)
            self._codes = (whole if zero is None else whole + zero).clamp(fmt.qmin, fmt.qmax)
            self._units = self._codes if zero is None else self._codes - zero
            self._inside = self._units == whole
        else:  # a table's ends are its extremes
            plain, one = Format(fmt.type), torch.ones((), device=moved.device)
            self._codes = quantize(moved, plain, one)
            self._units = dequantize(self._codes, plain, one)
            self._inside = (moved >= fmt.qmin * SLACK) & (moved <= fmt.qmax * SLACK)
        return join(self._units * self._scale, fmt, self.shape)

    def step(self, gradient: Tensor, rate: float, clip_rate: float) -> None:
        """Move offsets by about `rate` steps, and shares by about `clip_rate`, against dL/dW' [.., N, K]."""
        fmt = self.format
        slope = split(gradient.to(torch.float32), fmt)
        free = slope * self._inside
        self._ways["offset"](self.offset, free * self._scale, rate)
        self.offset.clamp_(-self.reach, self.reach)
        if clip_rate and fmt.scale_type not in ("e8m0", "e4m3"):  # too coarse for small steps
            self._step_shares(slope, free, clip_rate)

    def packed(self) -> Packed:
        """The weight as it is stored; dequantized it is `value()`, bit for bit."""
        self.value()
        codes = join(self._codes, self.format, self.shape).to(self.format.code_dtype)
        return Packed.from_codes(codes, self.format, self.scale, self.zero)

    @property
    def clipped(self) -> float:
        """The share of the values that lie beyond the range of their scale, at the last `value()`."""
        return 1.0 - float(self._inside.to(torch.float32).mean()) if self._inside.numel() else 0.0

    def _step_shares(self, slope: Tensor, free: Tensor, rate: float) -> None:
        """slope: dL/dW' in groups; free: the same, 0 where W' is clipped."""
        fmt = self.format
        by_scale = self._sums(slope * self._units - free * self._steps)
        if not fmt.has_zero:
            self._move(self.lower, "lower", by_scale * self._first, rate)
            self.scale = signed_scale(self._first * self.lower, self.zero, fmt)
        else:
            scale = effective_scale(self.scale, self.zero, fmt)
            by_zero = -scale * self._sums(slope - free)
            low = self.low * self.lower
            total = (by_scale + by_zero * low / scale.square()) / fmt.qmax  # s = (high - low) / qmax, z = -low / s
            self._move(self.upper, "upper", total * self.high, rate)
            self._move(self.lower, "lower", (-total - by_zero / scale) * self.low, rate)
            self.scale, self.zero = range_qparams(self.low * self.lower, self.high * self.upper, fmt)
        self._scale = spread(effective_scale(self.scale, self.zero, fmt), fmt)

    def _sums(self, each: Tensor) -> Tensor:
        return sums_by_scale(join(each, self.format, self.shape), self.format)

    def _move(self, share: Tensor, key: str, slope: Tensor, rate: float) -> None:
        self._ways[key](share, slope, rate)
        share.clamp_(*SHARES)


class Sign:
    """Every value moves by the rate, against the sign of its gradient."""

    def __call__(self, value: Tensor, gradient: Tensor, rate: float) -> None:
        """Move `value` in place."""
        value.sub_(gradient.sign(), alpha=rate)


class Adam:
    """Adam (Kingma and Ba 2015) for one tensor: it moves by about the rate where gradients agree, less elsewhere."""

    FIRST, SECOND = 0.9, 0.99  # how much of the moments stays at each step

    def __init__(self) -> None:
        self.steps = 0
        self.mean = self.square = torch.zeros(())

    def __call__(self, value: Tensor, gradient: Tensor, rate: float) -> None:
        """Move `value` in place."""
        self.steps += 1
        if self.steps == 1:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.mean.lerp_(gradient, 1 - self.FIRST)
        self.square.mul_(self.SECOND).addcmul_(gradient, gradient, value=1 - self.SECOND)
        shrink = math.sqrt(1 - self.SECOND**self.steps) / (1 - self.FIRST**self.steps)
        value.addcdiv_(self.mean, self.square.sqrt().add_(_LEAST), value=-rate * shrink)


OPTIMIZERS: dict[str, type[Adam] | type[Sign]] = {"adam": Adam, "sign": Sign}


def _widths(steps: Tensor, fmt: Format) -> Tensor:
    """`widths` in the values of a table type."""
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)
    codes = codes.view(fmt.code_dtype) if fmt.bits == 8 else codes
    table = dequantize(codes, Format(fmt.type), torch.ones(()))
    return widths(steps, table[torch.isfinite(table)])


def widths(steps: Tensor, table: Tensor) -> Tensor:
    """For each value the distance of the two values of a table between which it lies."""
    table = table.unique()
    at = torch.bucketize(steps.contiguous(), table).clamp(1, table.numel() - 1)
    width: Tensor = table[at] - table[at - 1]
    return width
