"""Variants of quantize_rows."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton.quantize_rows import quantize_dynamic, quantize_static
from tests.backends.triton.cases import Case, meta

_VECTORS = {capability: {"act_quantize": r"ld\.global[.\w:]*\.v4\.b32"} for capability in (80, 90)}
_AHEAD = {capability: {"act_quantize": r"cp\.async\.cg\.shared\.global"} for capability in (80, 90)}


def _e4m3(kernel: str) -> dict[int, dict[str, str]]:
    return {90: {kernel: r"cvt\.rn\.satfinite\.e4m3x2"}}


CASES = [
    *(
        Case(f"i8/tok {dtype}", partial(quantize_dynamic, meta(7, 4096, dtype=dtype), None, "i8/tok"), _VECTORS)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    ),
    Case("i8/tok, an odd width", partial(quantize_dynamic, meta(7, 777), None, "i8/tok")),
    Case("i8/tok, many rows", partial(quantize_dynamic, meta(8192, 4096), None, "i8/tok"), _AHEAD),
    Case("u8/tok, many rows, smooth", partial(quantize_dynamic, meta(8192, 11008), meta(11008), "u8/tok"), _AHEAD),
    Case("i8/dyn", partial(quantize_dynamic, meta(7, 4096), None, "i8/dyn")),
    Case("u8", partial(quantize_static, meta(7, 4096), None, meta(1), meta(1, dtype=torch.uint8), "u8")),
    Case("f8e4m3/tok", partial(quantize_dynamic, meta(7, 4096), None, "f8e4m3/tok"), _e4m3("act_quantize")),
    Case("f8e4m3/g128", partial(quantize_dynamic, meta(7, 7168), None, "f8e4m3/g128/dyn"), _e4m3("quantize_groups")),
]
