"""Live modules that compute with fake quantization: their class becomes a subclass of itself, nothing else of them.

A float weight stays the nn.Parameter that it was, under its name, so that optimizers, Trainer, accelerate, DDP, FSDP,
EMA and checkpoints see an ordinary module; the scales lie in a child module `fake_quant`. A parameter that some other
forward reads (experts, tables with a forward of their own, nn.MultiheadAttention) reads as it comes back from its
format, its quantizer being the child `fake_quant_<name>`. What is written into that is lost: write into
`module._parameters[name]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qfx.backends.qat.quantizers import InputQuantizer, RunTimeInput, WeightQuantizer
from qfx.live.modules import PREPARED, over_windows, turned
from qfx.live.segments import Segment, in_order, take
from qfx.live.subclass import class_maker, subclass
from qfx.training.wrapped import is_sharded


class FakeWeight(nn.Module):
    """Fake quantization of a weight [.., N, K] as its module holds it.

    parts: a quantizer for each segment, one where `segments` is None (None for a plain format, which is cast). axis: of
    the segments. transposed: the module holds [.., K, N]. flat: it holds a convolution's kernel. on: where it is
    False (see `qfx.training.schedule`) nothing is rounded.
    """

    on = True

    def __init__(
        self, parts: Sequence[nn.Module], *, segments: Sequence[Segment] | None = None, axis: int = 0,
        transposed: bool = False, flat: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.segments, self.axis, self.transposed, self.flat = segments, axis, transposed, flat

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, as the module holds it (a kernel as a matrix) -> [.., N, K] as it comes back from its format."""
        weight = self.oriented(weight)
        if not self.on:
            return weight
        if self.segments is None:
            found: Tensor = self.parts[0](weight)
            return found
        cut = [part(take(weight, s, self.axis)) for part, s in zip(self.parts, self.segments, strict=True)]
        return in_order(cut, self.segments, self.axis)

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight as [.., N, K]; a view."""
        if self.transposed:
            return weight.transpose(-2, -1)
        return weight.flatten(1) if self.flat else weight

    def read(self, weight: Tensor) -> Tensor:
        """The weight as it comes back, of the shape in which the module holds it. A part of one is given as it is:
        FSDP2 looks for what it has sharded, and makes it whole for a forward."""
        if is_sharded(weight):
            return weight
        found: Tensor = self(weight)
        return found.transpose(-2, -1) if self.transposed else found.reshape(weight.shape)


class FakeLinear(nn.Module):
    """What a linear computes with: its weight, its input (None: in float), and what is done to the input before.

    smooth [K] divides the input, rotation (block, seed) rotates it before that, around the module's buffer `gain` where
    it has one. A weight that another module's quantizer serves too is registered there only, so that a state_dict holds
    its scales once.
    """

    on = True
    smooth: Tensor | None

    def __init__(
        self, weight: FakeWeight, inputs: InputQuantizer | RunTimeInput | None, *, shared: bool = False,
        smooth: Tensor | None = None, rotation: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if shared:
            self.__dict__["weight"] = weight
        else:
            self.weight = weight
        self.inputs, self.rotation = inputs, rotation
        self.register_buffer("smooth", smooth)
        self._index()

    def _index(self) -> None:
        """Column numbers of each segment, where the input is cut as the weight's columns are."""
        found = self.weight.segments if self.weight.axis == 1 else None
        self.columns = None if found is None else [take(torch.arange(_size(found)), s, 0) for s in found]

    def linear(self, module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """x [.., K] -> [.., N] with the module's bias, and its factors of low rank where it has them."""
        x = turned(x, self.rotation, module._buffers.get("gain"))
        y = F.linear(self.rounded(x), self.weight(weight), module._parameters.get("bias"))
        a, b = module._buffers.get("low_a"), module._buffers.get("low_b")
        if a is None or b is None:
            return y
        x = x if self.smooth is None else x / self.smooth
        return y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the product reads it."""
        if self.smooth is not None:
            x = (x / self.smooth).to(x.dtype)
        if self.inputs is None or not self.on:
            return x
        segments = self.weight.segments
        if self.columns is None or segments is None:
            found: Tensor = self.inputs(x)
            return found
        parts = [take(x, s, x.dim() - 1) for s in segments]
        parts = [
            part if s.float_input else self.inputs(part, index)
            for part, s, index in zip(parts, segments, self.columns, strict=True)
        ]
        return in_order(parts, segments, -1)


def prepare_module(module: nn.Module, kind: str, fake: FakeLinear, *, read: bool = False) -> None:
    """Let a linear, table or convolution ("linear", "table", "conv") compute with fake quantization. read: another
    forward reads its weight, too, as it comes back from its format."""
    module.fake_quant = fake
    base: Any = type(module)
    module.__class__ = _class_of(base, kind, read)


def prepare_parameter(module: nn.Module, name: str, fake: FakeWeight, *, shared: bool = False) -> None:
    """Let parameter `name` of a module read as it comes back from its format."""
    child = f"fake_quant_{name}"
    if shared:
        module.__dict__[child] = fake
    else:
        setattr(module, child, fake)
    base: Any = getattr(type(module), PREPARED, type(module))
    names = tuple(dict.fromkeys([*getattr(type(module), "qfx_fake_names", ()), name]))
    module.__class__ = _reading_class(base, names)


def restore(module: nn.Module) -> None:
    """Undo both: the class that the module had, and no quantizers."""
    module.__class__ = getattr(type(module), PREPARED)
    for name in [n for n in (*module._modules, *module.__dict__) if n.startswith("fake_quant")]:
        delattr(module, name)


def weight_of(module: nn.Module, name: str) -> FakeWeight:
    """The quantizers of parameter `name` of a prepared module."""
    fake = getattr(module, f"fake_quant_{name}", None)
    found = module.fake_quant.weight if fake is None else fake  # type: ignore[union-attr]
    assert isinstance(found, FakeWeight)
    return found


def is_read(module: nn.Module) -> bool:
    """Whether a prepared module's weight is rounded for another forward that reads it, too."""
    return isinstance(getattr(type(module), "weight", None), property)


def _held(module: nn.Module) -> Tensor:
    """The weight of a prepared module as it is."""
    found = module._parameters.get("weight")
    return module.weight if found is None else found  # type: ignore[return-value]


def _size(segments: Sequence[Segment]) -> int:
    return sum(segment.size for segment in segments)


def _read(self: Any) -> Tensor:
    found: Tensor = self.fake_quant.weight.read(_held(self))
    a, b = self._buffers.get("low_a"), self._buffers.get("low_b")
    return found if a is None or b is None else found + b.to(found.dtype) @ a.to(found.dtype)


def _linear(self: Any, x: Tensor) -> Tensor:
    return self.fake_quant.linear(self, x, _held(self))  # type: ignore[no-any-return]


def _table(self: Any, input: Tensor) -> Tensor:  # noqa: A002  (nn.Embedding's own name)
    fake: FakeWeight = self.fake_quant.weight
    part = fake.parts[0]
    if fake.on and isinstance(part, WeightQuantizer) and part.format.by_row:
        return part.rows(_held(self), input, self.padding_idx, self.scale_grad_by_freq)
    return F.embedding(input, fake(_held(self)), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


def _conv(self: Any, x: Tensor) -> Tensor:
    return over_windows(self, x, lambda rows: _linear(self, rows))


_FORWARDS = {"linear": _linear, "table": _table, "conv": _conv}


@class_maker
def _class_of(base: type[nn.Module], kind: str, read: bool) -> type[nn.Module]:
    fields = {"weight": property(_read)} if read else {}
    return subclass(base, {"forward": _FORWARDS[kind], PREPARED: base, **fields}, "Fake")


@class_maker
def _reading_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    def reader(name: str) -> property:
        return property(lambda self: getattr(self, f"fake_quant_{name}").read(self._parameters[name]))

    readers = {name: reader(name) for name in names}
    return subclass(base, {**readers, PREPARED: base, "qfx_fake_names": names}, "Fake")
