"""Variants of embedding."""

from __future__ import annotations

import torch

from qfx.backends.triton.embedding import embedding
from qfx.format import Format
from tests.backends.triton.cases import Case, meta


def case(text: str, dim: int, dtype: str) -> Case:
    """7 rows of a table of 32,000."""

    def run() -> object:
        fmt = Format.parse(text)
        codes = meta(32000, fmt.row_bytes(dim) if fmt.bits < 8 else dim,
                     dtype=torch.uint8 if fmt.bits < 8 else fmt.code_dtype)  # fmt: skip
        scale = meta(*(() if fmt.is_plain else fmt.scale_shape((32000, dim))), dtype=fmt.scale_dtype)
        zero = None
        if fmt.has_zero:
            zero = meta(*scale.shape[:-1], fmt.zero_width(scale.shape[-1]), dtype=torch.uint8)
        elif fmt.has_global_scale:
            zero = meta(*((1 + -(-scale.numel() // 256),) if fmt.nested else ()), dtype=torch.float32)
        return embedding(meta(7, dtype=torch.int64), codes, scale, zero, text, dim, Format.parse(dtype).code_dtype)

    return Case(f"{text} dim={dim} {dtype}", run)


CASES = [
    case("i8/ch", 4096, "f16"),
    case("u4/g128/f16", 4096, "bf16"),
    case("u4/g32/f16", 2048, "bf16"),
    case("u3/g40", 777, "f32"),
    case("nf4/g64/dq", 4096, "bf16"),
    case("f4e2m1/g16/e4m3", 4096, "f16"),
    case("f8e4m3/ch", 4096, "f16"),
    case("bf16", 4096, "bf16"),
]
