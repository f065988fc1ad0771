"""Variants of quantize_rows."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton.quantize_rows import quantize_dynamic, quantize_rows, quantize_static
from tests.backends.triton.cases import Case, meta

_DIVISION = {capability: {"quantize_rows": r"div\.rn\.f32"} for capability in (80, 90)}
_E4M3 = r"cvt\.rn\.satfinite\.e4m3x2"

CASES = [
    *(
        Case(f"i8/tok {dtype} k={k}", partial(quantize_rows, meta(7, k, dtype=dtype), None, "i8/tok"), _DIVISION)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for k in (4096, 777)
    ),
    Case("u8/tok", partial(quantize_dynamic, meta(7, 11008), meta(11008), "u8/tok"), _DIVISION),
    Case("i8/dyn", partial(quantize_dynamic, meta(7, 4096), None, "i8/dyn")),
    Case("u8", partial(quantize_static, meta(7, 4096), None, meta(1), meta(1, dtype=torch.uint8), "u8")),
    Case("f8e4m3/tok", partial(quantize_dynamic, meta(7, 4096), None, "f8e4m3/tok"), {90: {"quantize_rows": _E4M3}}),
    Case(
        "f8e4m3/g128",
        partial(quantize_dynamic, meta(7, 7168), None, "f8e4m3/g128/dyn"),
        {90: {"quantize_groups": _E4M3}},
    ),
]
