"""Positions of a batch that are padding: a model reads nothing from them, so what a layer sees there does not count.

A batch tells them by its attention mask [B, T], 1 at tokens and 0 at padding. Without this a statistic would say more
about padding than about text where short samples are put beside long ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Attended: TypeAlias = Mapping[tuple[int, ...], Tensor]  # [B, T] -> bool of that shape, True at tokens
_MASK, _DECODER = "attention_mask", "decoder_"


def attended(names: Sequence[str], batch: Sequence[Any]) -> Attended:
    """The positions that count, for each shape of which a batch has padding. names: of the batch's values, in order.

    Masks of shapes other than [B, T] say nothing of this kind. Where an encoder and a decoder read inputs of one shape,
    a position counts that counts for either.
    """
    given = {name: v for name, v in zip(names, batch, strict=True) if isinstance(v, Tensor) and v.dim() == 2}
    found: dict[tuple[int, ...], Tensor] = {}
    for name, value in given.items():
        if name.endswith(_MASK):
            found[tuple(value.shape)] = found.get(tuple(value.shape), torch.zeros_like(value, dtype=torch.bool)) | (
                value > 0
            )
    if not any(name.endswith(_DECODER + _MASK) for name in given):
        for shape in [tuple(value.shape) for name, value in given.items() if _DECODER in name]:
            found.pop(shape, None)
    return {shape: mask for shape, mask in found.items() if not bool(mask.all())}


def attended_by(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attended:
    """The same for a call of a live model."""
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given = {**named, **kwargs}
    return attended(list(given), list(given.values()))


def without(x: Tensor, kept: Attended) -> Tensor:
    """[B, T, K] -> rows [n, K] of the positions that count; any other shape, and a batch without padding, as it is."""
    mask = kept.get(tuple(x.shape[:2])) if x.dim() == 3 else None
    return x if mask is None else x[mask.to(x.device)]
