"""Fake quantizers with scales of their own: learned (LSQ, LSQ+) as parameters, or observed (moving average) as buffers.

    scale = initial_scale * exp(RATE * log_scale)              log_scale f32, 0 at first
    zero  = round(initial_zero + RATE * qmax * zero_shift)     zero_shift f32, 0 at first, for affine types

So a scale stays positive (of the sign that it began with) whatever an optimizer does, weight decay pulls it back to
where it began (the logarithm: Jain et al. 2020, "TQT"), and a cast of the training parameters to half precision loses
next to nothing of it. A step of Adam at the rate of the weights moves a scale by RATE times that rate, relative to
itself, so that one rate serves both. Scales that a format stores in fewer bits are rounded to those in the forward,
straight-through in the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.backends.qat.fake_quant import fake_cast, fake_quantize, fake_quantize_run_time, gradient_factor, unscaled
from qfx.errors import explain
from qfx.format import Format
from qfx.numerics import (
    TINY,
    QParams,
    effective_scale,
    join,
    quantize,
    range_qparams,
    signed_scale,
    split,
    spread,
    value_range,
)
from qfx.packing import Packed

Scales = Literal["learned", "observed"]
RATE = 3.0
_FAR = 60.0  # e^60 is 1e26: beyond it scales stand still


class Quantizer(nn.Module):
    """Scale and zero point of one tensor. Tensors are f32 and stay so when the model is cast to another dtype.

    fmt: not plain, not dynamic. scale, zero: as in QParams, what training begins with. decay, freeze_after: of
    observed scales: the share of the moving average that stays at each step, and the steps (forwards in train mode)
    after which it does not move any more (None: it always does); where torch.compile recomputes a checkpointed part, it
    reads the averages as they are after the step. still: as if frozen (see `qfx.training.schedule`). Scales of a whole
    tensor have shape [1] here. most: the greatest code of fmt, by which a state_dict tells formats of the same shapes
    apart.
    """

    still = False
    most: Tensor
    initial_scale: Tensor
    initial_zero: Tensor | None
    whole: Tensor | None
    log_scale: Tensor
    zero_shift: Tensor | None
    steps: Tensor

    def __init__(
        self, fmt: Format, params: QParams, scales: Scales, *, decay: float = 0.99, freeze_after: int | None = None
    ) -> None:
        super().__init__()
        self.format, self.scales, self.decay, self.freeze_after = fmt, scales, decay, freeze_after
        self.shape = tuple(params.scale.shape)
        first = effective_scale(*params, fmt).reshape(self.shape or (1,)).clone()
        zero = (
            params.zero.to(torch.float32).reshape(first.shape).clone()
            if fmt.has_zero and params.zero is not None
            else None
        )
        self.register_buffer("initial_scale", first)
        self.register_buffer("most", torch.tensor(float(fmt.qmax), device=first.device))
        self.register_buffer("initial_zero", zero)
        self.register_buffer("whole", params.zero.clone() if fmt.has_global_scale and params.zero is not None else None)
        if scales == "learned":
            self.log_scale = nn.Parameter(torch.zeros_like(first))
            self.zero_shift = None if zero is None else nn.Parameter(torch.zeros_like(first))
        else:
            self.register_buffer("log_scale", torch.zeros_like(first))
            self.register_buffer("zero_shift", None if zero is None else torch.zeros_like(first))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=first.device))

    def current(self) -> tuple[Tensor, Tensor | None]:
        """The f32 factor of the codes and the zero points (whole numbers in f32), of the format's scale shape."""
        scale = self._unrounded()
        if self.format.scale_type != "f32":
            with torch.no_grad():
                stored = self._stored(scale)
                rounded = effective_scale(stored, self.whole, self.format).reshape(scale.shape)
            scale = rounded + (scale - scale.detach())
        if self.initial_zero is None or self.zero_shift is None:
            return scale.reshape(self.shape), None
        zero = self.initial_zero + RATE * self.format.qmax * self.zero_shift
        zero = zero.detach().round().clamp(0, self.format.qmax) + (zero - zero.detach())
        return scale.reshape(self.shape), zero.reshape(self.shape)

    @torch.no_grad()
    def qparams(self) -> QParams:
        """What `numerics.quantize` takes: scales in their stored type, zero points (or what stands above scales)."""
        scale = self._stored(self._unrounded()).reshape(self.shape)
        zero = self.current()[1]
        return QParams(scale, self.whole if zero is None else zero.to(torch.uint8))

    def _unrounded(self) -> Tensor:
        scale = self.initial_scale * torch.exp((RATE * self.log_scale.to(torch.float32)).clamp(-_FAR, _FAR))
        return torch.where(scale.abs() < TINY, self.initial_scale.sign() * TINY, scale)

    def _stored(self, scale: Tensor) -> Tensor:
        """An f32 scale as the format stores it; powers of two are the nearest, so that a small step is a small one."""
        if self.format.scale_type == "e8m0":
            scale = torch.exp2(torch.round(torch.log2(scale.abs())))
        return signed_scale(scale, self.whole, self.format)

    def _watching(self) -> bool:
        """Whether this forward moves an average: not in eval mode, and not where a checkpoint runs it once more."""
        if self.scales == "learned" or self.still or not self.training:
            return False
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def _moved(self, held: Tensor, new: Tensor) -> None:
        """Take `new` into the average `held`, unless it is frozen; NaN and Inf change nothing."""
        share = torch.full((), 1 - self.decay, device=held.device)
        if self.freeze_after is not None:
            share = torch.where(self.steps < self.freeze_after, share, 0.0)
        new = new.reshape(held.shape).to(held.dtype)
        held.lerp_(torch.where(new.isfinite(), new, held), share)  # a batch that is skipped must leave nothing behind

    def _apply(self, fn: object, recurse: bool = True) -> Quantizer:
        """Moves to another device; casts to another floating dtype are left out."""

        def kept(tensor: Tensor) -> Tensor:
            found: Tensor = fn(tensor)  # type: ignore[operator]
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Scales of another format's codes are an error, as other shapes are."""
        held = state.get(f"{prefix}most", self.most)  # what was saved without it is taken as it is
        if not torch.equal(held.to(self.most), self.most):
            expected, found = (f"codes up to {float(most):g}" for most in (self.most, held))
            step = "prepare the model by the recipe or plan that the checkpoint was trained by"
            what = f"scales of another format in {prefix}initial_scale"
            args[-1].append(explain(what, expected=expected, found=found, next_step=step))
        state[f"{prefix}most"] = self.most
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        frozen = "" if self.freeze_after is None else f", freeze_after={self.freeze_after}"
        return f"{self.format}, {self.scales}{frozen if self.scales == 'observed' else ''}"


