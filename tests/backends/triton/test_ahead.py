"""Every variant compiles ahead of time for sm_80 and sm_90: the instructions that are due, shared memory, no spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.backends.triton.cases import INTERPRETED
from tests.backends.triton.compile_cases import FAMILIES, GOLDEN

PROGRAM = "tests.backends.triton.compile_cases"


def run(*arguments: str) -> Any:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Release of Triton: variants in which its assembler spills two registers. Which ones is another matter in each release.
KNOWN = {
    "3.6.0": {
        "cache_attention {'k': 'i4', 'v': 'i2'} torch.float16 32/8 d=128 s=1 sm_90 split_attention: spills 8 bytes",
        "hadamard random factor sm_80 hadamard: spills 8 bytes",
        "mixed_rows i8/tok i8/ch,u4/g128 rows=(1024, 3072, 0) m=2048 k=4096 sm_80 mixed_integer: spills 8 bytes",
        "quantize_rows u8/tok, many rows, smooth sm_80 act_quantize: spills 8 bytes",
    },
    "3.8.0": {"cache_attention i3 torch.float16 32/8 d=128 s=1 sm_90 split_attention: spills 8 bytes"},
}
GROUPS = [FAMILIES[i::4] for i in range(4)]  # a process for each


@pytest.mark.parametrize("families", GROUPS, ids="+".join)
def test_variants_compile_as_they_should(families: list[str]) -> None:
    assert 0 < check(run("--once", *families), families) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("families", GROUPS, ids="+".join)
def test_all_variants_compile_for_both_chips(families: list[str]) -> None:
    assert check(run(*families), families) == 0


def check(found: dict[str, Any], families: list[str]) -> float:
    """Nothing is at fault and the figures are the known ones. Says which share of the launches was left out."""
    assert list(found["cases"]) == families
    rows = [
        (family, case, capability, kernel, i, row)
        for family, cases in found["cases"].items()
        for case, by_capability in cases.items()
        for capability, kernels in by_capability.items()
        for kernel, launches in kernels.items()
        for i, row in enumerate(launches)
    ]
    left_out = [row for row in rows if row[-1] is None]
    assert not [row for row in left_out if row[2] == "80"], "of the first chip all are compiled"
    faults = [
        f"{family} {case} sm_{capability} {kernel}: {fault}"
        for family, case, capability, kernel, _, row in rows
        for fault in (row or {"faults": []})["faults"]
    ]
    assert not set(faults) - KNOWN.get(found["triton"], set())
    golden = json.loads(GOLDEN.read_text())
    if golden["triton"] == found["triton"]:
        known = {family: golden["families"][family] for family in families}
        for family, case, capability, kernel, i, _ in left_out:
            known[family][case][capability][kernel][i] = None
        assert found["cases"] == known, f"if that is meant: python -m {PROGRAM} --write"
    return len(left_out) / len(rows)


def test_what_is_compiled_is_what_a_launch_would_compile() -> None:
    found = run("--front-end")
    assert found["launches"] > 400
    assert not found["differ"]


KERNELS = """
import torch, triton, triton.language as tl
from qfx.backends.triton import ahead, launch
from qfx.backends.triton.device import A100

@triton.jit
def product(a, b, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(tl.float16))

@triton.jit
def hoard(a, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(a + at)
    tl.store(c + at, tl.dot(x, tl.trans(x)).to(tl.float16) + x * tl.sum(x, 0)[None, :])

half = torch.empty(128, 128, dtype=torch.float16, device="meta")
with launch.recorded(A100) as found:
    launch.launch(product, (1,), half, half, half, BLOCK=128, config={"num_warps": 4})
    launch.launch(hoard, (1,), half, half, BLOCK=128, config={"num_warps": 1})
plain, spilling = (ahead.compile_launch(x, A100) for x in found)
assert "mma.sync" in plain.ptx and "m16n8k32" not in plain.ptx
assert plain.spilled == 0 and plain.shared >= 128 * 128 * 2, plain
assert spilling.spilled > 0, spilling
"""


def test_a_gate_sees_spills_and_a_missing_instruction(tmp_path: Path) -> None:
    program = tmp_path / "kernels.py"
    program.write_text(KERNELS)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


SERVING = """
import torch, triton, triton.language as tl
from qfx.backends.triton import ahead, cache_append, cache_read, gemm8, launch
from qfx.backends.triton.device import H100
from qfx.kv.formats import cache_formats
from qfx.kv.packed_ops import allocate, spec_of
from tests.backends.triton.aot_gemm8 import int8
from tests.backends.triton.cases import meta

@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["m"])
def kernel(a, m, n, free):
    tl.store(a + m * n + free, 1.0)

def variants(run):
    with launch.recorded(H100) as found:
        run()
    return [ahead.source_of(one).hash() for one in found]

def of(m, n, free):
    return variants(lambda: launch.launch(kernel, (1,), meta(4), m, n, free))

assert of(32, 32, 32) == of(33, 32, 33) == of(33, 32, 1) != of(1, 32, 32)
assert of(33, 32, 1) != of(33, 33, 1)

def cached(tokens, new):
    fmt, like = cache_formats("i4", 1)[0], meta(1, 8, 0, 128)
    memory, spec = allocate(fmt, like, like, tokens), spec_of(fmt, like, like, tokens)
    k, length = meta(1, 8, new, 128), meta(dtype=torch.long)
    found = variants(lambda: cache_append.cache_append(memory, k, k, length, spec))
    return found + variants(lambda: cache_read.cache_read(memory, length, spec))

for new in (1, 2048):
    assert cached(4096, new) == cached(8192, new), "a cache of another length has no kernels of its own"
rows = [variants(int8(m, 4096, 4096, "i8/tok", "i8/ch").run) for m in (2000, 2001)]
assert rows[0] == rows[1] and len(rows[0]) == 1, "nor has another number of rows"
"""


def test_serving_compiles_nothing_for_another_length_or_number_of_rows(tmp_path: Path) -> None:
    program = tmp_path / "serving.py"
    program.write_text(SERVING)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not INTERPRETED, reason="for processes in which Triton interprets")
def test_an_interpreting_process_is_no_place_to_compile() -> None:
    import triton

    assert triton.knobs.runtime.interpret
