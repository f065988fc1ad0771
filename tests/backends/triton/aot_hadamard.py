"""Variants of hadamard: heads, blocks, hidden sizes, sizes with large and with random factors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from qfx.backends.triton.hadamard import hadamard, hadamard_quantize, layout
from tests.backends.triton.cases import Case, meta


def _mma(kernel: str) -> dict[int, dict[str, str]]:
    return {80: {kernel: "mma"}, 90: {kernel: "mma"}}  # sm_90 has mma.sync, too, for small tiles


def _run(call: Callable[..., object], m: int, k: int, size: int, dtype: torch.dtype, *rest: object) -> None:
    shape = layout(size)
    right = torch.float32 if size == 172 else torch.int8
    packed = [
        meta(shape.a, shape.a, dtype=torch.int8), meta(shape.b, shape.b, dtype=right), meta(size, dtype=torch.int8)
    ]  # fmt: skip
    call(meta(m, k, dtype=dtype), packed, size, *rest)


CASES = [
    *(
        Case(f"size={size} {dtype} m={m}", partial(_run, hadamard, m, k, size, dtype, False), _mma("hadamard"))
        for m, k, size, dtype in (
            (65536, 128, 128, torch.float16),
            (1, 128, 128, torch.bfloat16),
            (128, 4096, 4096, torch.bfloat16),
            (128, 4096, 4096, torch.float32),
            (1, 5120, 5120, torch.float16),
            (128, 11008, 11008, torch.bfloat16),
            (128, 13824, 13824, torch.float16),
        )
    ),
    Case("inverse", partial(_run, hadamard, 128, 8192, 8192, torch.float16, True), _mma("hadamard")),
    Case("random factor", partial(_run, hadamard, 128, 172, 172, torch.float16, False)),
    *(
        Case(
            f"i8/tok size={size}",
            partial(_run, hadamard_quantize, 128, k, size, torch.bfloat16, False, "i8/tok"),
            _mma("hadamard_quantize"),
        )
        for k, size in ((4096, 4096), (4096, 128), (8192, 8192))
    ),
]  # fmt: skip
