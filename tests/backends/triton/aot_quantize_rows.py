"""Variants of quantize_rows."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton.quantize_rows import quantize_rows
from tests.backends.triton.cases import Case, meta

CASES = [
    Case(f"i8/tok {dtype} k={k}", partial(quantize_rows, meta(7, k, dtype=dtype), None, "i8/tok"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for k in (4096, 777)
]