class WeightQuantizer(Quantizer):
    """Fake quantization of a weight [.., N, K]. It begins with what `packed` has: the same scales, the same result.

    Where all values that share a scale are zero it says nothing (1 in `packed`), and training begins with one that
    spans +-1/sqrt(K), as layers begin: weights that leave zero would come back as zeros for thousands of steps.
    Observed scales follow the greatest magnitude that shares each: the ratio of the two stays what it was.
    keep_codes: scales learn below codes that stay (Chen et al. 2024, EfficientQAT, "E2E-QP"), those of the scales
    `below`, so that dL/ds is k * sum g v / s everywhere, and zero points stand still. Not below scales that are powers
    of two, where a step would double the weight.
    """

    below: Tensor | None
    extent: Tensor

    def __init__(
        self, weight: Tensor, packed: Packed, scales: Scales, *, freeze_after: int | None = None,
        keep_codes: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(packed.format, packed.params(), scales, decay=0.9, freeze_after=freeze_after)
        keep_codes &= packed.format.scale_type != "e8m0"
        if not keep_codes:
            self.begin_at_zeros(weight)
        self.register_buffer("below", self.current()[0].detach().clone() if keep_codes else None)
        if keep_codes and self.zero_shift is not None:
            self.zero_shift.requires_grad_(False)
        self.factor = gradient_factor(weight.numel() // max(1, self.initial_scale.numel()), packed.format)
        if scales == "observed":
            self.register_buffer("extent", self._extent(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it comes back from its format, in its dtype."""
        if self._watching():
            self._observe(weight)
        return self._rounded(weight, *self.current(), self.below)

    def rows(self, weight: Tensor, ids: Tensor, padding_idx: int | None, by_frequency: bool = False) -> Tensor:
        """Rows `ids` of a table [V, D]: [.., D]. Only of formats whose scales are those of single rows. by_frequency:
        gradients are divided by how often the batch has a row (`scale_grad_by_freq`)."""
        if self._watching():
            self._observe(weight)

        def rows(table: Tensor) -> Tensor:
            return F.embedding(ids, table, padding_idx, scale_grad_by_freq=by_frequency)

        scale, *others = (*self.current(), self.below)
        values = self._rounded(rows(weight), rows(scale), *(None if t is None else rows(t) for t in others))
        # the backward needs them as they are, and models scale or mask what they look up in place
        return values.clone()

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Packed:
        """The weight packed: `dequantize` gives bit for bit what `forward` does."""
        params = self.qparams()
        if self.below is None:
            codes = quantize(weight, self.format, *params)
        else:
            codes = quantize(weight, unscaled(self.format), self.below, params.zero)
        return Packed.from_codes(codes, self.format, *params)

    def _rounded(self, weight: Tensor, scale: Tensor, zero: Tensor | None, below: Tensor | None) -> Tensor:
        if below is None:
            return fake_quantize(weight, self.format, scale, zero, factor=self.factor)
        fmt, scale = self.format, scale.detach() + self.factor * (scale - scale.detach())
        steps = join(split(weight.to(torch.float32), fmt) / spread(below, fmt), fmt, weight.shape)
        codes = fake_quantize(steps, fmt, torch.ones_like(below), zero)
        return join(split(codes, fmt) * spread(scale, fmt), fmt, weight.shape).to(weight.dtype)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Codes that stay are those that a training of all ended with. Its scales alone tell nothing of the others."""
        key = f"{prefix}below"
        begun = f"{prefix}initial_scale" in state and key not in state
        if self.below is not None:
            state.setdefault(key, self.below)
        elif key in state:
            what, step = f"the codes of {key} stay, and the model's move", "prepare the model with train='scales'"
            args[-1].append(explain(what, next_step=step))
        super()._load_from_state_dict(state, prefix, *args)
        if self.below is not None and begun:
            with torch.no_grad():
                self.below.copy_(self.current()[0])

    @torch.no_grad()
    def begin_at_zeros(self, weight: Tensor) -> None:
        """Give values that are all zero a scale to begin with (see the class)."""
        low, high = value_range(weight, self.format)
        bound = torch.full_like(low, _bound(weight))
        scale, zero = range_qparams(-bound, bound, self.format)
        zeros = ((low == 0) & (high == 0)).reshape(self.initial_scale.shape)
        scale = effective_scale(scale, zero, self.format).reshape(zeros.shape)
        self.initial_scale.copy_(torch.where(zeros, scale, self.initial_scale))
        if self.initial_zero is not None and zero is not None:
            zero = zero.reshape(zeros.shape).to(torch.float32)
            self.initial_zero.copy_(torch.where(zeros, zero, self.initial_zero))

    @torch.no_grad()
    def _observe(self, weight: Tensor) -> None:
        self._moved(self.log_scale, (self._extent(weight) / self.extent).log() / RATE)
        self.steps.add_(1)

    def _extent(self, weight: Tensor) -> Tensor:
        low, high = value_range(weight, self.format)
        extent = torch.maximum(-low, high).reshape(self.initial_scale.shape)
        return torch.where(extent < TINY, _bound(weight), extent)


def _bound(weight: Tensor) -> float:
    """Of the values that torch.nn.Linear begins with."""
    return 1.0 / math.sqrt(max(1, weight.shape[-1]))


class InputQuantizer(Quantizer):
    """Fake quantization of an activation with a static format.

    Observed scales come from moving averages of each batch's least and greatest value, which begin as the range that
    the calibrated scale spans. Where torch.distributed runs several processes the batch is that of all of them, so that
    every process must call the module as often as the others in train mode. counted: x -> x in another view, and what
    of that counts as a mask that broadcasts, None for all (see `qfx.training.padding`).
    """

    low: Tensor
    high: Tensor
    counted: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None

    def __init__(self, fmt: Format, params: QParams, scales: Scales, *, freeze_after: int | None = None) -> None:
        super().__init__(fmt, params, scales, freeze_after=freeze_after)
        if scales == "observed":
            zero = 0.0 if self.initial_zero is None else self.initial_zero
            least = -fmt.qmax if self.initial_zero is None else 0
            self.register_buffer("low", (least - zero) * self.initial_scale)
            self.register_buffer("high", (fmt.qmax - zero) * self.initial_scale)

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x [.., K] as it comes back from the format. columns: the channels that x holds; None for all."""
        if self._watching() and (x.numel() or _processes() > 1):
            self._observe(x)
        scale, zero = self.current()
        if columns is not None and scale.dim():
            scale, zero = scale[columns], None if zero is None else zero[columns]
        features = x[:1].numel() if not scale.dim() else x[:1].numel() // x.shape[-1]
        return fake_quantize(x, self.format, scale, zero, factor=gradient_factor(features, self.format))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        low, high = _of_all_processes(*self._range(x))
        self._moved(self.low, low)
        self._moved(self.high, high)
        self.steps.add_(1)
        scale, zero = range_qparams(self.low, self.high, self.format)
        self.log_scale.copy_((effective_scale(scale, zero, self.format) / self.initial_scale).log() / RATE)
        if self.zero_shift is not None and self.initial_zero is not None and zero is not None:
            self.zero_shift.copy_((zero.to(torch.float32) - self.initial_zero) / (RATE * self.format.qmax))

    def _range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest value that counts for each scale."""
        x, counts = (x, None) if self.counted is None else self.counted(x)
        if counts is None:
            return value_range(x, self.format, activation=True)
        low = value_range(x.masked_fill(~counts, float("inf")), self.format, activation=True)[0]
        return low, value_range(x.masked_fill(~counts, float("-inf")), self.format, activation=True)[1]


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_all_processes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest value that any process has seen."""
    if _processes() == 1:
        return low, high
    both = torch.stack((-low, high))
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return -both[0], both[1]


class RunTimeInput(nn.Module):
    """Fake quantization of an activation whose scale is found at run time, or that is only cast. It has no state."""

    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.format = fmt

    def forward(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """x [.., K] as it comes back from the format."""
        return fake_cast(x, self.format) if self.format.is_plain else fake_quantize_run_time(x, self.format)

    def extra_repr(self) -> str:
        return str(self.format)
