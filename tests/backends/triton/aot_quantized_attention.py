"""Variants of quantized_attention."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton.quantized_attention import quantized_attention
from tests.backends.triton.cases import Case, meta

_INT8 = {80: {"attention": r"mma\.sync\S*\.s8"}, 90: {"attention": r"wgmma\S*\.s8"}}
_F16 = {80: {"attention": r"mma\.sync\S*\.f16"}, 90: {"attention": r"wgmma\S*\.f16"}}
_FP8 = {80: {"attention": r"mma\.sync\S*\.f16"}, 90: {"attention": r"wgmma\S*\.e4m3"}}


def _call(formats: str, width: int, *, rows: int = 4096, causal: bool = False, mask: torch.dtype | None = None,
          dtype: torch.dtype = torch.float16, softcap: float = 0.0, sinks: bool = False, value: int = 0
          ) -> object:  # fmt: skip
    given = dict(word.split("=") for word in formats.split())
    texts = [given.get(role, "") for role in "qkvp"]
    q = meta(1, 32, rows, width, dtype=dtype)
    k, v = (meta(1, 8, rows, d, dtype=dtype) for d in (width, value or width))
    masked = None if mask is None else meta(1, 1, rows, rows, dtype=mask)
    none: list[float] = []
    steps = [none if texts[i] in ("", "f16") or "/" in texts[i] else [0.1] for i in range(3)]
    return quantized_attention(q, k, v, masked, meta(32) if sinks else None, steps[0], [], steps[1], [], steps[2], [],
                               0.1, causal, softcap, *texts)  # fmt: skip


_TOKENS = "q=i8/tok k=i8/tok"
CASES = [
    *(
        Case(f"{_TOKENS} d={width}{' causal' if causal else ''}", partial(_call, _TOKENS, width, causal=causal), _INT8)
        for width in (64, 128, 256)
        for causal in (False, True)
    ),
    Case(f"{_TOKENS} bf16", partial(_call, _TOKENS, 128, causal=True, dtype=torch.bfloat16), _INT8),
    Case(f"{_TOKENS} f32", partial(_call, _TOKENS, 128, causal=True, dtype=torch.float32), _INT8),
    Case("q=i8 k=i8 v=i8", partial(_call, "q=i8 k=i8 v=i8", 128, causal=True), _INT8),
    Case("q=i8/tok k=i8/tok v=i8/tok p=u8", partial(_call, f"{_TOKENS} v=i8/tok p=u8", 128, causal=True), _INT8),
    Case("q=f8e4m3/tok k=f8e4m3/tok", partial(_call, "q=f8e4m3/tok k=f8e4m3/tok", 128, causal=True), _FP8),
    Case("k=i8/tok", partial(_call, "k=i8/tok", 128, causal=True), _F16),
    Case("mask bool", partial(_call, _TOKENS, 128, mask=torch.bool), _INT8),
    Case("floats, softcap and sinks", partial(_call, "", 128, softcap=30.0, sinks=True, causal=True), _F16),
    Case(
        "floats, mask bool and sinks bf16",
        partial(_call, "", 64, mask=torch.bool, sinks=True, dtype=torch.bfloat16),
        {},
    ),
    Case(
        "mask and softcap and sinks",
        partial(_call, _TOKENS, 128, mask=torch.float16, softcap=30.0, sinks=True, causal=True),
        _INT8,
    ),
    Case("odd", partial(_call, _TOKENS, 80, rows=777, value=72, mask=torch.bool), _INT8),
]
