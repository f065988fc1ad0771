"""Variants of act_quantize."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.act_quantize import act_quantize
from tests.backends.triton.cases import Case, meta

_VECTORS = r"ld\.global[.\w:]*\.v4\.b32"
_AHEAD = r"cp\.async\.cg\.shared\.global"


def _case(m: int, k: int, act: str, fmt: str, pattern: str = "", *, dtype: torch.dtype = torch.bfloat16,
          gated: bool = True) -> Case:  # fmt: skip
    both = meta(m, 2 * k, dtype=dtype)
    up = both[:, k:] if gated else None
    run = partial(act_quantize, both[:, :k], up, act, None, None, None, fmt, False)
    kernel = "act_quantize" if k <= 16384 else "act_quantize_long"
    expect: dict[int, Any] = {80: {kernel: pattern}, 90: {kernel: pattern}} if pattern else {}
    return Case(f"{act}{'*up' if gated else ''} {fmt} {str(dtype)[6:]} m={m} k={k}", run, expect)


CASES = [
    _case(1, 11008, "silu", "i8/tok", _VECTORS),
    _case(2048, 11008, "silu", "i8/tok", _AHEAD),
    _case(2048, 11008, "silu", "f8e4m3/tok", _AHEAD, dtype=torch.float16),
    _case(2048, 14336, "gelu_tanh", "u8/tok", _AHEAD),
    _case(8192, 4096, "gelu", "i8/tok", _AHEAD, gated=False),
    _case(8192, 1536, "gelu", "i8/tok", _AHEAD, gated=False, dtype=torch.float32),
    _case(300, 777, "quick_gelu", "i8/tok", gated=False),
    _case(64, 28672, "silu", "i8/tok", _VECTORS),
]
