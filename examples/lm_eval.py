"""Score a causal language model on text: perplexity and bits per byte.

Works on anything callable as `model(ids[B, T])` that returns logits [B, T, V], or an object with `.logits`.
All sums are in float64; a text is cut into windows that do not overlap, and the first token of each is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

Model = Callable[[Tensor], object]


def logits_of(model: Model, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of `model` on token ids [B, T]."""
    output = model(ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"expected logits or an object with .logits, found {type(output).__name__}")
    return logits


def windows(ids: Tensor, window: int) -> Iterator[Tensor]:
    """`ids` [T] as pieces [1, window]; a last piece of one token is left out, for it has nothing to predict."""
    if ids.dim() != 1 or ids.is_floating_point():
        raise ValueError(f"expected token ids of shape [T] and an integer dtype, found {ids.dtype} {list(ids.shape)}")
    if window < 2 or len(ids) < 2:
        raise ValueError(f"expected a window and a text of at least 2 tokens, found {window} and {len(ids)}")
    for piece in ids.split(window):
        if len(piece) > 1:
            yield piece[None]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross entropy (nats) of logits [B, T, V] on the next tokens of ids [B, T], in float32."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def nll(model: Model, ids: Tensor, window: int = 1024) -> float:
    """Mean negative log likelihood per scored token of `ids` [T], in nats."""
    total, count = 0.0, 0
    for piece in windows(ids, window):
        scored = piece.shape[1] - 1
        total += float(next_token_loss(logits_of(model, piece), piece)) * scored
        count += scored
    return total / count


def perplexity(model: Model, ids: Tensor, window: int = 1024) -> float:
    """exp(mean negative log likelihood) of `ids` [T], each token seen with at most `window` - 1 tokens before it."""
    return math.exp(nll(model, ids, window))


def bits_per_byte(model: Model, ids: Tensor, size: int, window: int = 1024) -> float:
    """Bits the model needs per byte of a text of `size` bytes with tokens `ids` [T]: comparable across tokenizers."""
    if size < 1:
        raise ValueError(f"expected a text of at least one byte, found size {size}")
    return nll(model, ids, window) / math.log(2) * len(ids) / size
