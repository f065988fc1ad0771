"""Variants of gemm4: few rows and many, channels and groups, with and without zero points, 2 and 4 bits."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton import layout
from qfx.backends.triton.gemm4 import columns_of, container, gemm4
from qfx.format import Format
from tests.backends.triton.cases import Case, meta


def _run(m: int, n: int, k: int, x_format: str, w_format: str, dtype: str, activation: str) -> None:
    wf = Format.parse(w_format)
    bits, sub = container(wf.bits), columns_of(w_format)
    unit = sub * 8 // bits
    data = meta(n, layout.padded(k, unit) * bits // 8, dtype=torch.uint8)
    if wf.group:
        groups = -(-layout.padded(k, unit) // wf.group)
        ends = [meta(groups, n, dtype=wf.scale_dtype), meta(n, dtype=torch.float32), meta(groups, n, dtype=torch.int8)]
    else:
        ends = [meta(n, dtype=torch.float32), meta(n, dtype=torch.int32), meta(n, dtype=torch.int32)]
    weight = [data, *(ends if wf.has_zero else ends[:2])]
    zero = meta(m, 1, dtype=torch.uint8) if x_format == "u8/tok" else None
    codes, scale = meta(m, -(-k // 16) * 16, dtype=torch.int8), meta(m, 1, dtype=torch.float32)
    gemm4(codes, scale, zero, weight, meta(n), None, x_format, w_format, k, activation, dtype)


_EXPECT = {
    80: {"gemm4": r"mma\.sync\.aligned\.m16n8k32.*s8\.s8"},
    90: {"gemm4": r"wgmma\.mma_async.*s32\.s8\.s8"},
}

CASES = [
    Case(f"{x} {w} m={m} n={n} k={k} {dtype} {activation}", partial(_run, m, n, k, x, w, dtype, activation), _EXPECT)
    for m, n, k, x, w, dtype, activation in (
        (1, 8192, 8192, "i8/tok", "i4/ch", "f16", ""),
        (1, 4096, 4096, "i8/tok", "i4/g128", "bf16", ""),
        (1, 4096, 11008, "i8/tok", "u4/g128/f16", "f16", ""),
        (16, 4096, 4096, "i8/tok", "u4/g32/f16", "f16", "silu"),
        (32, 11008, 4096, "u8/tok", "u4/g64/f16", "bf16", ""),
        (2048, 4096, 4096, "i8/tok", "i4/ch", "f16", ""),
        (4096, 11008, 4096, "u8/tok", "u4/ch", "bf16", "gelu"),
        (2048, 4096, 4096, "i8/tok", "i4/g128", "f16", ""),
        (4096, 11008, 4096, "i8/tok", "u4/g128/f16", "bf16", ""),
        (128, 4096, 4096, "i8/tok", "i4/g32", "f16", ""),
        (1, 4096, 4096, "i8/tok", "i2/ch", "f16", ""),
        (2048, 4096, 4096, "i8/tok", "u2/g64/f16", "f16", ""),
        (7, 333, 777, "i8/tok", "u4/g128", "f32", ""),
    )
]
