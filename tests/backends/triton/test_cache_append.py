"""cache_append: the memory that qfx::cache_append leaves, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.cache_append import cache_append
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import FEW, allocate, spec_of
from qfx.kv.packed_ops import cache_append as reference
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.test_cache_attention import KINDS


def states(batch: int, groups: int, tokens: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[B, G, tokens, width], a transposed view as models have it; some channels far from zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, groups, width, generator=g) + 4 * torch.randn(width, generator=g)
    return x.to(dtype).transpose(1, 2).to(DEVICE)


def same(kv: Any, sizes: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> None:
    fmt = cache_formats(kv, 1)[0]
    groups = fmt.heads or 2
    like = [torch.empty(2, groups, 0, w, dtype=dtype, device=DEVICE) for w in widths]
    spec = spec_of(fmt, *like, 400)
    mine, theirs = allocate(fmt, *like, 400), allocate(fmt, *like, 400)
    length = torch.tensor(0, device=DEVICE)
    for i, count in enumerate(sizes):
        k, v = (states(2, groups, count, w, seed + 7 * i + w, dtype) for w in widths)
        cache_append(mine, k, v, length, spec)
        reference(theirs, k, v, length, spec)
        length += count
        held = max(int(length) - fmt.sinks - int(theirs[0]), 0)
        for j, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            cut = slice(held) if j in (3, 4) else slice(None)  # beyond them lies what was there before
            assert a.dim() == 1 and torch.equal(a, b) or torch.equal(a[:, :, cut], b[:, :, cut]), (i, j)


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_every_format(kv: Any) -> None:
    same(kv, (3, 70, 1, FEW, 40, 30, 1, 1), (40, 24), torch.float32)
