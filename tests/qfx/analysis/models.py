"""Prepared graphs of small models with batches, for tests of the analysis."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx, nn

from qfx.capture import Captured, capture_export
from qfx.pipeline import prepare
from tests import tiny
from tests.zoo import ZOO

Batch = dict[str, Any]


def captured(model: nn.Module, batches: list[Batch]) -> tuple[fx.GraphModule, list[list[Any]], Captured]:
    """(prepared graph, its inputs batch by batch, what captured it)."""
    found = capture_export(model, (), batches[0])
    prepare(found.gm)
    return found.gm, [found.flatten((), batch) for batch in batches], found


def ids(rows: int = 2, length: int = 9, seed: int = 1, vocabulary: int = tiny.VOCAB) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def causal(kind: str = "llama", batches: int = 2) -> tuple[nn.Module, list[Batch]]:
    """A language model of `tests.tiny` and batches of ids."""
    return tiny.build(kind), [{"input_ids": ids(seed=i), "use_cache": False} for i in range(batches)]


@functools.cache
def prepared(kind: str = "llama") -> tuple[fx.GraphModule, list[list[Any]], Captured]:
    """`captured` of `causal`, made once: nothing may be changed in it."""
    return captured(*causal(kind))


@functools.cache
def of_zoo(name: str) -> tuple[fx.GraphModule, list[list[Any]], Captured]:
    """A model of the zoo on its own inputs, made once."""
    model, inputs = ZOO[name]()
    return captured(model, [inputs])
