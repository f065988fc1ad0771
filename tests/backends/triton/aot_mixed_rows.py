"""Variants of products with rows of several formats: integer and float inputs, few rows and many."""

from __future__ import annotations

from functools import partial

import torch

from qfx.backends.triton import layout
from qfx.backends.triton.mixed_rows import gemm_mixed, linear_mixed
from qfx.backends.triton.mixed_rows_config import WIDTHS, columns_at_once
from qfx.backends.triton.products import group_of
from qfx.format import Format
from tests.backends.triton.cases import Case, meta


def _run(m: int, k: int, rows: tuple[int, int, int], x_format: str, w_formats: str, dtype: torch.dtype) -> None:
    parsed, n = [Format.parse(text) for text in w_formats.split(",")], sum(rows)
    group = max(map(group_of, parsed))
    sub = columns_at_once(group, floats=not x_format)
    data = [
        meta(count, layout.padded(k, sub * 8 // bits) * bits // 8, dtype=torch.uint8)
        for count, bits in zip(rows, WIDTHS, strict=True)
    ]
    shape = (-(-layout.padded(k, 4 * sub) // group), n) if group else (n,)
    kinds = (torch.float32, torch.int8) if group or not x_format else (torch.float32, torch.int32)
    ends = [meta(*shape, dtype=kinds[0]), meta(n, dtype=torch.float32 if group else torch.int32)]
    if any(fmt.has_zero for fmt in parsed):
        ends.append(meta(*shape, dtype=kinds[1]))
    weight = [meta(n, dtype=torch.int32), *data, *ends]
    if not x_format:
        linear_mixed(meta(m, k, dtype=dtype), weight, None, None, None, w_formats, "")
        return
    codes, scale = meta(m, k, dtype=torch.int8), meta(m, 1, dtype=torch.float32)
    zero = meta(m, 1, dtype=torch.uint8) if x_format == "u8/tok" else None
    text = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    gemm_mixed(codes, scale, zero, weight, None, None, x_format, w_formats, k, "", text)


_INTEGER = {
    80: {"mixed_integer": r"mma\.sync\.aligned\.m16n8k32.*s8\.s8"},
    90: {"mixed_integer": r"wgmma\.mma_async.*s32\.s8\.s8"},
}
_HALF = {80: {"mixed_float": r"mma\.sync.*m16n8k16.*f16"}, 90: {"mixed_float": r"wgmma\.mma_async.*f16"}}

CASES = [
    Case(f"{x or dtype} {w} rows={rows} m={m} k={k}", partial(_run, m, k, rows, x, w, dtype), expect)
    for m, k, rows, x, w, dtype, expect in (
        (1, 4096, (1024, 3072, 0), "i8/tok", "i8/ch,i4/ch", torch.float16, _INTEGER),
        (32, 4096, (1024, 2048, 1024), "i8/tok", "i8/ch,u4/ch,i2/ch", torch.bfloat16, _INTEGER),
        (2048, 4096, (1024, 3072, 0), "i8/tok", "i8/ch,i4/ch", torch.float16, _INTEGER),
        (2048, 11008, (1024, 3072, 0), "u8/tok", "u8/ch,u4/ch", torch.bfloat16, _INTEGER),
        (1, 4096, (1024, 3072, 0), "i8/tok", "i8/ch,u4/g128", torch.float16, _INTEGER),
        (2048, 4096, (1024, 3072, 0), "i8/tok", "i8/ch,u4/g128", torch.float16, _INTEGER),
        (1, 4096, (1024, 3072, 0), "", "i8/ch,i4/g128", torch.float16, _HALF),
        (16, 4096, (1024, 3072, 0), "", "u8/ch,u4/g128", torch.float16, _HALF),
        (16, 4096, (1024, 3072, 0), "", "u8/ch,u4/ch", torch.bfloat16, {}),
        (512, 4096, (1024, 3072, 0), "", "i8/ch,i4/ch", torch.float16, _HALF),
        (512, 4096, (0, 3072, 1024), "", "i4/g128,i2/g128", torch.bfloat16, {}),
        (2048, 4096, (1024, 3072, 0), "", "i8/ch,u4/g128", torch.bfloat16, {}),
        (7, 777, (128, 256, 0), "", "i8/ch,u4/ch", torch.float32, {}),
    )
]
