"""Variants of cache_append: Llama's heads, every format of few bits, a token and a prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.cache_append import cache_append
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from tests.backends.triton.cases import Case, meta


def case(kv: Any, *, dtype: torch.dtype = torch.float16, new: int = 1, width: int = 128) -> Case:
    """One call after any number of tokens."""
    fmt = cache_formats(kv, 1)[0]
    like = meta(1, 8, 0, width, dtype=dtype)
    memory, spec = allocate(fmt, like, like, 32768), spec_of(fmt, like, like, 32768)
    k = meta(1, 8, new, width, dtype=dtype)
    return Case(f"{kv} {dtype} n={new} d={width}", partial(cache_append, memory, k, k, meta(dtype=torch.long), spec))


CASES = [
    *(case(kv) for kv in ("i8", "i4", "i3", "i2", "fp8", {"k": "i4", "v": "i2"})),
    *(case(kv, dtype=torch.bfloat16, new=2048) for kv in ("i8", "i4", {"k": "u4/g32/bf16", "v": "u4/tok"})),
    case("i4", width=80),
    case({"k": ["i8"] * 4 + ["i4"] * 4, "v": "i4"}),
    case("i4", dtype=torch.float32),
]
