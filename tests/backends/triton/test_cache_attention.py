"""cache_attention: what qfx::cache_attention gives over the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfx.backends.triton.cache_attention import cache_attention
from qfx.kv.formats import CacheFormat, cache_formats
from qfx.kv.packed_ops import allocate, cache_append, spec_of
from qfx.kv.packed_ops import cache_attention as reference
from tests.backends.triton.cases import DEVICE

KINDS: tuple[Any, ...] = (
    "i8", "i4", "i3", "i2", "fp8", {"k": "i4", "v": "i2"}, {"k": "i8", "v": "i4"}, {"k": "i3", "v": "u4/tok"},
    {"k": ["i8", "i3"], "v": ["i3", "i4"], "residual": 5, "sinks": 0}, {"k": "f16", "v": "i4"},
    {"k": "u8/g16", "v": "u8/tok"}, {"k": "i4/tok/e8m0", "v": "i4/g8/bf16"}, {"k": "f8e5m2/g16", "v": "f8e4m3/g16"},
    {"k": "i8/g32/f16", "v": "i8/g24"}, {"k": "u6/g24", "v": "i5/tok"}, {"k": "u4/tok", "v": "i2/g8"},
)  # fmt: skip


def filled(
    kv: Any, tokens: tuple[int, ...], *, batch: int = 1, groups: int = 2, widths: tuple[int, int] = (64, 64),
    dtype: torch.dtype = torch.float32, length: int = 200, seed: int = 0,
) -> tuple[list[Tensor], str, Tensor]:  # fmt: skip
    """Memory after appends of so many tokens, its spec, and the number of tokens."""
    g = torch.Generator().manual_seed(seed)
    fmt: CacheFormat = cache_formats(kv, 1)[0]
    like = [torch.empty(batch, groups, 0, w, dtype=dtype) for w in widths]
    memory, spec = allocate(fmt, like[0], like[1], length), spec_of(fmt, like[0], like[1], length)
    seen = 0
    for count in tokens:
        k, v = (torch.randn(batch, groups, count, w, generator=g).to(dtype) for w in widths)
        cache_append(memory, k + 2 * torch.randn(widths[0], generator=g).to(dtype), v, torch.tensor(seen), spec)
        seen += count
    return [t.to(DEVICE) for t in memory], spec, torch.tensor(seen, device=DEVICE)


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative, of all of it."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-9))


@pytest.mark.parametrize("kv", KINDS, ids=str)
def test_every_format(kv: Any) -> None:
    memory, spec, length = filled(kv, (100, 40, 1), widths=(40, 24))
    q = torch.randn(1, 6, 1, 40, device=DEVICE)
    expected = reference(q, memory, length, None, 0.2, False, spec)
    assert difference(cache_attention(q, memory, length, None, 0.2, False, spec), expected) < 1e-5
    stored = next(t for t in memory[5:] if t.dtype in (torch.int8, torch.uint8))
    stored[:, :, :20] = 1 if stored.dtype == torch.uint8 else -stored[:, :, :20]
    assert difference(cache_attention(q, memory, length, None, 0.2, False, spec), expected) > 1e-3
