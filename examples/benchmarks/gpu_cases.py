"""The cases that `gpu_kernels.py` checks and times. Each is made when its turn comes, see `gpu_work.py`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from examples.benchmarks import gpu_work as work
from examples.benchmarks.gpu_work import Made
from qfx.backends.triton import gemm8_config
from qfx.backends.triton.descriptors import LEAST as DESCRIBED
from qfx.backends.triton.device import H100, LEAST

FLOATING = ("i8/ch", "u4/g128/f16", "nf4/g64/f16", "u3/g128/f16", "u2/g64/f16")
EIGHT = (("i8/tok", "i8/ch"), ("f8e4m3/tok", "f8e4m3/ch"))
FOUR = ("i8/tok", "i4/ch")
MIXED = ("i8/ch", "i4/ch", "i4/ch", "i8/ch")
CACHES = ("i8", "fp8", "i4")
ROUTED = (("", ""), ("", "u4/g128/f16"), ("", "i8/ch"), *EIGHT, ("i8/tok", "i4/g128"))
LARGE = (8192, 8192)


@dataclass(frozen=True)
class Case:
    """make: with the device. unit: what the arithmetic runs in ("bf16", "8 bit"), "" where bytes alone count.

    facts: sizes and formats, for goals. tolerance: of the relative error (Frobenius). least: compute capability.
    """

    family: str
    title: str
    rows: int
    make: Callable[[torch.device], Made]
    unit: str = ""
    tolerance: float = 1e-2
    facts: tuple[Any, ...] = ()
    least: tuple[int, int] = LEAST


@dataclass(frozen=True)
class Sizes:
    """rows: [M, K] of what is quantized. rotation: (rows, K, block). caches: (batch, tokens).

    prompts: (tokens, causal). heads: of queries, of keys; their width.
    """

    rows: Sequence[tuple[int, int]]
    rotation: Sequence[tuple[int, int, int]]
    table: tuple[int, int]
    ids: int
    caches: Sequence[tuple[int, int]]
    prompts: Sequence[tuple[int, bool]]
    heads: tuple[tuple[int, int], int] = ((32, 8), 128)
    dtype: torch.dtype = torch.bfloat16


def _family(x_format: str, w_format: str) -> str:
    if not x_format:
        return "weight-only"
    return "w4a8" if w_format.startswith("i4") else "w8a8" if not x_format.startswith("f8") else "fp8"


def _linears(
    n: int, k: int, rows: Sequence[int], formats: Sequence[tuple[str, str]], dtypes: Sequence[torch.dtype]
) -> list[Case]:
    return [
        Case(
            _family(x, w), f"x={x or 'float'} w={w} {n}x{k} {str(dtype)[6:]}", m,
            partial(work.linear, n, k, m, x, w, dtype), "8 bit" if x else "bf16",
            1e-2 if dtype == torch.bfloat16 else 5e-3, ("linear", x, w, n, k),
        )
        for (x, w), m, dtype in itertools.product(formats, rows, dtypes)
    ]  # fmt: skip


def _products(n: int, k: int, rows: Sequence[int]) -> list[Case]:
    return [
        Case(_family(x, w), f"product alone x={x} w={w} {n}x{k}", m, partial(work.product, n, k, m, x, w), "8 bit",
             facts=("product", x, w, n, k))
        for (x, w), m in itertools.product(EIGHT, rows)
    ]  # fmt: skip


def _forms(n: int, k: int, rows: Sequence[int], *, many: int | None = None) -> list[Case]:
    """The same products by tensor descriptors, in each form that `qfx tune` would measure for `many` rows.

    And e4m3 whose sums stay in the tensor core, which no other form does: faster, and less exact.
    """
    found = []
    for (x, w), m, promoted in itertools.product(EIGHT, rows, (True, False)):
        problem = gemm8_config.Problem(n, k, x.startswith("f8"))
        if not promoted and not problem.is_float:
            continue
        for config in gemm8_config.described(H100, problem, many or m, promoted=promoted):
            tile = f"{config['BLOCK_M']}x{config['BLOCK_N'] * config['HALVES']}"
            title = f"by descriptors {tile} {config['num_stages']} stages {config['PERSISTENT']} a processor"
            found.append(
                Case(
                    _family(x, w), f"{title}{'' if promoted else ' NOT PROMOTED'} x={x} w={w} {n}x{k}", m,
                    partial(work.product, n, k, m, x, w, config=config), "8 bit", 1e-2 if promoted else 2e-2,
                    facts=("form" if promoted else "form not promoted", x, w, n, k), least=DESCRIBED,
                )
            )  # fmt: skip
    return found


def _mixed(n: int, k: int, rows: Sequence[int], x_formats: Sequence[str], dtype: torch.dtype) -> list[Case]:
    return [
        Case("mixed", f"x={x or 'float'} w={','.join(MIXED)} {n}x{k}", m,
             partial(work.mixed, n, k, m, x, MIXED, dtype), "8 bit" if x else "bf16", facts=("mixed", n, k))
        for x, m in itertools.product(x_formats, rows)
    ]  # fmt: skip


def _experts(
    sizes: tuple[int, int, int], rows: Sequence[int], formats: Sequence[tuple[str, str]], dtype: torch.dtype
) -> list[Case]:
    count, n, k = sizes
    return [
        Case("experts", f"x={x or 'float'} w={w or 'float'} {count} x {n}x{k}", m,
             partial(work.experts, sizes, m, x, w, dtype), "8 bit" if x else "bf16", facts=("experts", x, w, *sizes))
        for (x, w), m in itertools.product(formats, rows)
    ]  # fmt: skip


def _others(sizes: Sizes) -> list[Case]:
    """Every kernel that is no linear layer."""
    dtype, found = sizes.dtype, []
    for (rows, k), text in itertools.product(sizes.rows, ("i8/tok", "f8e4m3/tok")):
        kinds = (("norm", work.norm), ("silu", work.activation), ("rows", work.alone))
        found += [
            Case("norm", f"{what} to {text} K={k}", rows, partial(make, rows, k, text, dtype), facts=(what, text, k))
            for what, make in kinds
        ]
    found += [
        Case("hadamard", f"blocks of {size} K={k}", rows, partial(work.rotation, rows, k, size, dtype))
        for rows, k, size in sizes.rotation
    ]
    found += [
        Case("embedding", f"w={w} {sizes.table[0]}x{sizes.table[1]}", sizes.ids,
             partial(work.embedding, *sizes.table, sizes.ids, w, dtype))
        for w in ("i8/ch", "u4/g128/f16")
    ]  # fmt: skip
    found += [
        Case("decode", f"kv={kv} {tokens} tokens", batch,
             partial(work.decode, batch, tokens, kv, *sizes.heads, dtype), facts=(kv, tokens))
        for (batch, tokens), kv in itertools.product(sizes.caches, CACHES)
    ]  # fmt: skip
    found += [
        Case("decode", f"float {filled} of {tokens} tokens", batch,
             partial(work.decode_floats, batch, tokens, filled, *sizes.heads, dtype), facts=("float", tokens))
        for batch, tokens in sizes.caches
        for filled in (-(-tokens // 4), tokens)
    ]  # fmt: skip
    found += [
        Case("prefill", f"q=i8/tok k=i8/tok{' causal' if causal else ''}", tokens,
             partial(work.prefill, tokens, *sizes.heads, "i8/tok", "i8/tok", causal), "8 bit", facts=(causal,))
        for tokens, causal in sizes.prompts
    ]  # fmt: skip
    return found


def checks(tiny: bool) -> list[Case]:
    """Odd shapes in each dtype of activations, which are only checked; tiny ones for the interpreter."""
    formats = [*(("", w) for w in FLOATING), *EIGHT, FOUR, ("", "i4/g32/f16"), ("", "u4/g64/bf16"), ("u8/tok", "u8/ch")]
    appends = [Case("decode", f"append kv={kv}", 81, partial(work.append, 40, kv)) for kv in CACHES]
    if tiny:
        sizes = Sizes([(3, 72)], [(3, 64, 32)], (50, 72), 7, [(1, 70)], [(40, True)], ((4, 2), 64), torch.float16)
        linears = _linears(40, 264, (1, 20), formats, (torch.float16,))
        linears += _experts((3, 24, 264), (2, 20), [*ROUTED, ("u8/tok", "u4/g32")], torch.float16)
        mixed = _mixed(40, 264, (1, 20), ("", "i8/tok"), torch.float16)
        return [*linears, *mixed, *_others(sizes), *appends, *_forms(48, 272, (20,), many=4096)]
    sizes = Sizes([(67, 1000)], [(67, 4096, 4096), (67, 2560, 128)], (1000, 520), 77, [(2, 777)],
                  [(777, True), (777, False)])  # fmt: skip
    linears = _linears(264, 520, (3, 300), formats, (torch.float16,))
    linears += _linears(264, 520, (1, 17, 65), formats, (torch.bfloat16,))
    linears += _experts((5, 264, 520), (1, 5, 30, 900), [*ROUTED, ("u8/tok", "u4/g32"), ("", "i3/g64")], torch.bfloat16)
    mixed = _mixed(264, 520, (1, 17, 300), ("", "i8/tok"), torch.bfloat16)
    return [*linears, *mixed, *_others(sizes), *appends, *_forms(272, 528, (300,), many=4096)]


def timed() -> list[Case]:
    """What is timed, in bf16."""
    dtypes, floating = (torch.bfloat16,), [("", w) for w in FLOATING]
    sizes = Sizes([(8192, 4096), (8192, 8192)], [(8192, 4096, 4096), (8192, 4096, 128)], (32000, 4096), 8192,
                  [(1, 32768), (16, 8192)], [(8192, False), (8192, True), (32768, True)])  # fmt: skip
    return [
        *_linears(*LARGE, (1,), floating, dtypes),
        *_linears(28672, 8192, (1,), floating, dtypes),
        *_linears(*LARGE, (2, 4, 8, 16, 32, 64, 256, 2048, 4096), [("", "u4/g128/f16")], dtypes),
        *_linears(*LARGE, (16, 4096), [("", "i8/ch")], dtypes),
        *_linears(*LARGE, (1, 16, 128, 4096), EIGHT, dtypes),
        *_linears(*LARGE, (1, 16, 4096), [FOUR], dtypes),
        *_mixed(*LARGE, (1, 16, 4096), ("i8/tok",), torch.bfloat16),
        *_experts((128, 1536, 2048), (8, 64, 512, 32768), ROUTED, torch.bfloat16),
        *_experts((8, 28672, 4096), (2, 16, 4096), ROUTED, torch.bfloat16),
        *_products(*LARGE, (4096, 8192)),
        *_forms(*LARGE, (4096, 8192)),
        *_others(sizes),
    ]
