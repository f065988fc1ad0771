"""cache_append: the memory that qfx::cache_append leaves on a CPU, bit for bit.

On a GPU torch multiplies by the reciprocal of a number where the reference divides by it.
"""

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
from tests.backends.triton.cases import DEVICE, INTERPRETED
from tests.backends.triton.test_cache_attention import EVERY


def states(batch: int, groups: int, tokens: int, width: int, seed: int, dtype: torch.dtype) -> Tensor:
    """[B, G, tokens, width], a transposed view as models have it; some channels far from zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, groups, width, generator=g) + 4 * torch.randn(width, generator=g)
    return x.to(dtype).transpose(1, 2).to(DEVICE)


def same(kv: Any, sizes: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype, *, batch: int = 1) -> None:
    """Both appends leave the same, each time."""
    fmt = cache_formats(kv, 1)[0]
    groups = fmt.heads or 2
    like = [torch.empty(batch, groups, 0, w, dtype=dtype, device=DEVICE) for w in widths]
    spec = spec_of(fmt, like[0], like[1], 200)
    mine, theirs = allocate(fmt, like[0], like[1], 200), allocate(fmt, like[0].cpu(), like[1].cpu(), 200)
    length = torch.tensor(0)
    for i, count in enumerate(sizes):
        k, v = (states(batch, groups, count, w, 7 * i + w, dtype) for w in widths)
        cache_append(mine, k, v, length.to(DEVICE), spec)
        reference(theirs, k.cpu(), v.cpu(), length, spec)
        length += count
        held = max(int(length) - fmt.sinks - int(theirs[0]), 0)
        for j, both in enumerate(zip(mine, theirs, strict=True)):  # behind the newest lies what was there before
            assert torch.equal(*(t[:, :, :held].cpu() if j in (3, 4) else t.cpu() for t in both)), (i, j)


@pytest.mark.parametrize("kv", [*EVERY, {"k": "u4/g32/e8m0", "v": "u5/g8/bf16"}], ids=str)
def test_every_format(kv: Any) -> None:
    same(kv, (75, 1, 30), (40, 24), torch.float32)


@settings(max_examples=6, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=4).filter(
        lambda sizes: sum(sizes) <= 200
    ),
    kv=st.sampled_from(("i4", {"k": "i3", "v": "i2"}, {"k": "i4", "v": "i4", "residual": 0, "sinks": 7})),
    batch=st.integers(1, 2),
)
def test_any_sizes(sizes: list[int], kv: Any, batch: int) -> None:
    same(kv, tuple(sizes), (16, 16), torch.float32, batch=batch)


def test_a_token_at_a_time() -> None:
    same("i4", (50, *(1,) * 40), (32, 32), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype: torch.dtype) -> None:
    same({"k": "i4", "v": "i8"}, (75, FEW), (32, 32), dtype)


def test_constant_tokens_have_the_codes_of_the_reference() -> None:
    for value in (0.0, 5.0, -3e-9, 6e4):
        fmt = cache_formats({"k": "i4", "v": "i8"}, 1)[0]
        x = torch.full((1, 1, 80, 16), value)
        spec, length, own = spec_of(fmt, x, x, 200), torch.tensor(0), x.to(DEVICE)
        mine, theirs = allocate(fmt, own, own, 200), allocate(fmt, x, x, 200)
        cache_append(mine, own, own, length.to(DEVICE), spec)
        reference(theirs, x, x, length, spec)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(mine, theirs, strict=True)), value


def test_bad_input() -> None:
    fmt = cache_formats("i4", 1)[0]
    x = torch.ones(1, 2, 9, 16, device=DEVICE)
    memory, spec, length = allocate(fmt, x, x, 20), spec_of(fmt, x, x, 20), torch.tensor(12, device=DEVICE)
    with pytest.raises(ValueError, match=r"(?s)new values do not fit the cache.*expected: \[1, 2, 9, 16\]"):
        cache_append(memory, x, x[:, :, :3], length, spec)
    with pytest.raises(ValueError, match="new keys do not fit"):
        cache_append(memory, x.half(), x.half(), length, spec)
    before = [t.clone() for t in memory]
    if INTERPRETED:
        with pytest.raises(ValueError, match=r"(?s)is full.*at most 20 tokens.*found: 21"):
            cache_append(memory, x, x, length, spec)
    assert all(torch.equal(a, b) for a, b in zip(memory, before, strict=True))
    torch.ops.qfx_triton.cache_append(memory, x[:, :, :8], x[:, :, :8], length, spec)
    assert not torch.equal(memory[3], before[3])
