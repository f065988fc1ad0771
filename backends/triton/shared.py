"""Packed weights of which graphs of one process hold one copy: those of a prompt and of a step of decoding are equal.

Known weakly, by what they were made of and for (see `site.once`): a tensor that no graph holds any more is forgotten,
and one of other content takes the place of the one before. Nothing writes into such a tensor.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from qfx.storage.spill import flat_bytes

_KNOWN: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def of_all(key: str, number: int, made: Tensor) -> Tensor:
    """The tensor that is to be held in the place of number `number` of those made for a key: an equal one that a graph
    holds already, bit for bit, or this one.
    """
    if made.is_meta:
        return made
    look = (key, number, made.dtype, made.shape, made.stride(), made.device)
    with _LOCK:
        known = _KNOWN.get(look)
        if known is None or not torch.equal(flat_bytes(known), flat_bytes(made)):
            _KNOWN[look] = known = made
    return known
