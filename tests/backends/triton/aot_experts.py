"""Variants of grouped_weight_only."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qfx.backends.triton.experts import grouped_weight_only, pack_experts
from qfx.backends.triton.weight_only_config import has_fragments
from qfx.format import Format
from tests.backends.triton.aot_weight_only import IN_REGISTERS
from tests.backends.triton.cases import Case, meta

MMA: Mapping[int, Mapping[str, str]] = {
    80: {"grouped_tiles": r"mma\.sync\.aligned\.m16n8k16"},
    90: {"grouped_tiles": r"wgmma\.mma_async"},
}
VECTORS: Mapping[int, Mapping[str, str]] = {
    capability: {"grouped_vectors": r"ld\.global(\.\S+)?\.v4\.b32"} for capability in (80, 90)
}

FRAGMENTS = {capability: {"grouped_fragments": IN_REGISTERS} for capability in (80, 90)}


def case(text: str, t: int, e: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> Case:
    """t rows for e experts [n, k]."""

    def run() -> object:
        fmt = Format.parse(text)
        width = fmt.row_bytes(k) if fmt.bits < 8 else k
        codes = meta(e, n, width, dtype=torch.uint8 if fmt.bits < 8 else fmt.code_dtype)
        scale = meta(*fmt.scale_shape((e, n, k)), dtype=fmt.scale_dtype)
        zero = meta(*scale.shape, dtype=torch.uint8) if fmt.has_zero else meta(dtype=torch.float32)
        given = zero if fmt.has_zero or fmt.has_global_scale else None
        w, packed = pack_experts(codes, scale, given, text, k)
        return grouped_weight_only(meta(t, k, dtype=dtype), w, meta(e, dtype=torch.int32), packed, n)

    name = f"{text} t={t} e={e} n={n} k={k} {str(dtype).removeprefix('torch.')}"
    if has_fragments(Format.parse(text), dtype) and t <= 16 * e:
        return Case(name, run, FRAGMENTS)
    return Case(name, run, VECTORS if t <= e else {} if dtype == torch.float32 else MMA)


CASES = [
    case("i4/g128/f16", 2, 8, 28672, 4096),  # the layers of Mixtral-8x7B, one token and more
    case("i4/g128/f16", 512, 8, 28672, 4096),
    case("u4/g128", 8, 128, 1536, 2048, torch.bfloat16),  # of Qwen3-30B-A3B
    case("u4/g128", 64, 128, 1536, 2048, torch.bfloat16),
    case("u4/g128", 256, 128, 2048, 768, torch.bfloat16),
    case("u4/g128", 16384, 128, 1536, 2048, torch.bfloat16),
    case("f4e2m1/g32/e8m0", 4, 32, 5760, 2880, torch.bfloat16),  # of gpt-oss-20b
    case("f4e2m1/g32/e8m0", 2048, 32, 2880, 2880, torch.bfloat16),
    case("i8/ch", 8, 128, 1536, 2048, torch.bfloat16),
    case("i8/ch", 1024, 8, 4096, 14336),
    case("i3/g128/f16", 8, 128, 1536, 2048),
    case("i3/g128/f16", 1024, 32, 1536, 2048),
    case("i2/g128/f16", 128, 128, 1536, 2048),
    case("f8e4m3/ch", 64, 128, 1536, 2048, torch.bfloat16),
    case("f8e4m3/b128x128", 4096, 64, 1536, 2048, torch.bfloat16),
    case("i4/g16", 5, 8, 777, 999),
    case("i4/g32", 5, 8, 777, 999, torch.float32),
    case("i4/g32", 60, 8, 777, 999, torch.float32),
]
