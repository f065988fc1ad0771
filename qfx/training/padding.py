"""Padding of the batch that a prepared model reads: observed ranges leave it out, as calibration does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qfx.backends.qat.quantizers import InputQuantizer
from qfx.calibration.padding import attention_masks, of_view
from qfx.live.subclass import class_maker, subclass
from qfx.training.fake_attention import FakeAttention

HELD = "qfx_padding"  # the attribute of a model whose forward tells what is padding


class Padding:
    """The attention masks of the call that runs, for the quantizers of a model's inputs.

    The model's own forward gives them, so that a part that is called by itself counts all positions.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.masks: list[Tensor] = []

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the masks of a call with these arguments."""
        named = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.masks = attention_masks(list(named), list(named.values()))

    def counted(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a layer reads, [B, T, K] (or rows that are a view of it), and what of it counts, bool [B, T, 1]; None
        where nothing tells."""
        x = of_view(x, [tuple(mask.shape) for mask in self.masks])
        mask = self._of(tuple(x.shape[:-1]))
        return x, None if mask is None else mask.to(x.device)[..., None]

    def counted_of_heads(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of what attention reads, [B, H, T, D]: bool [B, 1, T, 1]."""
        mask = self._of((x.shape[0], x.shape[2]))
        return x, None if mask is None else mask.to(x.device)[:, None, :, None]

    def _of(self, shape: tuple[int, ...]) -> Tensor | None:
        return next((mask for mask in self.masks if tuple(mask.shape) == shape), None)


def watch(model: nn.Module) -> None:
    """Let observed ranges of a prepared model's inputs leave padding out."""
    inputs = [m for m in model.modules() if isinstance(m, InputQuantizer) and m.scales == "observed"]
    if not inputs:
        return
    padding = Padding(tuple(inspect.signature(model.forward).parameters))
    of_heads = {id(m) for own in model.modules() if isinstance(own, FakeAttention) for m in own.modules()}
    for quantizer in inputs:
        quantizer.counted = padding.counted_of_heads if id(quantizer) in of_heads else padding.counted
    model.__dict__[HELD] = padding
    kind: Any = type(model)
    model.__class__ = _class_of(kind)


def unwatch(model: nn.Module) -> None:
    """Give a model its own forward back."""
    if model.__dict__.pop(HELD, None) is not None:
        model.__class__ = type(model).qfx_watching  # type: ignore[attr-defined]


@class_maker
def _class_of(base: type[nn.Module]) -> type[nn.Module]:
    own: Any = base

    @functools.wraps(own.forward)  # Dynamo runs hooks of the compiled module outside of its graph
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        padding: Padding = self.__dict__[HELD]
        padding.read(args, kwargs)
        try:
            return own.forward(self, *args, **kwargs)
        finally:
            padding.masks = []

    return subclass(base, {"forward": forward, "qfx_watching": base})
