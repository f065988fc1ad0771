"""Variants of grouped_gemm."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qfx.backends.triton.experts_gemm import grouped_gemm, pack_grouped
from qfx.backends.triton.row_codes import aligned
from qfx.format import Format
from tests.backends.triton.cases import Case, meta

S8: Mapping[int, Mapping[str, str]] = {
    80: {"grouped_integers": r"mma\.sync\.aligned\.m16n8k32\.row\.col(\.satfinite)?\.s32\.s8\.s8"},
    90: {"grouped_integers": r"wgmma\.mma_async\.\S+\.s32\.s8\.s8"},
}
E4M3: Mapping[int, Mapping[str, str]] = {
    80: {"grouped_e4m3": r"mma\.sync\.aligned\.m16n8k16"},
    90: {"grouped_e4m3": r"wgmma\.mma_async\.\S+\.e4m3\.e4m3"},
}


def case(x_format: str, w_format: str, t: int, e: int, n: int, k: int) -> Case:
    """t rows for e experts [n, k]."""

    def run() -> object:
        xf, wf = Format.parse(x_format), Format.parse(w_format)
        codes = meta(e, n, wf.row_bytes(k) if wf.bits < 8 else k, dtype=torch.uint8 if wf.bits < 8 else wf.code_dtype)
        scale = meta(*wf.scale_shape((e, n, k)), dtype=wf.scale_dtype)
        zero = meta(*scale.shape, dtype=torch.uint8) if wf.has_zero else None
        weight, text = pack_grouped(codes, scale, zero, w_format, k)
        x = meta(t, aligned(k), dtype=xf.code_dtype if xf.is_float else torch.int8)
        x_scale = meta(*xf.scale_shape((t, k)), dtype=torch.float32)
        x_zero = meta(*x_scale.shape, dtype=torch.uint8) if xf.has_zero else None
        return grouped_gemm(x, x_scale, x_zero, weight, meta(e, dtype=torch.int32), x_format, text, k, "bf16")

    return Case(f"{x_format} x {w_format} t={t} e={e} n={n} k={k}", run, S8 if w_format[0] in "iu" else E4M3)


CASES = [
    case("i8/tok", "i8/ch", 2, 8, 28672, 4096),
    case("i8/tok", "i8/ch", 4096, 8, 4096, 14336),
    case("u8/tok", "i8/ch", 512, 8, 4096, 14336),
    case("i8/tok", "i4/g128", 8, 128, 1536, 2048),
    case("i8/tok", "i4/ch", 1024, 128, 1536, 2048),
    case("i8/tok", "i4/g128", 16384, 128, 1536, 2048),
    case("i8/tok", "u4/g128", 8, 128, 1536, 2048),
    case("u8/tok", "u4/g32", 4096, 32, 777, 999),
    case("f8e4m3/tok", "f8e4m3/ch", 8, 128, 1536, 2048),
    case("f8e4m3/tok", "f8e4m3/ch", 256, 8, 4096, 14336),
    case("f8e4m3/tok", "f8e4m3/ch", 4096, 8, 28672, 4096),
    case("f8e4m3/g128/dyn", "f8e4m3/b128x128", 8, 128, 1536, 2048),
    case("f8e4m3/g128/dyn", "f8e4m3/b128x128", 16384, 128, 1536, 2048),
]
