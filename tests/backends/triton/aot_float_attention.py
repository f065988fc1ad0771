"""Variants of float_attention: heads of usual models, with the mask of a cache of fixed length."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.float_attention import float_attention, spans_of
from tests.backends.triton.cases import Case, meta

_HALF = r"mma\.sync\S*f32\.{0}\.{0}"


def case(
    heads: tuple[int, int], *, width: int = 128, value: int = 0, dtype: torch.dtype = torch.bfloat16, queries: int = 1,
    tokens: int = 4096, batch: int = 1, mask: torch.dtype | None = torch.bool, by_head: bool = False,
    more: bool = False, causal: bool = False,
) -> Case:  # fmt: skip
    """One call. more: with sinks and a cap."""
    q = meta(batch, heads[0], queries, width, dtype=dtype)
    k, v = (meta(batch, heads[1], tokens, w, dtype=dtype) for w in (width, value or width))
    seen = None if mask is None else meta(batch, heads[0] if by_head else 1, queries, tokens, dtype=mask)
    name = f"{dtype} {heads[0]}/{heads[1]} d={width}{f'/{value}' if value else ''} s={queries} l={tokens} b={batch}"
    name += "".join(
        f" {word}" for word, given in (("causal", causal), ("sinks and cap", more), ("by head", by_head)) if given
    )
    name += "" if mask is torch.bool else f" mask={mask}"

    def run() -> Any:
        spans = None if seen is None else spans_of(seen)
        return float_attention(q, k, v, seen, spans, meta(heads[0], dtype=dtype) if more else None, 0.125, causal,
                               30.0 if more else 0.0)  # fmt: skip

    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype)
    few = {} if kind is None else {"split_float_attention": _HALF.format(kind)}
    many = {} if kind is None else {"split_float_attention": rf"wgmma\S*f32\.{kind}"}
    return Case(name, partial(run), {80: few, 90: many if heads[0] // heads[1] * queries > 32 else few})


CASES = [
    case((32, 8)),
    case((32, 32)),
    case((32, 32), batch=16),
    case((32, 8), dtype=torch.float16, width=64),
    case((32, 8), dtype=torch.float32),
    case((14, 2), width=64, tokens=1001),
    case((71, 1), width=64),
    case((8, 4), width=256, mask=torch.bfloat16, more=True),
    case((64, 8), width=64, mask=None, more=True),
    case((16, 16), width=80, value=96, mask=torch.float32, by_head=True),
    case((12, 12), width=64, queries=5, mask=None, causal=True, more=True),
    case((32, 8), queries=8),
]
