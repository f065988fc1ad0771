"""Variants of linear_weight_only."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qfx.backends.triton.weight_only import linear_weight_only
from qfx.backends.triton.weight_only_config import has_fragments
from qfx.backends.triton.weight_only_pack import pack_weight_only
from qfx.format import Format
from tests.backends.triton.cases import Case, meta

MMA: Mapping[int, Mapping[str, str]] = {
    80: {"dot_tiles": r"mma\.sync\.aligned\.m16n8k16"},
    90: {"dot_tiles": r"wgmma\.mma_async"},
}
# Of 8 rows Triton makes wgmma from 3.8 on.
EITHER = {80: MMA[80], 90: {"dot_tiles": f"{MMA[80]['dot_tiles']}|{MMA[90]['dot_tiles']}"}}
# What was unpacked goes to tensor cores as it is: shared memory is for the sums, when all products are made.
IN_REGISTERS = r"(?s)(?=.*mma\.sync\.aligned\.m16n8k16)(?!.*(ld|st)\.shared.*mma\.sync)"
FRAGMENTS = {capability: {"fragments": IN_REGISTERS} for capability in (80, 90)}
# Weights go to tensor cores out of registers, x out of shared memory.
ABREAST = {"abreast": r"wgmma\.mma_async\S+ \{[^}]*\}, \{[^}]*\}, %rd"}
VECTORS: Mapping[int, Mapping[str, str]] = {
    capability: {"gemv": r"ld\.global(\.\S+)?\.v4\.b32"} for capability in (80, 90)
}


def case(
    text: str, m: int, n: int, k: int, dtype: torch.dtype = torch.float16, *, bias: bool = False, act: str = ""
) -> Case:
    """A layer [n, k] for m rows; act: its halves are gated."""

    def run() -> object:
        fmt = Format.parse(text)
        width = fmt.row_bytes(k) if fmt.bits < 8 else k
        codes = meta(n, width, dtype=torch.uint8 if fmt.bits < 8 else fmt.code_dtype)
        scale = meta(*fmt.scale_shape((n, k)), dtype=fmt.scale_dtype)
        zero = meta(*scale.shape, dtype=torch.uint8) if fmt.has_zero else meta(dtype=torch.float32)
        w, packed = pack_weight_only(codes, scale, zero if fmt.has_zero or fmt.has_global_scale else None, text, k)
        added = meta(n, dtype=dtype) if bias else None
        return linear_weight_only(meta(m, k, dtype=dtype), w, added, None, packed, n, act)

    name = f"{text} m={m} n={n} k={k} {str(dtype).removeprefix('torch.')}{act and f' {act}'}"
    if has_fragments(Format.parse(text), dtype) and m <= (64 if Format.parse(text).bits != 3 else 32):
        few = FRAGMENTS[80] if m <= 16 else MMA[80]
        return Case(name, run, {80: few, 90: FRAGMENTS[90] if m <= 8 else ABREAST})
    tiles = EITHER if m <= 8 else MMA if m < 1024 and dtype != torch.float32 else {}
    return Case(name, run, VECTORS if m <= 4 else tiles)


CASES = [
    case("i4/g128/f16", 1, 8192, 8192),
    case("u4/g128/f16", 1, 4096, 11008, torch.bfloat16, bias=True),
    case("i8/ch", 1, 8192, 8192),
    case("i3/g128/f16", 1, 8192, 8192),
    case("i2/g128/f16", 1, 8192, 8192),
    case("nf4/g64", 1, 4096, 4096, torch.bfloat16),
    case("f8e4m3/ch", 4, 4096, 4096),
    case("i4/g32", 1, 777, 999, torch.float32),
    case("i4/g128/f16", 8, 8192, 8192),
    case("i8/ch", 1, 8192, 8192, torch.bfloat16),
    case("i3/g64", 1, 4096, 4096, torch.bfloat16),
    case("u2/g32", 2, 8192, 8192),
    case("u3/g32", 8, 16384, 4096, torch.bfloat16, bias=True),
    case("u4/g64", 16, 777, 999, bias=True),
    case("i4/g32", 1, 8192, 8192),
    case("u8/g32", 1, 4096, 4096, torch.bfloat16),
    case("i2/g16", 2, 4096, 4096, torch.bfloat16),
    case("i4/g128/f16", 32, 8192, 8192, torch.bfloat16),
    case("u4/g128/f16", 256, 4096, 4096, torch.bfloat16),
    case("u4/g32/f16", 48, 4096, 4096),
    case("i3/g128/f16", 16, 4096, 4096, torch.bfloat16),
    case("i3/g128/f16", 17, 4096, 4096, torch.bfloat16),
    case("i8/ch", 128, 11008, 4096),
    case("u3/g64", 256, 4096, 4096),
    case("i8/ch", 12, 8192, 8192, torch.bfloat16),
    case("u8/g32", 64, 4096, 4096),
    case("u4/g128/f16", 64, 8192, 8192, torch.bfloat16, bias=True),
    case("i4/g128/f16", 9, 28672, 8192, torch.bfloat16),
    case("u3/g32", 33, 4096, 4000),
    case("u2/g64", 32, 8192, 8192, torch.bfloat16),
    case("u3/g64", 16, 4096, 4096, torch.bfloat16),
    case("i2/g32", 32, 4096, 4096, torch.bfloat16),
    case("u4/g64", 32, 4096, 1000, torch.bfloat16),
    case("nf4/g64", 32, 4096, 4096),
    case("nf4/g64", 64, 4096, 4096, torch.bfloat16),
    case("f4e2m1/g16/e4m3", 16, 4096, 4096, torch.bfloat16),
    case("u4/g128/f16", 512, 11008, 4096, torch.bfloat16),
    case("u4/g32/f16", 1, 128256, 2048, torch.bfloat16),  # a tied table of tokens
    case("i4/g32", 20, 4096, 4096, torch.float32),
    case("i4/g128", 2048, 4096, 4096),
    case("u4/g128/f16", 1, 22016, 4096, torch.bfloat16, act="silu"),
    case("u4/g128/f16", 5, 28672, 4096, torch.bfloat16, act="silu"),
    case("i4/g32", 1, 1554, 999, act="gelu_tanh", bias=True),
    case("i8/ch", 8, 16384, 4096, act="gelu"),
    case("u3/g64", 1, 22016, 4096, torch.bfloat16, act="silu"),
    case("i2/g128/f16", 1, 28672, 8192, act="silu"),
    case("nf4/g64", 1, 22016, 4096, torch.bfloat16, act="silu"),
    case("i4/g128/f16", 32, 1024, 8192, torch.bfloat16, act="silu"),
    case("i4/g32", 1, 22016, 4096, torch.float32, act="silu"),
]
