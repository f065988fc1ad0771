"""Variants of cache_attention: Llama's heads, every format of few bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.cache_attention import cache_attention
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from tests.backends.triton.cases import Case, meta

_MMA = {capability: {"split_attention": r"mma\.sync\S*f16\.f16"} for capability in (80, 90)}
_WIDE = {80: _MMA[80], 90: {"split_attention": r"wgmma\S*f32\.f16"}}


def case(
    kv: Any, *, dtype: torch.dtype = torch.float16, heads: tuple[int, int] = (32, 8), width: int = 128,
    queries: int = 1, mask: bool = False, wide: bool = False,
) -> Case:  # fmt: skip
    """One call after any number of tokens. wide: its tiles have 64 rows of queries."""
    fmt = cache_formats(kv, 1)[0]
    like = meta(1, heads[1], 0, width, dtype=dtype)
    memory, spec = allocate(fmt, like, like, 32768), spec_of(fmt, like, like, 32768)
    seen = torch.empty(1, 1, queries, 32768, dtype=torch.bool, device="meta") if mask else None
    q = meta(1, heads[0], queries, width, dtype=dtype)
    name = f"{kv} {dtype} {heads[0]}/{heads[1]} d={width} s={queries}{' mask' if mask else ''}"
    call = partial(cache_attention, q, memory, meta(dtype=torch.long), seen, 0.125, False, spec)
    return Case(name, call, {} if dtype == torch.float32 else _WIDE if wide else _MMA)


CASES = [
    *(case(kv) for kv in ("i8", "i4", "i3", "i2", "fp8", {"k": "i4", "v": "i2"})),
    *(case(kv, dtype=torch.bfloat16, mask=True) for kv in ("i8", "i4", "fp8", {"k": "u4/g32/bf16", "v": "u4/tok"})),
    case("i8", queries=32, mask=True, wide=True),
    case("i4", dtype=torch.bfloat16, heads=(64, 8), queries=5, mask=True, wide=True),
    case({"k": "u4/g32/bf16", "v": "u4/tok"}, dtype=torch.bfloat16, heads=(64, 8), queries=5, mask=True, wide=True),
    *(case(kv, dtype=torch.bfloat16, queries=5, mask=True) for kv in ("i4", "i3", {"k": "u4/g32/bf16", "v": "u4/tok"})),
    case("i4", dtype=torch.bfloat16, heads=(32, 32), queries=5, mask=True),
    case("i4", dtype=torch.bfloat16, heads=(8, 1), width=256, queries=5, mask=True),
    case("i8", dtype=torch.bfloat16, heads=(32, 32), width=96, mask=True),
    case("i4", heads=(14, 2), width=64),
    case("i4", heads=(32, 32), width=80),
    case({"k": ["i8", "i4"], "v": ["i4", "i4"]}, heads=(8, 2), width=256),
    case("i8", dtype=torch.float32),
]
