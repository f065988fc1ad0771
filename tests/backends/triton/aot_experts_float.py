"""Variants of grouped_floats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qfx.backends.triton.experts_float import grouped_floats
from tests.backends.triton.cases import Case, meta

MMA: Mapping[int, Mapping[str, str]] = {
    80: {"grouped_floats": r"mma\.sync\.aligned\.m16n8k16"},
    90: {"grouped_floats": r"wgmma\.mma_async"},
}


def case(t: int, e: int, n: int, k: int, dtype: torch.dtype = torch.bfloat16, *, turned: bool = False) -> Case:
    """t rows for e experts [n, k]; turned: that lie as [k, n]."""

    def run() -> object:
        w = meta(e, k, n, dtype=dtype).mT if turned else meta(e, n, k, dtype=dtype)
        return grouped_floats(meta(t, k, dtype=dtype), w, meta(e, dtype=torch.int32))

    name = f"t={t} e={e} n={n} k={k} {str(dtype).removeprefix('torch.')}{' turned' if turned else ''}"
    return Case(name, run, {} if dtype == torch.float32 else MMA)


CASES = [
    case(2, 8, 28672, 4096),
    case(256, 8, 4096, 14336, torch.float16),
    case(16384, 128, 1536, 2048),
    case(4, 32, 5760, 2880, turned=True),
    case(2048, 32, 5760, 2880, turned=True),
    case(100, 8, 777, 999),
    case(40, 8, 1536, 2048, torch.float32),
    case(4000, 8, 1536, 2048, torch.float32),
]
