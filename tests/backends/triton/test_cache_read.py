"""cache_read: the floats of qfx::cache_read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qfx.backends.triton.cache_read import cache_read
from qfx.kv.packed_ops import cache_read as reference
from tests.backends.triton.cases import DEVICE
from tests.backends.triton.test_cache_attention import EVERY, filled


@pytest.mark.parametrize("kv", EVERY, ids=str)
def test_every_format(kv: Any) -> None:
    memory, spec, length = filled(kv, (60, 20, 1), widths=(40, 24), length=90)
    for found, expected in zip(cache_read(memory, length, spec), reference(memory, length, spec), strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert (found[:, :, 81:] == 0).all()
        assert (found[:, :, :81] != 0).any(-1).all()


@pytest.mark.parametrize("tokens", [0, 2, 4, 30])
def test_few_tokens(tokens: int) -> None:
    memory, spec, _ = filled("i4", (tokens,) if tokens else (), batch=2, length=40)
    length = torch.tensor(tokens, device=DEVICE)
    found = torch.ops.qfx_triton.cache_read(memory, length, spec)
    assert all(torch.equal(a, b) for a, b in zip(found, reference(memory, length, spec), strict=True))


def test_halves() -> None:
    memory, spec, length = filled("i4", (60, 20), dtype=torch.float16, length=90)
    for found, expected in zip(cache_read(memory, length, spec), reference(memory, length, spec), strict=True):
        assert found.dtype == torch.float16 and torch.allclose(found, expected, rtol=2e-3, atol=1e-3)
