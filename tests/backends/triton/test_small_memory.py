"""GPUs that give a program 99 KiB of shared memory (8.6, 8.9, 12.0): variants fit there, or a launch would fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from qfx.backends.triton import float_attention, gemm4_config, gemm8_config
from qfx.backends.triton.device import A100, H200, Device
from qfx.backends.triton.quantized_attention import fitted
from qfx.backends.triton.weight_only_config import heuristic
from qfx.format import Format

L40S = Device("NVIDIA L40S", (8, 9), 142, 101376)
RTX5090 = Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 101376)

PROGRAM = """
import json, sys
from functools import partial
import torch
from qfx.backends.triton import ahead
from qfx.backends.triton.launch import recorded
from tests.backends.triton.aot_cache_attention import case as cached
from tests.backends.triton.aot_float_attention import case as floats
from tests.backends.triton.aot_quantized_attention import _call as attended
from tests.backends.triton.aot_weight_only import case as weighted
from tests.backends.triton.test_small_memory import L40S, RTX5090

tokens, f32 = "q=i8/tok k=i8/tok", torch.float32
CASES = {
    "values narrower than keys": partial(attended, tokens, 192, value=64),
    "f32": partial(attended, "k=i8/tok", 256, dtype=f32),
    "a mask of f32": partial(attended, "k=i8/tok", 128, mask=f32),
    "three bits": weighted("u3/g128/f16", 33, 4096, 4096, torch.bfloat16).run,
    "three bits in small groups": weighted("u3/g32", 256, 4096, 4096).run,
    "a table in f32": weighted("nf4/g64", 3, 4096, 4096, f32).run,
    "few queries of wide heads": floats((16, 1), width=256, queries=16).run,
    "few queries with a mask of f32 each": floats((16, 1), queries=16, mask=f32).run,
    "a cache of 5 and 6 bits": cached({"k": "i5/g32", "v": "i6/tok"}, dtype=torch.bfloat16, width=192, queries=4).run,
}
found = {}
for name, run in CASES.items():
    for device in (L40S, RTX5090) if name in sys.argv[1:] else (L40S,):
        with recorded(device) as launches:
            run()
        for one in launches:
            if one.kernel.fn.__name__ in ("attention", "dot_tiles", "split_attention", "split_float_attention"):
                found[f"{name}, {device.name}"] = ahead.compile_launch(one, device).shared
json.dump(found, sys.stdout)
"""


def test_what_needs_most_fits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", PROGRAM, "values narrower than keys"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10 and max(found.values()) <= L40S.shared, found


SIZES = [(0, 256, 128, 0), (1024, 1024, 1024, 0), (0, 256, 256, 4), (256, 128, 256, 1), (1024, 1024, 1024, 4)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [16, 128])
def test_stages_then_rows_are_given_up(sizes: tuple[int, int, int, int], rows: int) -> None:
    config = {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 8, "num_stages": 4}
    found, more = (fitted(config, sizes, device) for device in (L40S, H200))
    q, k, v, mask = sizes
    least = 64 * 2 * (k + v) + 64 * found["BLOCK_M"] * mask + q * found["BLOCK_M"]
    assert least < L40S.shared or (found["BLOCK_M"], found["num_stages"]) == (16, 2)
    assert found["num_stages"] <= more["num_stages"] and found["BLOCK_M"] <= more["BLOCK_M"]
    assert found["num_stages"] == 2 or found["BLOCK_M"] == rows
    assert config["num_stages"] == 4, "as it was given"
    huge = Device("", (9, 0), 1, 1 << 30)
    assert fitted(config, sizes, huge) == config


def test_few_queries_keep_what_fits() -> None:
    config = {"BLOCK_M": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}
    for sizes, tokens, stages in (((256, 256, 2, 1), 64, 3), ((256, 256, 2, 4), 64, 2), ((512, 512, 2, 0), 32, 2)):
        config = {**config, "BLOCK_R": tokens}
        assert float_attention.fitted(config, sizes, L40S) == {**config, "num_stages": stages}
        assert float_attention.fitted(config, sizes, H200) == float_attention.fitted(config, sizes, A100) == config
    small = Device("", (8, 0), 1, 65536)
    assert float_attention.fitted(config, (512, 512, 2, 4), small) == {**config, "num_stages": 2, "BLOCK_M": 32}


@pytest.mark.parametrize("m", [1, 33, 64, 300, 4096])
def test_tiles_of_a_gpu_that_multiplies_from_registers(m: int) -> None:
    old = Device("", (8, 9), RTX5090.processors, RTX5090.shared)
    assert H200.from_shared and not RTX5090.from_shared and not A100.from_shared
    eight, four = gemm8_config.Problem(4096, 4096), gemm4_config.Problem(4096, 4096, 4, 128, 0)
    assert gemm8_config.heuristic(RTX5090, eight, m) == gemm8_config.heuristic(old, eight, m)
    assert gemm4_config.heuristic(RTX5090, four, m) == gemm4_config.heuristic(old, four, m)
    only = (Format.parse("u4/g128"), m, 4096, 4096, torch.float16)
    assert heuristic(RTX5090, *only) == heuristic(old, *only)
