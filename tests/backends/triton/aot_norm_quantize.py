"""Variants of norm_quantize."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from qfx.backends.triton.norm_quantize import norm_quantize
from tests.backends.triton.cases import Case, meta

_VECTORS = r"ld\.global[.\w:]*\.v4\.b32"
_AHEAD = r"cp\.async\.cg\.shared\.global"
_E4M3 = r"cvt\.rn\.satfinite\.e4m3x2"


def _case(m: int, k: int, fmt: str, expect: Any, *, dtype: torch.dtype = torch.bfloat16, layer: bool = False,
          residual: bool = False) -> Case:  # fmt: skip
    x, w = meta(m, k, dtype=dtype), meta(k, dtype=dtype)
    more = meta(m, k, dtype=dtype) if residual else None
    run = partial(norm_quantize, x, more, w, w if layer else None, 1e-5, layer, None, None, None, fmt, False, residual)
    name = f"{'layer' if layer else 'rms'}{' sum' if residual else ''} {fmt} {str(dtype)[6:]} m={m} k={k}"
    return Case(name, run, expect)


def _both(kernel: str, pattern: str) -> dict[int, dict[str, str]]:
    return {80: {kernel: pattern}, 90: {kernel: pattern}}


CASES = [
    _case(1, 4096, "i8/tok", _both("norm_quantize", _VECTORS)),
    _case(1, 4096, "i8/tok", _both("norm_quantize", _VECTORS), residual=True),
    _case(8192, 4096, "i8/tok", _both("norm_quantize", _AHEAD), residual=True),
    _case(8192, 4096, "i8/tok", _both("norm_quantize", _AHEAD), dtype=torch.float16),
    _case(8192, 4096, "f8e4m3/tok", {90: {"norm_quantize": _E4M3}}),
    _case(8192, 8192, "i8/tok", _both("norm_quantize", _AHEAD), residual=True),
    _case(8192, 5120, "i8/tok", _both("norm_quantize", _AHEAD), residual=True),
    _case(8192, 16384, "u8/tok", _both("norm_quantize", _AHEAD)),
    _case(
        8192,
        384,
        "i8/tok",
        {80: {"norm_quantize": _AHEAD}, 90: {"norm_quantize": _VECTORS}},
        layer=True,
        dtype=torch.float16,
    ),
    _case(8192, 1024, "u8/tok", _both("norm_quantize", _AHEAD), layer=True, dtype=torch.float32, residual=True),
    _case(7, 777, "i8/tok", {}, layer=True, residual=True),
    _case(64, 32768, "i8/tok", _both("norm_quantize_long", _VECTORS), residual=True),
    _case(64, 20001, "f8e4m3/tok", {}, layer=True),
]
