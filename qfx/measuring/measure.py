"""How far two models' outputs lie apart. Pure functions of tensors; sums are in float64.

Where a value is NaN or infinite the result is NaN or infinite too: nothing is masked out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

_PART = 1 << 20  # elements that are in f64 at once
_HIGHEST = 200.0  # dB


def energies(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """(signal, noise): the sums of squares of `reference` and of `reference - other`, of one shape.

    Sums of several batches may be added up before `decibel`. Raises ValueError where the shapes differ.
    """
    _same_shape(reference, other)
    signal = noise = 0.0
    flat = (t.detach().reshape(-1).split(_PART) for t in (reference, other))
    for wanted, found in zip(*flat, strict=True):  # logits are large, and larger in f64
        wide = wanted.double()
        signal += float(wide.square().sum())
        noise += float((wide - found.double()).square().sum())
    return signal, noise


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise): inf where there is no noise, -inf where there is only noise."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def bounded(db: float) -> float:
    """As it is stored: at most 200 dB either way, since JSON has no infinity."""
    return max(-_HIGHEST, min(db, _HIGHEST))


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio of two tensors of one shape, in dB; 6 dB are one bit."""
    return decibel(*energies(reference, other))


def cosine(reference: Tensor, other: Tensor) -> float:
    """Mean cosine of the rows (last axis) of two tensors of one shape [..., D]; two zero rows count as equal."""
    _same_shape(reference, other)
    if reference.dim() == 0 or reference.numel() == 0:
        raise ValueError(f"rows are needed, found a tensor of shape {list(reference.shape)}")
    total = 0.0
    for a, b in _parts(reference, other):
        a_norm, b_norm = a.norm(dim=-1), b.norm(dim=-1)
        rows = ((a / a_norm.clamp_min(1e-300)[..., None]) * (b / b_norm.clamp_min(1e-300)[..., None])).sum(-1)
        total += float(torch.where((a_norm == 0) & (b_norm == 0), 1.0, rows).sum())
    return total / (reference.numel() // reference.shape[-1])


def kld(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) of the distributions that logits [..., V] say, in nats; 0 where they are equal."""
    return float(divergences(reference, other).mean())


def divergences(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats at each position of logits [..., V]: f64, one after the other."""
    _same_shape(reference, other)
    if reference.dim() == 0 or reference.numel() == 0:
        raise ValueError(f"at least one position is needed, found logits of shape {list(reference.shape)}")
    found = [
        functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        for a, b in _parts(reference, other)
    ]
    return torch.cat(found)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of values, as if each were drawn by itself: s / sqrt(n); None for fewer than two."""
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None


def nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log likelihood [B, T - 1] in nats of each token of ids [B, T] but the first, from logits [B, T, V]."""
    if ids.dim() != 2 or logits.shape[:-1] != ids.shape or ids.shape[1] < 2:
        raise ValueError(
            f"logits [B, T, V] and token ids [B, T] with T >= 2 are needed, "
            f"found {list(logits.shape)} and {list(ids.shape)}"
        )
    count, targets = _count(logits), ids[:, 1:]
    found = [
        functional.cross_entropy(values.double(), wanted, reduction="none")
        for row, tokens in zip(logits.detach()[:, :-1], targets, strict=True)
        for values, wanted in zip(row.split(count), tokens.split(count), strict=True)
    ]
    return torch.cat(found).view(targets.shape)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp(mean negative log likelihood) of the tokens ids [B, T] but the first, from logits [B, T, V]."""
    return exp(float(nll(logits, ids).mean()))


def exp(mean_nll: float) -> float:
    """Perplexity from a mean negative log likelihood in nats: inf where it is too large for a float."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf


def top1_agreement(reference: Tensor, other: Tensor) -> float:
    """Share of the positions, 0 to 1, at which two logits [..., V] put the same class first."""
    _same_shape(reference, other)
    if reference.dim() == 0 or reference.numel() == 0:
        raise ValueError(f"at least one position is needed, found logits of shape {list(reference.shape)}")
    return float((reference.argmax(-1) == other.argmax(-1)).double().mean())


def _parts(reference: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in f64, a few rows at a time: all the logits of a large vocabulary would take GB."""
    flat = (t.detach().reshape(-1, t.shape[-1]).split(_count(t)) for t in (reference, other))
    for a, b in zip(*flat, strict=True):
        yield a.double(), b.double()


def _count(rows: Tensor) -> int:
    """How many rows are in f64 at once."""
    return max(1, _PART // rows.shape[-1])


def _same_shape(reference: Tensor, other: Tensor) -> None:
    if reference.shape != other.shape:
        raise ValueError(f"tensors of one shape are needed, found {list(reference.shape)} and {list(other.shape)}")
