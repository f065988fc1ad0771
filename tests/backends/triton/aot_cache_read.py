"""Variants of cache_read: the tokens before a prompt."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.cache_read import cache_read
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from tests.backends.triton.cases import Case, meta


def case(kv: Any, *, dtype: torch.dtype = torch.float16, width: int = 128) -> Case:
    """One call after any number of tokens."""
    fmt = cache_formats(kv, 1)[0]
    like = meta(1, 8, 0, width, dtype=dtype)
    memory, spec = allocate(fmt, like, like, 32768), spec_of(fmt, like, like, 32768)
    return Case(f"{kv} {dtype} d={width}", partial(cache_read, memory, meta(dtype=torch.long), spec))


CASES = [
    *(case(kv) for kv in ("i8", "i4", "i3", {"k": "fp8", "v": "i2"})),
    case({"k": "u4/g32/bf16", "v": "u4/tok"}, dtype=torch.bfloat16),
    case("i4", width=80),
]
