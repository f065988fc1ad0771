"""Variants of gemm8: few and many rows, int8 and e4m3, with zero points, scales in blocks, every epilogue.

Those by tensor descriptors are asked for as a tuned configuration is; a device without them takes pointers.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qfx.backends.triton import gemm8_config, tuning
from qfx.backends.triton.device import H100
from qfx.backends.triton.gemm8 import gemm8
from qfx.backends.triton.gemm8_config import Problem
from qfx.backends.triton.quantize_rows import aligned
from tests.backends.triton.cases import Case, meta

_INT8 = {80: {"gemm8": r"mma\.sync\S*\.s8\.s8"}, 90: {"gemm8": r"wgmma\.mma_async\S*\.s8\.s8"}}
_FEW = {80: _INT8[80], 90: {"gemm8": r"(wgmma\.mma_async|mma\.sync)\S*\.s8\.s8"}}  # tiles of 32 columns need no wgmma
_E4M3 = {80: {"gemm8": r"mma\.sync\S*\.f32\.f16\.f16"}, 90: {"gemm8": r"wgmma\.mma_async\S*\.e4m3\.e4m3"}}
_COPIES = r"(?s)(?=.*cp\.async\.bulk\.tensor)(?=.*mbarrier\.try_wait)"


def int8(m: int, n: int, k: int, x_format: str, w_format: str, activation: str = "", dtype: str = "f16") -> Case:
    """A linear of integers with a bias, and with a residual where the activation is a function."""
    affine_x, affine_w, rows = x_format.startswith("u"), w_format.startswith("u"), m if "tok" in x_format else 1
    whole = meta(n, dtype=torch.int32)
    weight = [meta(n, aligned(k), dtype=torch.int8), meta(n, dtype=torch.float32), whole, *[whole] * affine_w]
    zero = meta(rows, 1, dtype=torch.uint8) if affine_x else None
    codes, scale = meta(m, aligned(k), dtype=torch.int8), meta(rows, 1, dtype=torch.float32)
    residual = meta(m, n) if activation else None
    run = partial(gemm8, codes, scale, zero, weight, meta(n), residual, x_format, w_format, activation, dtype)
    return Case(f"{x_format} {w_format} {m}x{n}x{k} {activation}{dtype}", run, _INT8 if m > 16 else _FEW)


def e4m3(m: int, n: int, k: int, x_format: str, w_format: str) -> Case:
    """A linear of e4m3 without a bias."""
    groups = -(-k // 128)
    scale = meta(n, dtype=torch.float32) if "b128" not in w_format else meta(-(-n // 128), groups, dtype=torch.float32)
    codes: Tensor = meta(m, aligned(k), dtype=torch.float8_e4m3fn)
    x_scale = meta(m, groups if "g128" in x_format else 1, dtype=torch.float32)
    weight = [meta(n, aligned(k), dtype=torch.float8_e4m3fn), scale]
    run = partial(gemm8, codes, x_scale, None, weight, None, None, x_format, w_format, "", "bf16")
    return Case(f"{x_format} {w_format} {m}x{n}x{k}", run, _E4M3)


def described(case: Case, problem: Problem, m: int, which: int, *, promoted: bool = True) -> Case:
    """The case with the configuration `which` of those by descriptors that capability 9.0 has for the problem."""
    config = gemm8_config.described(H100, problem, m, promoted=promoted)[which]
    choice = (gemm8_config.KERNEL, str(problem), str(tuning.bucket(m)))

    def run() -> None:
        with tuning.trying(choice, config):
            case.run()

    wgmma = case.expect[90]["gemm8"]
    flying = "" if promoted else r"(?=.*wgmma\.wait_group\.sync\.aligned 1;)"  # a product is in flight
    expect = {80: case.expect[80], 90: {"gemm8_described": f"{_COPIES}{flying}.*{wgmma}"}}
    return Case(f"{case.name} by descriptors, {'' if promoted else 'not promoted, '}{which}", run, expect)


CASES = [
    int8(1, 8192, 8192, "i8/tok", "i8/ch"),
    int8(1, 4096, 11008, "i8/tok", "i8/ch", "silu"),
    int8(32, 4096, 4096, "u8/tok", "i8/ch"),
    int8(64, 11008, 4096, "i8/tok", "u8/ch", dtype="bf16"),
    int8(256, 4096, 4096, "i8/tok", "i8/ch", "gelu_tanh"),
    int8(4096, 11008, 4096, "i8/tok", "i8/ch"),
    int8(4096, 8192, 8192, "u8", "u8/ch", "gelu", dtype="f32"),
    int8(333, 777, 1001, "i8/tok", "i8/ch"),
    int8(4095, 777, 1001, "u8/tok", "u8/ch", "silu"),
    e4m3(1, 8192, 8192, "f8e4m3/tok", "f8e4m3/ch"),
    e4m3(32, 4096, 11008, "f8e4m3/tok", "f8e4m3/ch"),
    e4m3(4096, 8192, 4096, "f8e4m3/tok", "f8e4m3/ch"),
    e4m3(1, 4096, 7168, "f8e4m3/g128/dyn", "f8e4m3/b128x128"),
    e4m3(4096, 4096, 7168, "f8e4m3/g128/dyn", "f8e4m3/b128x128"),
    e4m3(333, 777, 1001, "f8e4m3/tok", "f8e4m3/ch"),
    *(described(int8(4096, 8192, 4096, "i8/tok", "i8/ch", dtype="bf16"), Problem(8192, 4096), 4096, i) for i in (0, 2)),
    described(int8(4095, 784, 1001, "u8/tok", "u8/ch", "silu"), Problem(784, 1008), 4095, 0),
    described(e4m3(4096, 8192, 4096, "f8e4m3/tok", "f8e4m3/ch"), Problem(8192, 4096, True), 4096, 0),
    described(e4m3(4096, 8192, 4096, "f8e4m3/tok", "f8e4m3/ch"), Problem(8192, 4096, True), 4096, 0, promoted=False),
    described(e4m3(4096, 4096, 7168, "f8e4m3/g128/dyn", "f8e4m3/b128x128"), Problem(4096, 7168, True, 128), 4096, 0),
]
