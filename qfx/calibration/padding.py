"""Positions of a batch that are padding: a model reads nothing from them, so what a layer sees there does not count.

A batch tells them by its attention mask [B, T], 1 at tokens and 0 at padding. Without this a statistic would say more
about padding than about text where short samples are put beside long ones.

Layers that read [B, T, K] or, in a graph, [B * T, K] are told what is padding. Not so experts, whose rows are sorted by
expert, and the operands of attention, whose axes are others.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Attended: TypeAlias = Mapping[tuple[int, ...], Tensor]  # [B, T] -> bool of that shape, True at tokens
_MASK, _DECODER, _ENCODER = "attention_mask", "decoder_", "encoder_"
_NO_LABEL = -100  # what losses ignore


def attended(names: Sequence[str], batch: Sequence[Any]) -> Attended:
    """The positions that count, for each shape of which a batch has padding. names: of the batch's values, in order.

    Masks of shapes other than [B, T] say nothing of this kind, nor do those that leave everything out. Floats below 0
    are of a mask that is added to scores, with 0 at tokens. Where an encoder and a decoder read inputs of one shape, a
    position counts that counts for either, and so does one with a label: decoders without inputs make them of labels.
    """
    given = {name: v for name, v in zip(names, batch, strict=True) if isinstance(v, Tensor) and v.dim() > 1}
    masks = {name: _counts(v) for name, v in given.items() if v.dim() == 2 and _is_mask(name)}
    found: dict[tuple[int, ...], Tensor] = {}
    for mask in masks.values():
        shape = tuple(mask.shape)
        found[shape] = found[shape] | mask if shape in found else mask
    labels = given.get("labels")
    if labels is not None and tuple(labels.shape) in found:
        found[tuple(labels.shape)] |= labels != _NO_LABEL
    for name in _without_mask(given, masks):
        found.pop(tuple(given[name].shape[:2]), None)
    return {shape: mask for shape, mask in found.items() if not bool(mask.all())}


def _is_mask(name: str) -> bool:
    return name.endswith(_MASK) and not name.endswith(f"global_{_MASK}")  # Longformer's: which tokens see all others


def _counts(mask: Tensor) -> Tensor:
    found = mask == 0 if mask.is_floating_point() and bool((mask < 0).any()) else mask > 0
    return found if bool(found.any()) else torch.ones_like(found)


def _without_mask(names: Collection[str], masks: Collection[str]) -> list[str]:
    """What is read without a mask of its own: by a decoder, or by a model that has but the mask of an encoder."""
    found = []
    if not any(name.endswith(_DECODER + _MASK) for name in masks):
        found += [name for name in names if _DECODER in name]
    if not any(_DECODER not in name and _ENCODER not in name for name in masks):
        found += [name for name in names if name in ("input_ids", "inputs_embeds")]
    return found


def attended_by(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attended:
    """The same for a call of a live model."""
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    given = {**named, **kwargs}
    return attended(list(given), list(given.values()))


def without(x: Tensor, kept: Attended) -> Tensor:
    """[B, T, K] -> rows [n, K] of the positions that count; any other shape, and a batch without padding, as it is."""
    mask = kept.get(tuple(x.shape[:2])) if x.dim() == 3 else None
    return x if mask is None else x[mask.to(x.device)]


def in_positions(x: Tensor, kept: Attended) -> Tensor:
    """A value that is `flattened` (see `positions`) as [B, T, K], where padding of just one shape has as many rows."""
    shapes = [shape for shape in kept if shape[0] * shape[1] == len(x)]
    return x.reshape(*shapes[0], x.shape[-1]) if len(shapes) == 1 else x
