"""Positions of a batch that are padding: a model reads nothing from them, so what a layer sees there does not count.

A batch tells them by its attention mask [B, T], 1 at tokens and 0 at padding. Without this a statistic would say more
about padding than about text where short samples are put beside long ones.

A value is told what is padding by its shape: [B, T, K] by a mask of [B, T]. A graph tells more of it (see
`positions`): rows [B * T, K], rows [M, K] that are picked from these (those of experts), and what attention reads,
[B, H, T, D]. Of a live model's layers, whose calls hooks see, rows are known that are a view of a value [B, T, K].

Where two inputs have one number of positions, rows that could be of either count, and so does what a model gathers in
another way (as many rows for each expert, windows, tokens that are put before the text): what is padding there is not
known.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

# [B, T] -> bool of that shape, True at tokens. Of single values, too: [M] -> bool [M], and [B, H, T] -> bool [B, T]
Attended: TypeAlias = Mapping[tuple[int, ...], Tensor]
_MASK, _DECODER, _ENCODER = "attention_mask", "decoder_", "encoder_"
_NO_LABEL = -100  # what losses ignore


def attended(names: Sequence[str], batch: Sequence[Any]) -> Attended:
    """The positions that count, for each shape of which a batch has padding. names: of the batch's values, in order.

    Masks of shapes other than [B, T] say nothing of this kind, nor do those that leave everything out. Floats below 0
    are of a mask that is added to scores, with 0 at tokens. Where an encoder and a decoder read inputs of one shape, a
    position counts that counts for either, and so does one with a label: decoders without inputs make them of labels.
    """
    return {tuple(mask.shape): mask for mask in attention_masks(names, batch) if not bool(mask.all())}


def attention_masks(names: Sequence[str], batch: Sequence[Any]) -> list[Tensor]:
    """The same as a mask [B, T] for each shape that has one, though it may leave nothing out; no value is read, so that
    Dynamo can trace it."""
    given = {name: v for name, v in zip(names, batch, strict=True) if isinstance(v, Tensor) and v.dim() > 1}
    masks = {name: _counts(v) for name, v in given.items() if v.dim() == 2 and _is_mask(name)}
    found: list[Tensor] = []
    for mask in masks.values():
        same = next((i for i, other in enumerate(found) if other.shape == mask.shape), None)
        if same is None:
            found.append(mask)
        else:
            found[same] = found[same] | mask
    labels = given.get("labels")
    if labels is not None:
        found = [mask | (labels != _NO_LABEL) if mask.shape == labels.shape else mask for mask in found]
    unmasked = [given[name].shape[:2] for name in _without_mask(given, masks)]
    return [mask for mask in found if mask.shape not in unmasked]


def _is_mask(name: str) -> bool:
    return name.endswith(_MASK) and not name.endswith(f"global_{_MASK}")  # Longformer's: which tokens see all others


def _counts(mask: Tensor) -> Tensor:
    found = mask > 0
    if mask.is_floating_point():
        found = torch.where((mask < 0).any(), mask == 0, found)
    return found | ~found.any()


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
    """The positions that count: of [B, T, K] or [M, K] rows [n, K], of [B, H, T, D] [H, n, D]. What `kept` has no mask
    for, and a batch without padding, as it is."""
    mask = kept.get(tuple(x.shape[:-1])) if x.dim() in (2, 3, 4) else None
    if mask is None:
        return x
    if x.dim() == 4:
        return x.transpose(1, 2)[mask.to(x.device)].transpose(0, 1)
    return x[mask.to(x.device)]


def predicted(mask: Tensor) -> Tensor:
    """Of a mask [B, T] the tokens but the first, bool [B, T - 1], that are predicted from a token and not from padding
    before the text."""
    kept = mask != 0
    return kept[:, 1:] & kept[:, :-1]


def in_positions(x: Tensor, kept: Attended, shape: tuple[int, ...], picks: Sequence[Tensor]) -> tuple[Tensor, Attended]:
    """Rows [M, K] of a graph, and what `without` needs for them. shape: [B, T] of the positions that they are of.

    picks: indices [..], by one after the other of which they are picked from all positions in order; without any they
    are given back as [B, T, K].
    """
    if shape not in kept:
        return x, kept
    if not picks:
        return x.reshape(*shape, x.shape[-1]), kept
    mask = kept[shape].reshape(-1)
    for index in picks:
        mask = mask.to(index.device)[index]
    return x, {**kept, (len(x),): mask}


def with_heads(kept: Attended, x: Tensor) -> Attended:
    """With a mask for what an attention reads, [B, H, T, D], where B and T are those of a mask."""
    batch, heads, tokens = x.shape[:3]
    mask = kept.get((batch, tokens)) if x.dim() == 4 else None
    return kept if mask is None else {**kept, (batch, heads, tokens): mask}


def of_view(x: Tensor, shapes: Collection[tuple[int, ...]]) -> Tensor:
    """Rows [B * T, K] that a live layer reads as [B, T, K], where they are a view of such a value and (B, T) is one of
    the shapes; else as they are."""
    whole = x._base if x.dim() == 2 else None
    if whole is None or whole.dim() != 3 or tuple(whole.shape[:2]) not in shapes or whole.numel() != x.numel():
        return x
    return whole if whole.is_contiguous() and x.is_contiguous() and whole.shape[-1] == x.shape[-1] else x
